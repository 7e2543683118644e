"""Values in calls: JSON as models write it, and text that a tool's schema gives a type."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NoReturn

from moesaic.errors import RequestError
from moesaic.server.conversation import Tool
from moesaic.server.parsers.base import Call, Verdict

__all__ = ["call_of", "dump_json", "kinds_of", "load_json", "load_prefix", "property_schema", "renamed", "typed_value"]


_MAX_DEPTH = 64
_WORDS = """
    type properties required items description enum anyOf oneOf allOf const default title format minimum maximum
    additionalProperties minLength maxLength pattern minItems maxItems $ref $defs definitions nullable
"""
_SCHEMA_WORDS = frozenset(_WORDS.split())
_TYPES = frozenset(("string", "number", "integer", "boolean", "object", "array", "null"))


def _refuse_constant(text: str) -> NoReturn:
    raise ValueError(f"{text} is no JSON")


_DECODER = json.JSONDecoder(parse_constant=_refuse_constant)


def load_prefix(text: str) -> tuple[Any, int] | Verdict:
    """The JSON value that a text begins with, blanks before it allowed, and where it ends."""
    start = len(text) - len(text.lstrip())
    try:
        return _DECODER.raw_decode(text, start)
    except json.JSONDecodeError as error:
        open_string = error.msg.startswith("Unterminated string")
        return "incomplete" if open_string or error.pos >= len(text.rstrip()) else "malformed"
    except (ValueError, RecursionError):
        return "malformed"


def load_json(text: str) -> tuple[Any] | Verdict:
    """The JSON value that a text is, in a tuple."""
    result = load_prefix(text)
    if isinstance(result, str):
        return result
    value, end = result
    return "malformed" if text[end:].strip() else (value,)


def dump_json(value: Any) -> str:
    """JSON text as templates write it."""
    return json.dumps(value, ensure_ascii=False)


def call_of(value: Any, arguments_keys: Sequence[str] = ("arguments", "parameters")) -> Call | None:
    """The call that an object with `name` and arguments means; None if it means none.

    Args:
        value: decoded JSON; its arguments may be an object, the JSON text of one, or missing.
        arguments_keys: fields, the first of which that is there holds the arguments.
    """
    if not isinstance(value, dict):
        return None
    name, identity = value.get("name"), value.get("id")
    arguments: Any = next((value[key] for key in arguments_keys if key in value), {})
    if isinstance(arguments, str):
        decoded = load_json(arguments)
        if isinstance(decoded, str):
            return None
        (arguments,) = decoded
    if not isinstance(name, str) or not name or not isinstance(arguments, dict):
        return None
    return Call(name, dump_json(arguments), identity if isinstance(identity, str) else None)


def property_schema(tool: Tool | None, name: str) -> Mapping[str, Any]:
    """The schema of a tool's argument; an empty one, which allows everything, if it has none."""
    properties = tool.parameters.get("properties") if tool is not None else None
    schema = properties.get(name) if isinstance(properties, Mapping) else None
    return schema if isinstance(schema, Mapping) else {}


def typed_value(text: str, schema: Mapping[str, Any]) -> Any:
    """The value that a text without quotes means where a schema is known.

    A text stays one where the schema says so. Otherwise it is read as JSON, and is a text again if it is none or has a
    type that the schema does not allow. Python's spelling of the constants is understood too.
    """
    kinds = kinds_of(schema)
    if kinds == {"string"}:
        return text
    stripped = text.strip()
    constants = {"True": True, "False": False, "None": None}
    loaded = (constants[stripped],) if stripped in constants else load_json(stripped)
    if isinstance(loaded, str):
        return text
    (value,) = loaded
    if not kinds or _kind(value) & kinds:
        return value if kinds or not isinstance(value, str) else text
    return text


def renamed(value: Any, rename: Callable[[str], str], depth: int = 0) -> Any:
    """A value of JSON with all its texts renamed, keys included, but for the words of JSON schema."""
    if depth > _MAX_DEPTH:
        raise RequestError(f"a value is nested deeper than {_MAX_DEPTH} levels.", "tools")
    if isinstance(value, str):
        return value if value in _TYPES else rename(value)
    if isinstance(value, Mapping):
        result: dict[str, Any] = {}
        for key, item in value.items():
            new = key if key in _SCHEMA_WORDS else rename(str(key))
            while new in result:  # blotted out, two of them may become the same
                new += f"x{len(result)}"
            result[new] = renamed(item, rename, depth + 1)
        return result
    if isinstance(value, (list, tuple)):
        return [renamed(item, rename, depth + 1) for item in value]
    return value if value is None or isinstance(value, (bool, int, float)) else rename(str(value))


def _kind(value: Any) -> set[str]:
    if isinstance(value, bool):
        return {"boolean"}
    if isinstance(value, int):
        return {"integer", "number"}
    if isinstance(value, float):
        return {"number", "integer"} if value.is_integer() else {"number"}
    if isinstance(value, dict):
        return {"object"}
    if isinstance(value, list):
        return {"array"}
    return {"null"} if value is None else {"string"}


def kinds_of(schema: Mapping[str, Any]) -> set[str]:
    """The types that a schema allows; none if it does not say."""
    kind = schema.get("type")
    if isinstance(kind, str):
        return {kind}
    if isinstance(kind, Sequence):
        return {each for each in kind if isinstance(each, str)}
    for key in ("enum", "const"):
        if key in schema:
            values = schema[key] if key == "enum" and isinstance(schema[key], Sequence) else [schema[key]]
            return set().union(*(_kind(value) for value in values))
    kinds: set[str] = set()
    for key in ("anyOf", "oneOf", "allOf"):
        parts = schema.get(key)
        for part in parts if isinstance(parts, Sequence) and not isinstance(parts, str) else ():
            kinds |= kinds_of(part) if isinstance(part, Mapping) else set()
    return kinds
