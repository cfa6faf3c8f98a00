"""One line for each request: its id, what it asked for, the status, and how long the answer took to its end."""

import logging
import time
import uuid
from collections.abc import Collection

from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

__all__ = ["CLIENT_GONE", "LogRequests"]

logger = logging.getLogger(f"vllm.{__name__}")

CLIENT_GONE = 499
"""The status of a request whose client went away before the answer began, as nginx writes it."""

_ID = "X-Request-Id"
_LONGEST_ID = 128
# Asked every few seconds by whoever watches the server: told only to those who want to know everything.
_WATCHED = frozenset(["/lrq/live", "/lrq/ready", "/metrics", "/metrics/", "/health", "/ping"])


class LogRequests:
    """Middleware. A request without an id gets one, which vLLM then uses too, and every answer carries it.

    silent: paths that are not logged at all; None logs nothing.
    """

    def __init__(self, app: ASGIApp, silent: Collection[str] | None = ()) -> None:
        self._app = app
        self._silent = silent

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request_id = _request_id(scope)
        status, ended, started = CLIENT_GONE, False, time.monotonic()

        async def watched_send(message: Message) -> None:
            nonlocal status, ended
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(raw=message.setdefault("headers", [])).setdefault(_ID, request_id)
            elif message["type"] == "http.response.body":
                ended = not message.get("more_body", False)
            await send(message)

        try:
            await self._app(scope, receive, watched_send)
        except Exception:
            status = 500 if status == CLIENT_GONE else status
            raise
        finally:
            self._log(scope, request_id, status, ended, (time.monotonic() - started) * 1000)

    def _log(self, scope: Scope, request_id: str, status: int, ended: bool, milliseconds: float) -> None:
        path = scope["path"]
        if self._silent is None or path in self._silent:
            return
        fields = {
            "request_id": request_id, "method": scope["method"], "path": path, "status": status,
            "milliseconds": round(milliseconds, 1), "complete": ended,
        }  # fmt: skip
        logger.log(
            logging.DEBUG if path in _WATCHED and status < 400 else logging.INFO,
            "%s %s %d in %.1f ms%s, request %s",
            scope["method"], path, status, milliseconds, "" if ended else ", not to its end", request_id,
            extra={"fields": fields},
        )  # fmt: skip


def _request_id(scope: Scope) -> str:
    """The client's, if it is one that a log can hold; else a new one, which is put among the request's headers."""
    headers = MutableHeaders(raw=list(scope["headers"]))
    given = headers.get(_ID, "")
    if 0 < len(given) <= _LONGEST_ID and given.isascii() and given.isprintable():
        return given
    headers[_ID] = uuid.uuid4().hex
    scope["headers"] = headers.raw
    return headers[_ID]
