"""What lrq-server adds to vLLM's app, around an app that stands for it: readiness, limits, key, metrics, request log."""

import asyncio
import json
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
from fastapi import FastAPI, Request
from prometheus_client import CollectorRegistry, generate_latest
from starlette.responses import StreamingResponse
from starlette.types import ASGIApp

from lrq_server.app import Additions, loading_app, with_additions
from lrq_server.json_logs import JsonLineHandler
from lrq_server.limits import RequestGate
from lrq_server.readiness import Phase, Readiness
from lrq_server.request_log import CLIENT_GONE
from lrq_server.serve_settings import ServeSettings
from lrq_server.server_metrics import ClippingMetrics, ServerMetrics
from tests.logs import records_of

COMPLETIONS, MODELS = "/v1/completions", "/v1/models"


class Server:
    """An app with one slow route, as vLLM's would be, and ours around it. ``go_on`` lets its requests end."""

    def __init__(self, keys: tuple[str, ...] = (), **settings: Any) -> None:
        self.registry = CollectorRegistry()
        self.metrics = ServerMetrics(self.registry)
        self.readiness = Readiness()
        self.engine = SimpleNamespace(errored=False)
        self.readiness.watch(lambda: self.engine.errored)
        self.readiness.enter(Phase.READY)
        self.gate = RequestGate(ServeSettings(**settings), self.readiness, self.metrics.rejected)
        self.go_on = asyncio.Event()
        self.bodies: list[bytes] = []
        self.refreshed = 0
        additions = Additions(self.readiness, self.gate, {"scheme": "w8a8"}, keys, self._refresh, silent=("/silent",))
        self.app = with_additions(self._engine_app(), additions)

    def _engine_app(self) -> FastAPI:
        app = FastAPI()

        @app.post(COMPLETIONS)
        async def complete(request: Request) -> StreamingResponse:
            self.bodies.append(await request.body())

            async def answer() -> AsyncIterator[str]:
                yield "first "
                await self.go_on.wait()
                yield request.headers["x-request-id"]

            return StreamingResponse(answer())

        for path in (MODELS, "/metrics", "/silent"):
            app.get(path)(lambda: {})
        return app

    async def _refresh(self) -> None:
        self.refreshed += 1

    def client(self) -> httpx.AsyncClient:
        return client_of(self.app)

    async def inside(self, requests: int) -> None:
        """Wait until so many requests are inside."""
        while self.gate.inside != requests:
            await asyncio.sleep(0)

    def rejected(self, reason: str) -> float | None:
        return self.registry.get_sample_value("lrq_requests_rejected_total", {"reason": reason})


def client_of(app: ASGIApp) -> httpx.AsyncClient:
    return httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://server")


def run(test: Callable[[], Awaitable[None]]) -> None:
    async def within() -> None:
        await asyncio.wait_for(test(), 60)  # one that hangs fails

    asyncio.run(within())


@pytest.fixture
def logged() -> Iterator[Callable[[], list[dict[str, Any]]]]:
    """The fields of all requests' lines so far."""
    with records_of("vllm.lrq_server.request_log") as records:
        yield lambda: [record.fields for record in records]  # type: ignore[attr-defined]


def assert_openai_error(answer: httpx.Response, code: int, words: str) -> None:
    error = answer.json()["error"]
    assert answer.status_code == error["code"] == code and words in error["message"]
    assert set(error) == {"message", "type", "param", "code"}


def test_ready_says_what_the_server_is_doing() -> None:
    async def test() -> None:
        server = Server()
        async with server.client() as client:
            for phase in Phase:
                server.readiness.enter(phase)
                answer = await client.get("/lrq/ready")
                assert (answer.status_code, answer.json()) == (200 if phase is Phase.READY else 503, {"status": phase.value})
                assert (await client.get("/lrq/live")).status_code == 200
            server.readiness.enter(Phase.READY)
            server.engine.errored = True
            answer = await client.get("/lrq/ready")
            assert (answer.status_code, answer.json()) == (503, {"status": "engine dead"})
            assert_openai_error(await client.post(COMPLETIONS, json={}), 503, "engine dead")

    run(test)


def test_while_it_loads_a_server_lives_and_is_not_ready() -> None:
    async def test() -> None:
        readiness = Readiness()
        async with client_of(loading_app(readiness)) as client:
            assert (await client.get("/lrq/live")).status_code == 200
            answer = await client.get("/lrq/ready")
            assert (answer.status_code, answer.json()) == (503, {"status": "loading"})
            for answer in (await client.get("/health"), await client.post(COMPLETIONS, json={"prompt": "x"})):
                assert_openai_error(answer, 503, "loading")
                assert int(answer.headers["retry-after"]) > 0

    run(test)


