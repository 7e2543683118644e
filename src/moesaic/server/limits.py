"""What a request may cost before anything is computed for it: bytes, time, depth and numbers of things.

The whole body is read here, within its limits, and looked at without building objects from it, so that whatever decodes
it later meets no depth and no numbers that are a trouble. Of the fields it knows only names that all APIs share; what
has another type than expected is left to who decodes it.
"""

from __future__ import annotations

import asyncio
import re
from itertools import accumulate
from typing import Any

import msgspec
from starlette.datastructures import Headers
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from moesaic.server.access import exchange_of
from moesaic.server.errors import ApiError
from moesaic.server.options import Limits

__all__ = ["Limited", "check_body", "check_depth"]

# Possessive, and never without a match: linear in the length, whatever the bytes are.
_STRING = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+"?', re.DOTALL)
_TO_STEPS = bytes.maketrans(b"[]{}", b"\x01\xff\x01\xff")  # as signed bytes: one deeper, one less deep
_NO_BRACKETS = bytes(each for each in range(256) if each not in b"[]{}")
_LINGER_SECONDS = 2.0
_RETRY_SECONDS = 2.0


class _Counted(msgspec.Struct):
    """Fields whose numbers or sizes are limited, of all APIs; no bytes where there is none."""

    messages: msgspec.Raw = msgspec.Raw()
    input: msgspec.Raw = msgspec.Raw()
    n: msgspec.Raw = msgspec.Raw()
    best_of: msgspec.Raw = msgspec.Raw()
    stop: msgspec.Raw = msgspec.Raw()
    stop_sequences: msgspec.Raw = msgspec.Raw()
    logit_bias: msgspec.Raw = msgspec.Raw()
    tools: msgspec.Raw = msgspec.Raw()
    response_format: msgspec.Raw = msgspec.Raw()
    text: msgspec.Raw = msgspec.Raw()
    format: msgspec.Raw = msgspec.Raw()
    options: msgspec.Raw = msgspec.Raw()


def check_depth(raw: bytes, limit: int) -> None:
    """Refuse JSON whose objects and lists are nested too deeply; takes time in proportion to its length.

    Raises:
        ApiError: 400.
    """
    if raw.count(b"[") + raw.count(b"{") <= limit:
        return
    steps = memoryview(_STRING.sub(b"", raw).translate(_TO_STEPS, _NO_BRACKETS)).cast("b")
    if max(accumulate(steps), default=0) > limit:
        raise ApiError(400, f"the body is nested too deeply: at most {limit} levels.", code="too_deep")


def check_body(raw: bytes, limits: Limits) -> None:
    """Refuse a JSON body with too many or too large parts; anything that is no JSON object passes.

    Raises:
        ApiError: 400 with the field concerned.
    """
    check_depth(raw, limits.depth)
    counted = _decode(raw, _Counted)
    if counted is None:
        return
    _check_length("messages", counted.messages, limits.messages, list)
    _check_length("input", counted.input, limits.messages, list)
    _check_length("tools", counted.tools, limits.tools, list)
    _check_length("logit_bias", counted.logit_bias, limits.biases, dict)
    for name in ("n", "best_of"):
        number = _decode(getattr(counted, name), int)
        if number is not None and number > limits.choices:
            raise _too_much(name, f"is {number}: at most {limits.choices}")
    for name in ("stop", "stop_sequences"):
        _check_stops(name, getattr(counted, name), limits)
    for name in ("tools", "response_format", "format", "text"):
        part = getattr(counted, name)
        if len(bytes(part)) > limits.schema_bytes:
            raise _too_much(name, f"has {len(bytes(part))} bytes: at most {limits.schema_bytes}")
    options = _decode(counted.options, _Counted)
    if options is not None:
        _check_stops("options.stop", options.stop, limits)


def _check_length(name: str, part: msgspec.Raw, limit: int, kind: type) -> None:
    items = _decode(part, list[msgspec.Raw] if kind is list else dict[str, msgspec.Raw])
    if items is not None and len(items) > limit:
        raise _too_much(name, f"has {len(items)} entries: at most {limit}")


def _check_stops(name: str, part: msgspec.Raw, limits: Limits) -> None:
    _check_length(name, part, limits.stops, list)
    texts = _decode(part, list[str] | str)
    for text in [texts] if isinstance(texts, str) else texts or ():
        if len(text) > limits.stop_characters:
            raise _too_much(name, f"has a text of {len(text)} characters: at most {limits.stop_characters}")


