"""Whether a server may be sent requests, and if not, why."""

from collections.abc import Callable
from enum import StrEnum

__all__ = ["Phase", "Readiness"]


class Phase(StrEnum):
    """What a server is doing; the values are what /lrq/ready says."""

    LOADING = "loading"
    SELF_TEST = "self-test"
    READY = "ready"
    DRAINING = "draining"
    ENGINE_DEAD = "engine dead"


class Readiness:
    """A server's phase, which goes forward only; an engine that has died goes before all else."""

    def __init__(self) -> None:
        self._phase = Phase.LOADING
        self._engine_died: Callable[[], bool] = lambda: False

    def watch(self, engine_died: Callable[[], bool]) -> None:
        """From now on there is an engine, and this is asked for its health each time."""
        self._engine_died = engine_died

    def enter(self, phase: Phase) -> None:
        """The server has come so far."""
        self._phase = phase

    @property
    def phase(self) -> Phase:
        """At this moment."""
        return Phase.ENGINE_DEAD if self._engine_died() else self._phase

    @property
    def ready(self) -> bool:
        """Whether requests are answered."""
        return self.phase is Phase.READY
