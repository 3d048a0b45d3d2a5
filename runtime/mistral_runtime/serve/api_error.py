"""Errors as OpenAI's clients expect them: a status and `{"error": {"message", "type", "param", "code"}}`."""

from __future__ import annotations

from typing import Any

from starlette.responses import JSONResponse

from mistral_runtime.errors import RequestError
from mistral_runtime.serve.engine_port import EngineUnavailable, QueueFull, RequestRefused

_TYPES = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}


class ClientGone(Exception):
    """The client closed its connection; there is nobody to answer."""


class ApiError(Exception):
    """A request that gets an error for an answer.

    Args:
        status: The HTTP status.
        message: What was expected and what was found, for people.
        param: The field it is about.
        code: For programs, such as `context_length_exceeded`.
        retry_after: Seconds after which it may go better.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        retry_after: int | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.param = param
        self.code = code
        self.retry_after = retry_after

    def body(self) -> dict[str, Any]:
        """Return the object that tells it."""
        kind = _TYPES.get(self.status, "server_error" if self.status >= 500 else "invalid_request_error")
        param = None if self.param is None else _encodable(self.param)
        return {"error": {"message": _encodable(self.message), "type": kind, "param": param, "code": self.code}}

    def headers(self) -> dict[str, str]:
        """Return the headers that belong to the status."""
        headers = {} if self.retry_after is None else {"retry-after": str(self.retry_after)}
        if self.status == 401:
            headers["www-authenticate"] = "Bearer"
        return headers

    def response(self) -> JSONResponse:
        """Return it as a whole response."""
        return JSONResponse(self.body(), self.status, headers=self.headers())


def _encodable(text: str) -> str:
    """Return the text with lone surrogates written out: JSON can hold them, UTF-8 cannot."""
    return text.encode("utf-8", "backslashreplace").decode()


def bad_request(message: str, *, param: str | None = None, code: str | None = None) -> ApiError:
    """Return the error for a request that cannot be served as it is."""
    return ApiError(400, message, param=param, code=code)


def as_api_error(error: Exception) -> ApiError | None:
    """Return what to answer for a failure that was foreseen; None for a bug."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, QueueFull):
        return ApiError(429, str(error), code="queue_full", retry_after=error.retry_after)
    if isinstance(error, EngineUnavailable):
        return ApiError(503, f"the model is not available: {error}", code="engine_unavailable", retry_after=5)
    if isinstance(error, RequestRefused):
        return engine_error(error.finished.error)
    if isinstance(error, RequestError):
        return bad_request(f"{error.what}: {error.detail}")
    return None


# What the engine calls a request's own fault, by the names of `mistral_runtime.errors`.
_REQUEST_KINDS = {"BadRequest", "BadSampling", "EmptyPrompt", "PromptTooLong"}


def engine_error(error: dict[str, str] | None) -> ApiError:
    """Return what to answer for an answer that the engine ended with an error."""
    said = error or {}
    message = ": ".join(filter(None, (said.get("what"), said.get("detail")))) or "the engine ended the answer"
    if said.get("kind") == "PromptTooLong":
        return bad_request(message, code="context_length_exceeded")
    if said.get("kind") in _REQUEST_KINDS:
        return bad_request(message)
    return ApiError(500, message, code="engine_error")
