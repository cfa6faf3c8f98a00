"""Real sockets and signals around a small app: answers while vLLM loads, draining, a dead engine."""

import asyncio
import signal
import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
from fastapi import FastAPI
from starlette.responses import StreamingResponse

from lrq_server.app import Additions, loading_app, with_additions
from lrq_server.limits import RequestGate
from lrq_server.readiness import Phase, Readiness
from lrq_server.serve_settings import ServeSettings
from lrq_server.web_server import WebServer, answering

OPTIONS = {"log_config": None}


@pytest.fixture
def listener() -> Iterator[socket.socket]:
    """A port that is taken and not listened to, as vLLM hands it over."""
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        yield bound


class Running:
    """A server in this thread's event loop whose one route streams until ``go_on`` is set."""

    def __init__(self, listener: socket.socket, drain_seconds: float) -> None:
        self.readiness, self.engine, self.go_on = Readiness(), SimpleNamespace(errored=False), asyncio.Event()
        self.readiness.watch(lambda: self.engine.errored)
        self.gate = RequestGate(ServeSettings(), self.readiness, lambda reason: None)

        async def nothing() -> None:
            pass

        app = FastAPI()

        @app.post("/v1/completions")
        async def complete() -> StreamingResponse:
            return StreamingResponse(self._answer())

        around = with_additions(app, Additions(self.readiness, self.gate, {}, (), nothing))
        self.server = WebServer(around, OPTIONS)
        self.told = asyncio.create_task(self.server.serve_until_told(listener, self.readiness, self.gate, drain_seconds))
        self.client = httpx.AsyncClient(base_url=f"http://127.0.0.1:{listener.getsockname()[1]}", timeout=60)

    async def _answer(self) -> AsyncIterator[str]:
        yield "first "
        await self.go_on.wait()
        yield "last"

    async def streaming(self) -> AsyncIterator[str]:
        """A request's parts; the first is there once it is asked for."""
        async with self.client.stream("POST", "/v1/completions", json={}) as answer:
            async for part in answer.aiter_text():
                yield part

    async def __aenter__(self) -> "Running":
        while not self.server.started:
            await asyncio.sleep(0)
        return self

    async def __aexit__(self, *_: Any) -> None:
        await self.client.aclose()

    async def status(self, path: str) -> tuple[int, Any]:
        answer = await self.client.get(path)
        return answer.status_code, answer.json()


def run(test: Callable[[], Awaitable[None]]) -> None:
    async def within() -> None:
        await asyncio.wait_for(test(), 60)  # one that hangs fails

    asyncio.run(within())


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_told_to_stop_it_turns_red_and_ends_what_it_has_begun(
    number: signal.Signals, listener: socket.socket, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lrq_server.web_server._LAST_BYTES_S", 0)  # uvicorn by itself would wait for nobody

    async def test() -> None:
        async with Running(listener, drain_seconds=60) as running:
            assert await running.status("/lrq/ready") == (200, {"status": "ready"})
            stream = running.streaming()
            assert await anext(stream) == "first "
            signal.raise_signal(number)
            while running.readiness.phase is not Phase.DRAINING:
                await asyncio.sleep(0)
            assert await running.status("/lrq/ready") == (503, {"status": "draining"})
            assert (await running.client.post("/v1/completions", json={})).status_code == 503
            running.go_on.set()
            assert [part async for part in stream] == ["last"]
            assert await running.told

    run(test)


def test_what_has_not_ended_in_time_is_cut_off(listener: socket.socket, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lrq_server.web_server._LAST_BYTES_S", 0)

    async def test() -> None:
        async with Running(listener, drain_seconds=0) as running:
            stream = running.streaming()
            assert await anext(stream) == "first "
            signal.raise_signal(signal.SIGTERM)
            with pytest.raises(httpx.RemoteProtocolError):
                await anext(stream)
            assert await running.told

    run(test)


def test_a_second_signal_ends_it_at_once(listener: socket.socket) -> None:
    async def test() -> None:
        async with Running(listener, drain_seconds=3600) as running:
            stream = running.streaming()
            assert await anext(stream) == "first "
            signal.raise_signal(signal.SIGTERM)
            while running.readiness.phase is not Phase.DRAINING:
                await asyncio.sleep(0)
            signal.raise_signal(signal.SIGTERM)
            assert await running.told
            running.go_on.set()
            await stream.aclose()

    run(test)


def test_it_ends_when_the_engine_dies(listener: socket.socket) -> None:
    async def test() -> None:
        async with Running(listener, drain_seconds=60) as running:
            running.engine.errored = True
            assert await running.status("/lrq/ready") == (503, {"status": "engine dead"})
            assert not await running.told

    run(test)


def test_a_connection_made_while_vllm_loads_is_answered_then_or_afterwards(listener: socket.socket) -> None:
    url = f"http://127.0.0.1:{listener.getsockname()[1]}/lrq/ready"
    with answering(loading_app(Readiness()), listener, OPTIONS):
        # Nobody else could answer: this thread is busy, as it is when vLLM loads. Its transport waits for the port to open.
        with httpx.Client(transport=httpx.HTTPTransport(retries=100), timeout=60) as client:
            assert (client.get(url).status_code, client.get(url).json()) == (503, {"status": "loading"})
    with socket.create_connection(listener.getsockname()) as early:  # nobody answers now, and it is not refused
        early.sendall(b"GET /lrq/ready HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")

        async def test() -> None:
            async with Running(listener, drain_seconds=60) as running:
                early.setblocking(False)
                answer = await asyncio.get_running_loop().sock_recv(early, 1 << 16)
                assert answer.startswith(b"HTTP/1.1 200 OK")
                signal.raise_signal(signal.SIGTERM)
                assert await running.told

        run(test)
