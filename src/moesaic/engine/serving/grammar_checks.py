"""What a grammar may be before anything is compiled: its size, and of JSON schemas depth, nodes and references.

It imports only the standard library, so that a server can refuse without an engine.
"""

from __future__ import annotations

import json
from typing import Any

from moesaic.engine.serving.params import Grammar
from moesaic.errors import RequestError

__all__ = ["PARAM", "check_grammar"]

PARAM = "response_format"
"""What errors about grammars name."""
MAX_BYTES = 128 << 10
MAX_DEPTH = 64
MAX_NODES = 20_000
_LITERALS = ("const", "enum", "default", "examples")
"""Keywords below which `$ref` is data."""


def check_grammar(grammar: Grammar) -> None:
    """Refuse a grammar that is too large, or a schema that is no JSON or needs other documents.

    Raises:
        RequestError: what was found and what is allowed.
    """
    size = len(grammar.text.encode("utf-8", "surrogatepass"))
    if size > MAX_BYTES:
        raise RequestError(f"the {grammar.kind} has {size} bytes: expected at most {MAX_BYTES}.", PARAM)
    if grammar.kind == "json_schema":
        _check_schema(_parse(grammar.text))


def _parse(text: str) -> Any:
    try:
        schema = json.loads(text)
    except RecursionError:
        raise RequestError(f"the schema is nested too deeply: expected at most {MAX_DEPTH} levels.", PARAM) from None
    except ValueError as error:
        raise RequestError(f"the schema is no JSON: {error}.", PARAM) from error
    if not isinstance(schema, dict | bool):
        raise RequestError("the schema is neither an object nor true or false.", PARAM)
    return schema


def _check_schema(schema: Any) -> None:
    nodes = 0
    todo = [(schema, 1, True)]  # value, depth, whether references in it are meant
    while todo:
        value, depth, live = todo.pop()
        nodes += 1
        if depth > MAX_DEPTH:
            raise RequestError(f"the schema is nested too deeply: expected at most {MAX_DEPTH} levels.", PARAM)
        if nodes > MAX_NODES:
            raise RequestError(f"the schema is too large: expected at most {MAX_NODES} values in it.", PARAM)
        if isinstance(value, dict):
            reference = value.get("$ref")
            if live and isinstance(reference, str) and not reference.startswith("#"):
                raise RequestError(
                    f"the schema refers to {reference[:100]!r}: only references within it ('#/...') are followed.",
                    PARAM,
                )
            todo.extend((item, depth + 1, live and key not in _LITERALS) for key, item in value.items())
        elif isinstance(value, list):
            todo.extend((item, depth + 1, live) for item in value)
