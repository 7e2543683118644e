"""Around every request: its number, one line in the log, its counts, and the answer if it fails.

The log has no contents: method, path without its query, status and times. It knows no API beyond the form of errors.
"""

from __future__ import annotations

import logging
import math
import re
import secrets
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

import msgspec
from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import ClientDisconnect
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from moesaic.server.errors import ApiError, error_body, to_api_error
from moesaic.server.operation import Style

__all__ = ["Access", "Exchange", "Recorder", "error_answer", "exchange_of"]

_LOG = logging.getLogger("moesaic.server")
_REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")
_CLIENT_LEFT = 499  # as nginx logs it; nobody is there to get it


@dataclass(slots=True)
class Exchange:
    """A request under way.

    Attributes:
        request_id: the client's if it gave a sane one.
        style: the form of its errors.
        route: the path of its operation, as the operation writes it; None as long as none is found.
        headers: that its answer gets beside its own.
        status: of its answer; 0 as long as there is none.
        quiet: nothing is logged of it, as with what is asked for again and again.
        detached: the body of the request was not read to its end, so the connection cannot be used again.
    """

    request_id: str
    style: Style
    route: str | None = None
    headers: list[tuple[str, str]] = field(default_factory=list)
    status: int = 0
    quiet: bool = False
    detached: bool = False


class Recorder(Protocol):
    """Counts requests."""

    def request(self, method: str, route: str | None, status: int, seconds: float) -> None:
        """One has been answered; `route` is None if no operation has its path."""
        ...


def exchange_of(scope: Scope) -> Exchange:
    """What belongs to a request, from the scope of it."""
    exchange: Exchange = scope["moesaic"]
    return exchange


class Access:
    """The outermost middleware.

    Args:
        app: what follows; what it raises becomes an answer.
        style_of: the form of errors at a path.
        recorder: counts.
    """

    def __init__(self, app: ASGIApp, style_of: Callable[[str], Style], recorder: Recorder) -> None:
        self._app = app
        self._style_of = style_of
        self._recorder = recorder

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request, whatever happens."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started = time.perf_counter()
        asked = Headers(scope=scope).get("x-request-id", "")
        request_id = asked if _REQUEST_ID.fullmatch(asked) else f"req_{secrets.token_hex(12)}"
        exchange = scope["moesaic"] = Exchange(request_id, self._style_of(scope["path"]))

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                exchange.status = message["status"]
                _add_headers(MutableHeaders(scope=message), exchange)
            await send(message)

        try:
            await self._app(scope, receive, send_with_headers)
        except Exception as error:
            await self._answer(error, scope, receive, send_with_headers)
        finally:
            seconds = time.perf_counter() - started
            status = exchange.status or _CLIENT_LEFT
            self._recorder.request(scope["method"], exchange.route, status, seconds)
            if not exchange.quiet or status not in (200, 503):
                _log(scope, exchange, status, seconds)

    async def _answer(self, error: Exception, scope: Scope, receive: Receive, send: Send) -> None:
        exchange = exchange_of(scope)
        if isinstance(error, ClientDisconnect):
            return
        answer = _to_answer(error, exchange)
        if exchange.status:  # its beginning has been sent: all that is left is not to send its end
            _LOG.error("%s broke off after its answer had begun: %s", exchange.request_id, answer.message)
            return
        await error_answer(answer, exchange.style)(scope, receive, send)


def error_answer(error: ApiError, style: Style) -> Response:
    """An error as JSON in an API's form, with the headers that go with its status."""
    headers = {"content-type": "application/json", "cache-control": "no-store"}
    if error.retry_after is not None:
        headers["retry-after"] = str(max(1, math.ceil(error.retry_after)))
    if error.status == 401:
        headers["www-authenticate"] = "Bearer"
    return Response(msgspec.json.encode(error_body(error, style)), error.status, headers)


def _to_answer(error: Exception, exchange: Exchange) -> ApiError:
    if isinstance(error, msgspec.ValidationError):
        return ApiError(400, f"{error}.")
    known = to_api_error(error)
    if known is not None:
        return known
    number = secrets.token_hex(8)
    _LOG.error("internal error %s of request %s", number, exchange.request_id, exc_info=error)
    message = f"something went wrong in the server; its log has it as {number}."
    return ApiError(500, message, "api_error", code="internal_error")


def _add_headers(headers: MutableHeaders, exchange: Exchange) -> None:
    headers["x-request-id"] = exchange.request_id
    if exchange.style == "anthropic":
        headers["request-id"] = exchange.request_id
    if exchange.detached:
        headers["connection"] = "close"
    for name, value in exchange.headers:
        headers.append(name, value)


def _log(scope: Scope, exchange: Exchange, status: int, seconds: float) -> None:
    path = exchange.route or ascii(scope["path"][:120])[1:-1]
    client = scope.get("client") or ("?", 0)
    fields = {
        "request_id": exchange.request_id,
        "client": client[0],
        "method": scope["method"],
        "path": path,
        "status": status,
        "seconds": round(seconds, 4),
    }
    text = "%(client)s %(method)s %(path)s %(status)d %(seconds).3fs %(request_id)s"
    _LOG.info(text, fields, extra={"fields": fields})
