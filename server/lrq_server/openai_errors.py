"""Refusals in the form of vLLM's and OpenAI's errors, which their clients know how to raise and when to try again."""

from http import HTTPStatus

from starlette.responses import JSONResponse

__all__ = ["error_response"]


def error_response(status: HTTPStatus, message: str, retry_after_s: int | None = None) -> JSONResponse:
    """``{"error": {"message", "type", "param", "code"}}``. retry_after_s: for the header Retry-After."""
    headers = None if retry_after_s is None else {"Retry-After": str(retry_after_s)}
    error = {"message": message, "type": status.phrase, "param": None, "code": status.value}
    return JSONResponse({"error": error}, status, headers)
