"""Errors of requests as HTTP answers, in the form that each API's clients expect.

A library's exception never reaches a client: what is not one of ours becomes an internal error with a number that the
log has too.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from moesaic.errors import ContextError, EngineDeadError, GenerationError, OverloadedError, RequestError
from moesaic.server.operation import Style

__all__ = ["ApiError", "error_body", "to_api_error"]


@dataclass(slots=True)
class ApiError(Exception):
    """An answer with an error.

    Attributes:
        status: of HTTP.
        message: for people.
        kind: OpenAI's and Anthropic's `type`, such as "invalid_request_error".
        param: the field of the request concerned.
        code: OpenAI's `code`, such as "model_not_found".
        retry_after: seconds, for 429 and 503.
    """

    status: int
    message: str
    kind: str = "invalid_request_error"
    param: str | None = None
    code: str | None = None
    retry_after: float | None = None


def to_api_error(error: Exception) -> ApiError | None:
    """What an exception of ours means to a client; None if it is not one that a client may see."""
    match error:
        case ApiError():
            return error
        case ContextError():
            return ApiError(400, str(error), param=error.param, code="context_length_exceeded")
        case RequestError():
            return ApiError(400, str(error), param=error.param)
        case OverloadedError():
            return ApiError(429, str(error), "rate_limit_error", code="overloaded", retry_after=error.retry_after)
        case EngineDeadError():
            return ApiError(503, "the model is not available at the moment.", "api_error", code="engine_unavailable")
        case GenerationError():
            return ApiError(400, str(error))
    return None


_ANTHROPIC_KINDS = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
}


def error_body(error: ApiError, style: Style) -> dict[str, Any]:
    """The JSON of an error in an API's form."""
    if style == "anthropic":
        kind = _ANTHROPIC_KINDS.get(error.status, "invalid_request_error" if error.status < 500 else "api_error")
        return {"type": "error", "error": {"type": kind, "message": error.message}}
    if style == "ollama":
        return {"error": error.message}
    return {"error": {"message": error.message, "type": error.kind, "param": error.param, "code": error.code}}
