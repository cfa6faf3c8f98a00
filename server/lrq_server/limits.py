"""Which requests are let in: not those that are too large, too many, or come to a server that is about to end."""

import asyncio
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http import HTTPStatus

from starlette.datastructures import Headers
from starlette.requests import ClientDisconnect
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from lrq_server.openai_errors import error_response
from lrq_server.readiness import Phase, Readiness
from lrq_server.serve_settings import ServeSettings

__all__ = ["LimitRequests", "RequestGate"]

# A client that is still sending does not read the answer, and closing on it loses the answer: so much more is let through
# to nowhere first, in multiples of what a request may have.
_DISCARDED = 4
_UNLIMITED = ("/lrq/", "/ping")  # asked by whoever watches the server


class RequestGate:
    """Counts the requests that are inside, from the first byte of their bodies to the last of their answers.

    rejected: is told the reason of each refusal.
    """

    def __init__(self, settings: ServeSettings, readiness: Readiness, rejected: Callable[[str], None]) -> None:
        self.max_bytes = settings.max_request_bytes
        self._most = settings.max_concurrent_requests
        self._readiness = readiness
        self._rejected = rejected
        self._inside = 0
        self._empty = asyncio.Event()
        self._empty.set()

    @property
    def inside(self) -> int:
        """Requests at this moment."""
        return self._inside

    async def empty_within(self, seconds: float) -> bool:
        """Wait until no request is inside; whether it came to that in time."""
        try:
            await asyncio.wait_for(self._empty.wait(), seconds)
        except TimeoutError:
            return False
        return True

    def refusal(self) -> JSONResponse | None:
        """The answer to a request that may not come in now, whatever it is."""
        phase = self._readiness.phase
        if phase is not Phase.READY:
            self._rejected(phase.value.replace(" ", "_"))
            return error_response(
                HTTPStatus.SERVICE_UNAVAILABLE, f"This server is not taking requests ({phase}). Ask another one.", 1
            )
        if self._inside >= self._most:
            self._rejected("too_many")
            return error_response(
                HTTPStatus.TOO_MANY_REQUESTS,
                f"This server has {self._most} requests, as many as it takes at a time. Try again in a moment.", 1,
            )  # fmt: skip
        return None

    def too_large(self) -> JSONResponse:
        """The answer to a request with too large a body."""
        self._rejected("too_large")
        return error_response(
            HTTPStatus.REQUEST_ENTITY_TOO_LARGE,
            f"The request's body is larger than the {self.max_bytes:,} bytes that this server takes. Send fewer or shorter "
            "prompts.",
        )

    @contextmanager
    def entered(self) -> Iterator[None]:
        """A request is inside for as long as the block lasts."""
        self._inside += 1
        self._empty.clear()
        try:
            yield
        finally:
            self._inside -= 1
            if not self._inside:
                self._empty.set()


class LimitRequests:
    """Middleware: what asks for work (POST) goes through the gate, with its body read whole; everything else passes."""

    def __init__(self, app: ASGIApp, gate: RequestGate) -> None:
        self._app = app
        self._gate = gate

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI."""
        if scope["type"] != "http" or scope["method"] != "POST" or scope["path"].startswith(_UNLIMITED):
            await self._app(scope, receive, send)
            return
        refusal = self._gate.refusal()
        if refusal is not None:
            await refusal(scope, receive, send)
            return
        with self._gate.entered():
            try:
                body = await self._body(scope, receive)
            except ClientDisconnect:
                return
            if body is None:
                await self._gate.too_large()(scope, receive, send)
            else:
                await self._app(scope, _with_body(body, receive), send)

    async def _body(self, scope: Scope, receive: Receive) -> bytes | None:
        """None if it is too large. Raises ClientDisconnect if the client goes away before it has sent everything."""
        parts: list[bytes] = []
        most, size = self._gate.max_bytes, 0
        declared = Headers(scope=scope).get("content-length", "")
        refused = declared.isdecimal() and int(declared) > most
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                raise ClientDisconnect
            size += len(message.get("body", b""))
            refused = refused or size > most
            if refused:
                parts.clear()
            else:
                parts.append(message.get("body", b""))
            if not message.get("more_body", False) or size > _DISCARDED * most:
                return None if refused else b"".join(parts)


def _with_body(body: bytes, receive: Receive) -> Receive:
    """``receive`` that gives the whole body first, and then what comes later: that the client has gone."""
    given = False

    async def receive_again() -> Message:
        nonlocal given
        if given:
            return await receive()
        given = True
        return {"type": "http.request", "body": body, "more_body": False}

    return receive_again
