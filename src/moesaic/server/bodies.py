"""Bodies of requests: read within limits, decoded strictly, refused with the name of the field that is wrong.

It does not know what the fields mean.
"""

from __future__ import annotations

import re
from typing import Any, TypeVar

import msgspec
from starlette.requests import Request

from moesaic.server.errors import ApiError

__all__ = ["read_body", "refuse_unsupported"]

T = TypeVar("T")
_PLACE = re.compile(r"JSON is malformed: (.+) \(byte (\d+)\)")


async def read_body(request: Request, kind: type[T]) -> T:
    """The JSON body as a msgspec type; fields that the type does not have are ignored.

    Raises:
        ApiError: 400 with the field concerned, if the body is no JSON or a field has another type than it should.
    """
    raw = await request.body()
    try:
        return msgspec.json.decode(raw, type=kind)
    except msgspec.ValidationError as error:
        message, _, where = str(error).partition(" - at `")
        param = where.rstrip("`").rpartition("$")[2].removeprefix(".") or None  # also of "`key` in `$.field`"
        raise ApiError(400, f"{param or 'the body'}: {message}.", param=param) from None
    except UnicodeDecodeError as error:
        raise ApiError(400, f"the body is not valid JSON: a text is not UTF-8 ({error.reason}).") from None
    except (msgspec.DecodeError, RecursionError) as error:
        raise ApiError(400, f"the body is not valid JSON{_reason(str(error))}.") from None


def _reason(message: str) -> str:
    """What msgspec found, and where."""
    if message == "Input data was truncated":  # also said of half a surrogate pair
        return ": it ends too early, or a text holds half a surrogate pair"
    found = _PLACE.fullmatch(message)
    return f": {found[1]} at byte {found[2]}" if found else ""


def refuse_unsupported(body: Any, defaults: dict[str, tuple[Any, ...]]) -> None:
    """Refuse fields that would change the answer and are not supported.

    Args:
        body: a decoded body.
        defaults: of each such field, the values that ask for nothing.

    Raises:
        ApiError: 400 naming the first field with another value.
    """
    for name, harmless in defaults.items():
        value = getattr(body, name)
        if value is not msgspec.UNSET and not any(type(value) is type(each) and value == each for each in harmless):
            raise ApiError(
                400, f"{name} is not supported by this server: leave it out.", param=name, code="unsupported"
            )