@pytest.mark.parametrize(
    ("authorization", "status"),
    [(None, 401), ("Bearer wrong", 401), ("Basic second", 401), ("second", 401), ("Bearer second", 200), ("bearer first", 200)],
)
def test_info_needs_one_of_the_keys_and_what_watches_does_not(authorization: str | None, status: int) -> None:
    async def test() -> None:
        async with Server(keys=("first", "second")).client() as client:
            answer = await client.get("/lrq/info", headers={"Authorization": authorization} if authorization else {})
            assert answer.status_code == status
            assert answer.json() == {"scheme": "w8a8"} if status == 200 else "API key" in answer.json()["error"]["message"]
            for path in ("/lrq/live", "/lrq/ready", "/metrics"):
                assert (await client.get(path)).status_code == 200

    run(test)


def test_without_keys_everyone_is_told_what_is_served() -> None:
    async def test() -> None:
        async with Server().client() as client:
            assert (await client.get("/lrq/info")).json() == {"scheme": "w8a8"}

    run(test)


def test_a_request_that_is_too_large_never_reaches_the_engine() -> None:
    async def test() -> None:
        server = Server(max_request_mb=0.001)

        async def in_parts(size: int) -> AsyncIterator[bytes]:  # sent without saying how large it is
            for _ in range(size):
                yield b"x"

        server.go_on.set()
        async with server.client() as client:
            for body in (b"x" * 1001, in_parts(1001), b"x" * 100_000):
                assert_openai_error(await client.post(COMPLETIONS, content=body), 413, "1,000 bytes")
            assert server.bodies == [] and server.rejected("too_large") == 3
            for body in (b"x" * 1000, in_parts(1000)):
                assert (await client.post(COMPLETIONS, content=body)).status_code == 200
            assert server.bodies == [b"x" * 1000] * 2
        assert server.gate.inside == 0

    run(test)


def test_as_many_requests_come_in_as_are_allowed_and_the_next_when_one_has_ended() -> None:
    async def test() -> None:
        server = Server(max_concurrent_requests=2)
        async with server.client() as client:
            running = [asyncio.create_task(client.post(COMPLETIONS, json={})) for _ in range(2)]
            await server.inside(2)
            answer = await client.post(COMPLETIONS, json={})
            assert_openai_error(answer, 429, "Try again")
            assert int(answer.headers["retry-after"]) > 0 and server.rejected("too_many") == 1
            assert (await client.get(MODELS)).status_code == 200  # asks for no work
            server.go_on.set()
            assert [answer.status_code for answer in await asyncio.gather(*running)] == [200, 200]
            assert (await client.post(COMPLETIONS, json={})).status_code == 200

    run(test)


def test_a_draining_server_ends_what_is_inside_and_lets_nothing_in() -> None:
    async def test() -> None:
        server = Server()
        async with server.client() as client:
            running = asyncio.create_task(client.post(COMPLETIONS, json={}))
            await server.inside(1)
            server.readiness.enter(Phase.DRAINING)
            assert_openai_error(await client.post(COMPLETIONS, json={}), 503, "draining")
            assert server.rejected("draining") == 1
            assert not await server.gate.empty_within(0)
            server.go_on.set()
            assert await server.gate.empty_within(60)
            assert (await running).text.startswith("first ")

    run(test)


def test_a_client_that_goes_away_leaves_its_place(logged: Callable[[], list[dict[str, Any]]]) -> None:
    async def call(server: Server, messages: list[dict[str, Any]]) -> None:
        headers = [(b"content-length", b"10")]
        scope = {"type": "http", "method": "POST", "path": COMPLETIONS, "headers": headers, "query_string": b""}

        async def receive() -> dict[str, Any]:
            return messages.pop(0) if messages else {"type": "http.disconnect"}

        async def send(_: Any) -> None:
            pass

        await server.app(scope, receive, send)  # type: ignore[arg-type]

    async def test() -> None:
        server = Server()
        await call(server, [{"type": "http.request", "body": b"half", "more_body": True}])
        assert server.bodies == [] and server.gate.inside == 0
        await call(server, [{"type": "http.request", "body": b"0123456789", "more_body": False}])  # gone while it is answered
        assert server.bodies == [b"0123456789"] and server.gate.inside == 0
        assert [(line["status"], line["complete"]) for line in logged()] == [(CLIENT_GONE, False), (200, False)]

    run(test)


