"""What a server adds to vLLM's Prometheus metrics. They stand in the same registry, so that /metrics shows both."""

from collections import Counter as Tally
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any

from prometheus_client import REGISTRY, CollectorRegistry, Counter, Gauge
from starlette.types import ASGIApp, Receive, Scope, Send

__all__ = ["ClippingMetrics", "RefreshMetrics", "ServerMetrics"]


# Gauges of one process are one series, also where a multiprocess registry (PROMETHEUS_MULTIPROC_DIR) would show several.
_ONE: dict[str, Any] = {"multiprocess_mode": "mostrecent"}


class ServerMetrics:
    """The metrics of one server. registry: prometheus_client's own, in which vLLM has its metrics; once in a process."""

    def __init__(self, registry: CollectorRegistry = REGISTRY) -> None:
        labels = ["scheme", "version", "vllm_version"]
        self._info = Gauge("lrq_info", "1; the labels say what is served.", labels, registry=registry, **_ONE)
        self._layers = Gauge(
            "lrq_layers", "Quantized layers that run on a kernel.", ["scheme", "kernel"], registry=registry, **_ONE
        )
        self._ready = Gauge("lrq_ready", "1 if requests are answered.", registry=registry, **_ONE)
        self._rejected = Counter("lrq_requests_rejected", "Requests not let in.", ["reason"], registry=registry)

    def describe(self, scheme: str, versions: tuple[str, str], kernels: Mapping[str, str]) -> None:
        """What is served. versions: of lrq and of vLLM; kernels: of each layer."""
        self._info.labels(scheme, *versions).set(1)
        for kernel, layers in Tally(kernels.values()).items():
            self._layers.labels(scheme, kernel).set(layers)

    def rejected(self, reason: str) -> None:
        """A request was not let in."""
        self._rejected.labels(reason).inc()

    def show_ready(self, ready: bool) -> None:
        """Whether requests are answered."""
        self._ready.set(ready)


class ClippingMetrics:
    """How much of what comes into quantized layers is clipped; for a server whose workers count it."""

    def __init__(self, registry: CollectorRegistry = REGISTRY) -> None:
        about = "Share of a module's input values that its quantization clipped."
        self._share = Gauge("lrq_clipped_share", about, ["module"], registry=registry, **_ONE)
        self._clipped = Counter("lrq_clipped_values", "Input values that quantization clipped.", registry=registry)
        self._seen = Counter("lrq_quantized_values", "Input values that were looked at for clipping.", registry=registry)
        self._shown = (0, 0)

    def show(self, ranks: Sequence[Mapping[str, Sequence[int]]]) -> None:
        """ranks: of each, module name -> (values clipped, values seen) since the server started."""
        counts: dict[str, tuple[int, int]] = {}
        for rank in ranks:
            for module, (clipped, seen) in rank.items():
                before = counts.get(module, (0, 0))
                counts[module] = (before[0] + clipped, before[1] + seen)
        for module, (clipped, seen) in counts.items():
            self._share.labels(module).set(clipped / seen if seen else 0)
        total = (sum(clipped for clipped, _ in counts.values()), sum(seen for _, seen in counts.values()))
        for counter, now, before_now in zip((self._clipped, self._seen), total, self._shown, strict=True):
            counter.inc(now - before_now if now >= before_now else now)  # less than before: counted from 0 again
        self._shown = total


class RefreshMetrics:
    """Middleware: before /metrics is answered, whatever only the moment knows is asked for."""

    def __init__(self, app: ASGIApp, refresh: Callable[[], Awaitable[None]]) -> None:
        self._app = app
        self._refresh = refresh

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI."""
        if scope["type"] == "http" and scope["path"].rstrip("/") == "/metrics":
            await self._refresh()
        await self._app(scope, receive, send)
