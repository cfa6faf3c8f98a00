"""uvicorn under our rules: it answers while the model loads, drains when it is told to stop, and ends when the engine dies."""

import asyncio
import logging
import signal
import socket
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import uvicorn
from starlette.types import ASGIApp

from lrq_server.limits import RequestGate
from lrq_server.readiness import Phase, Readiness

__all__ = ["WebServer", "answering"]

logger = logging.getLogger(f"vllm.{__name__}")

_SIGNALS = (signal.SIGTERM, signal.SIGINT)
_LOOK_S = 0.5  # at the engine's health
_LAST_BYTES_S = 5  # for answers that are made, and for those of a dead engine, to be sent


class WebServer(uvicorn.Server):
    """A uvicorn that leaves signals alone, except while serve_until_told is at work. options: uvicorn's."""

    def __init__(self, app: ASGIApp, options: Mapping[str, Any]) -> None:
        super().__init__(uvicorn.Config(app, access_log=False, timeout_graceful_shutdown=_LAST_BYTES_S, **options))

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """uvicorn's own way: none."""
        yield

    async def serve_until_told(
        self, listener: socket.socket, readiness: Readiness, gate: RequestGate, drain_seconds: float
    ) -> bool:
        """Serve until SIGTERM or SIGINT and then until the requests inside have ended or their time is over, or until the
        engine dies. A second signal ends it at once. Returns whether it was told to stop: False if the engine died.
        """
        loop, told = asyncio.get_running_loop(), asyncio.Event()

        def stop() -> None:
            self.should_exit = self.force_exit = told.is_set()
            told.set()

        for number in _SIGNALS:
            loop.add_signal_handler(number, stop)
        readiness.enter(Phase.READY)
        watching = (self._drain(told, readiness, gate, drain_seconds), self._watch(readiness))
        tasks = [loop.create_task(watch) for watch in watching]
        try:
            await self.serve(sockets=[listener])
        finally:
            for task in tasks:
                task.cancel()
            for number in _SIGNALS:
                loop.remove_signal_handler(number)
        return told.is_set()

    async def _drain(self, told: asyncio.Event, readiness: Readiness, gate: RequestGate, seconds: float) -> None:
        await told.wait()
        readiness.enter(Phase.DRAINING)
        logger.info("Told to stop: no new requests; %d have %g s to end.", gate.inside, seconds)
        if not await gate.empty_within(seconds):
            logger.warning("%d requests had not ended after %g s and are cut off.", gate.inside, seconds)
        self.should_exit = True

    async def _watch(self, readiness: Readiness) -> None:
        while readiness.phase is not Phase.ENGINE_DEAD:
            await asyncio.sleep(_LOOK_S)
        logger.error("vLLM's engine has died; what it said before tells why. The server ends.")
        self.should_exit = True


@contextmanager
def answering(app: ASGIApp, listener: socket.socket, options: Mapping[str, Any]) -> Iterator[None]:
    """Serve ``app`` from a thread for as long as the block lasts: while vLLM loads, it keeps this one busy.

    The listener stays open: connections that come after the block wait for whoever listens next.
    """
    server = WebServer(app, {**options, "loop": "asyncio", "lifespan": "off"})
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener.dup()]}, name="lrq-loading", daemon=True)
    thread.start()
    try:
        yield
    finally:
        server.should_exit = True
        thread.join()
