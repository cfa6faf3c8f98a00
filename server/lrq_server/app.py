"""Our routes and middleware on vLLM's OpenAI app, whose own routes stay as they are; and what answers while it loads."""

import hashlib
import secrets
from collections.abc import Awaitable, Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any

from fastapi import APIRouter, FastAPI, Request
from starlette.applications import Starlette
from starlette.responses import HTMLResponse, JSONResponse, Response
from starlette.routing import Mount, Route
from starlette.types import ASGIApp, Receive, Scope, Send

from lrq_server.limits import LimitRequests, RequestGate
from lrq_server.live_page import live_page
from lrq_server.openai_errors import error_response
from lrq_server.readiness import Readiness
from lrq_server.request_log import LogRequests
from lrq_server.server_metrics import RefreshMetrics

__all__ = ["Additions", "loading_app", "with_additions"]

_LIVE, _READY, _INFO, _REPORT = "/lrq/live", "/lrq/ready", "/lrq/info", "/lrq/report"
_LOADING_RETRY_S = 5


@dataclass(frozen=True)
class Additions:
    """What a server has beside vLLM's. keys: vLLM's API keys, one of which /lrq/info needs if there are any.

    refresh_metrics: called before /metrics is answered. silent: paths whose requests are not logged; None logs none.
    """

    readiness: Readiness
    gate: RequestGate
    info: Mapping[str, Any]
    keys: Sequence[str]
    refresh_metrics: Callable[[], Awaitable[None]]
    silent: Collection[str] | None = ()


def with_additions(app: FastAPI, additions: Additions) -> ASGIApp:
    """Add the routes to ``app``; what is to be served is the middleware around it.

    Around, not in it: vLLM's app comes with its own middleware closed.
    """
    app.include_router(_router(additions))
    return LogRequests(LimitRequests(RefreshMetrics(app, additions.refresh_metrics), additions.gate), additions.silent)


def loading_app(readiness: Readiness) -> ASGIApp:
    """What is answered until the model is loaded: that the process lives, and that everything else has to wait."""

    async def unavailable(scope: Scope, receive: Receive, send: Send) -> None:
        message = f"This server is not taking requests yet ({readiness.phase}). Try again later."
        await error_response(HTTPStatus.SERVICE_UNAVAILABLE, message, _LOADING_RETRY_S)(scope, receive, send)

    async def live(_: Request) -> Response:
        return _live()

    async def ready(_: Request) -> Response:
        return _ready(readiness)

    return Starlette(routes=[Route(_LIVE, live), Route(_READY, ready), Mount("/", unavailable)])


def _router(additions: Additions) -> APIRouter:
    router = APIRouter(tags=["lrq"])
    digests = [_digest(key) for key in additions.keys]

    @router.get(_LIVE)
    async def live() -> Response:
        """The process lives."""
        return _live()

    @router.get(_READY)
    async def ready() -> Response:
        """200 if requests are answered, else 503; the body says what the server is doing."""
        return _ready(additions.readiness)

    @router.get(_INFO)
    async def info(request: Request) -> Response:
        """What is served, how good it is, and what it runs on."""
        if digests and not _has_key(request, digests):
            return error_response(HTTPStatus.UNAUTHORIZED, "This route needs the server's API key: Authorization: Bearer KEY.")
        return JSONResponse(dict(additions.info))

    @router.get(_REPORT)
    async def report() -> HTMLResponse:
        """A page that shows the metrics as they change, and with the key what is served."""
        return HTMLResponse(live_page(bool(digests)))

    return router


def _live() -> Response:
    return JSONResponse({"status": "live"})


def _ready(readiness: Readiness) -> Response:
    status = HTTPStatus.OK if readiness.ready else HTTPStatus.SERVICE_UNAVAILABLE
    return JSONResponse({"status": readiness.phase}, status)


def _has_key(request: Request, digests: Sequence[bytes]) -> bool:
    """Compared in a time that says nothing of the keys, as vLLM does for its own routes."""
    scheme, _, key = request.headers.get("Authorization", "").partition(" ")
    given = _digest(key)
    found = [secrets.compare_digest(given, digest) for digest in digests]
    return scheme.lower() == "bearer" and any(found)


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode()).digest()