def test_each_request_has_an_id_that_the_engine_the_client_and_the_log_know(
    logged: Callable[[], list[dict[str, Any]]],
) -> None:
    async def test() -> None:
        server = Server()
        server.go_on.set()
        async with server.client() as client:
            named = await client.post(COMPLETIONS, json={}, headers={"X-Request-Id": "mine"})
            unnamed = await client.post(COMPLETIONS, json={})
            odd = await client.post(COMPLETIONS, json={}, headers={"X-Request-Id": "x" * 200})
            missing = await client.get("/nowhere")
            for path in ("/silent", "/lrq/ready", "/metrics"):
                await client.get(path)
        ids = [answer.headers["x-request-id"] for answer in (named, unnamed, odd, missing)]
        assert ids[0] == "mine" and len(set(ids)) == 4 and all(len(one) == 32 for one in ids[1:])
        assert [answer.text for answer in (named, unnamed, odd)] == [f"first {one}" for one in ids[:3]]
        lines = logged()
        assert [(line["request_id"], line["status"]) for line in lines] == list(zip(ids, (200, 200, 200, 404), strict=True))
        assert all(line["milliseconds"] >= 0 and line["complete"] for line in lines)
        assert (lines[0]["method"], lines[0]["path"]) == ("POST", COMPLETIONS)

    run(test)


def test_a_request_whose_client_goes_before_the_answer_is_logged_as_such(
    logged: Callable[[], list[dict[str, Any]]],
) -> None:
    async def test() -> None:
        server = Server()

        async def receive() -> dict[str, Any]:
            return {"type": "http.disconnect"}

        async def send(_: Any) -> None:
            raise AssertionError("nobody is there")

        scope = {"type": "http", "method": "POST", "path": COMPLETIONS, "headers": [], "query_string": b""}
        await server.app(scope, receive, send)  # type: ignore[arg-type]
        (line,) = logged()
        assert (line["status"], line["complete"]) == (CLIENT_GONE, False)

    run(test)


def test_metrics_are_brought_up_to_date_when_they_are_asked_for() -> None:
    async def test() -> None:
        server = Server()
        async with server.client() as client:
            await client.get(MODELS)
            assert server.refreshed == 0
            await client.get("/metrics")
            await client.get("/metrics/")
            assert server.refreshed == 2

    run(test)


def test_metrics_say_what_is_served() -> None:
    registry = CollectorRegistry()
    metrics = ServerMetrics(registry)
    metrics.describe("w8a8", ("1.2", "0.32.0"), {"layers.0.up": "hopper", "layers.1.up": "hopper", "layers.2.up": "triton"})
    for ready in (True, False):
        metrics.show_ready(ready)
        assert registry.get_sample_value("lrq_ready") == ready
    assert registry.get_sample_value("lrq_info", {"scheme": "w8a8", "version": "1.2", "vllm_version": "0.32.0"}) == 1
    for kernel, layers in (("hopper", 2), ("triton", 1)):
        assert registry.get_sample_value("lrq_layers", {"scheme": "w8a8", "kernel": kernel}) == layers
    assert b"lrq_clipped" not in generate_latest(registry)  # nothing is counted, nothing is claimed


def test_clipping_is_shown_for_each_module_and_in_total_over_all_ranks() -> None:
    registry = CollectorRegistry()
    clipping = ClippingMetrics(registry)

    def shown() -> tuple[float | None, ...]:
        shares = (registry.get_sample_value("lrq_clipped_share", {"module": name}) for name in ("up", "down", "idle"))
        return (*shares, *map(registry.get_sample_value, ("lrq_clipped_values_total", "lrq_quantized_values_total")))

    clipping.show([{"up": (1, 100), "down": (0, 50), "idle": (0, 0)}, {"up": (2, 100), "down": (10, 50), "idle": (0, 0)}])
    assert shown() == (0.015, 0.1, 0, 13, 300)
    clipping.show([{"up": (4, 200), "down": (10, 100)}])
    assert shown() == (0.02, 0.1, 0, 14, 300)
    clipping.show([{"up": (1, 10), "down": (0, 10)}])  # the workers began anew
    assert shown() == (0.1, 0, 0, 15, 320)


def test_every_line_of_a_json_log_is_one_object(capfd: pytest.CaptureFixture[str]) -> None:
    logger = logging.Logger("vllm.some.module")
    logger.addHandler(JsonLineHandler())
    logger.info("a %s", "message\nof two lines")
    logger.warning("with more", extra={"fields": {"request_id": "7", "status": 200}})
    try:
        raise ValueError("reason")
    except ValueError:
        logger.exception("failed")
    lines = [json.loads(line) for line in capfd.readouterr().out.splitlines()]
    assert [line["level"] for line in lines] == ["info", "warning", "error"]
    assert lines[0]["message"] == "a message\nof two lines" and lines[0]["logger"] == "vllm.some.module"
    assert (lines[1]["request_id"], lines[1]["status"]) == ("7", 200)
    assert "ValueError: reason" in lines[2]["traceback"]