def _too_much(name: str, what: str) -> ApiError:
    return ApiError(400, f"{name} {what}.", param=name, code="limit_exceeded")


def _decode(raw: bytes | msgspec.Raw, kind: Any) -> Any:
    """The value, or None if there is none or it has another type."""
    try:
        return msgspec.json.decode(raw, type=kind)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return None


class Limited:
    """Middleware that reads bodies and lets only so many requests in; cancels those whose client has left.

    Args:
        app: what follows.
        limits: of requests.
    """

    def __init__(self, app: ASGIApp, limits: Limits) -> None:
        self._app = app
        self._limits = limits
        self.running = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request.

        Raises:
            ApiError: 400, 408, 413, 429 or 431.
            ClientDisconnect: nobody waits for the answer any more.
        """
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        limits = self._limits
        if len(scope["headers"]) > limits.headers:
            raise ApiError(431, f"the request has more than {limits.headers} headers.", code="limit_exceeded")
        if scope["method"] != "POST":
            await self._app(scope, receive, send)
            return
        if self.running >= limits.requests:
            raise ApiError(
                429,
                f"{self.running} requests are under way already.",
                "rate_limit_error",
                code="overloaded",
                retry_after=_RETRY_SECONDS,
            )
        self.running += 1
        try:
            body = await self._read(scope, receive)
            check_body(body, limits)
            await _answer_while_wanted(self._app, scope, body, receive, send)
        finally:
            self.running -= 1

    async def _read(self, scope: Scope, receive: Receive) -> bytes:
        limits, exchange = self._limits, exchange_of(scope)
        announced = Headers(scope=scope).get("content-length", "")
        exchange.detached = True
        if announced.isdecimal() and int(announced) > limits.body_bytes:
            if "expect" not in Headers(scope=scope):
                await _drain(receive)
            raise self._too_large()
        parts, size = [], 0
        try:
            async with asyncio.timeout(limits.body_seconds):
                more = True
                while more:
                    part, more = await _next_part(receive)
                    parts.append(part)
                    size += len(part)
                    if size > limits.body_bytes:
                        break
        except TimeoutError:
            message = f"the body did not arrive within {limits.body_seconds:g} seconds."
            raise ApiError(408, message, code="body_timeout") from None
        if size > limits.body_bytes:
            parts.clear()
            await _drain(receive)
            raise self._too_large()
        exchange.detached = False
        return b"".join(parts)

    def _too_large(self) -> ApiError:
        message = f"the body is larger than {self._limits.body_bytes} bytes."
        return ApiError(413, message, "request_too_large", code="request_too_large")


async def _next_part(receive: Receive) -> tuple[bytes, bool]:
    """The next bytes of a body, and whether there are more."""
    message = await receive()
    if message["type"] == "http.disconnect":
        raise ClientDisconnect
    return message.get("body", b""), message.get("more_body", False)


async def _drain(receive: Receive) -> None:
    """Let a client go on sending for a moment: many read no answer before they have sent everything."""
    try:
        async with asyncio.timeout(_LINGER_SECONDS):
            while (await _next_part(receive))[1]:
                pass
    except TimeoutError:
        pass


async def _answer_while_wanted(app: ASGIApp, scope: Scope, body: bytes, receive: Receive, send: Send) -> None:
    """Give the body to the application, and cancel it if the client leaves before the answer begins.

    Afterwards whoever sends the answer hears of it from `receive`.
    """
    left, undelivered, begun, cancelled = asyncio.Event(), [body], False, False
    task = asyncio.current_task()
    assert task is not None

    async def replay() -> Message:
        if undelivered:
            return {"type": "http.request", "body": undelivered.pop(), "more_body": False}
        await left.wait()
        return {"type": "http.disconnect"}

    async def note_begin(message: Message) -> None:
        nonlocal begun
        begun = True
        await send(message)

    async def watch() -> None:
        nonlocal cancelled
        while (await receive())["type"] != "http.disconnect":
            pass
        left.set()
        if not begun:
            cancelled = True
            task.cancel()

    watching = asyncio.create_task(watch())
    try:
        await app(scope, replay, note_begin)
    except asyncio.CancelledError:
        if cancelled and task.uncancel() == 0:
            raise ClientDisconnect from None
        raise
    finally:
        watching.cancel()
