"""Forms that a text is made to have: OpenAI's `response_format`, and what open servers have beside it.

It does not know how they are enforced.
"""

from __future__ import annotations

import re
from typing import Any, Literal

import msgspec
from msgspec import Struct

from moesaic.engine.serving.params import Grammar
from moesaic.server.errors import ApiError

__all__ = [
    "ResponseFormat",
    "SchemaFormat",
    "StructuredOutputs",
    "format_grammar",
    "named_grammars",
    "schema_grammar",
]


class SchemaFormat(Struct, kw_only=True):
    """A JSON schema; text keeps to it whether it is `strict` or not."""

    name: str
    schema: dict[str, Any] | None = None
    description: str | None = None
    strict: bool | None = None


class ResponseFormat(Struct, kw_only=True):
    """Form of the text; `schema` beside "json_object" is llama.cpp's way."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: SchemaFormat | None = None
    schema: dict[str, Any] | None = None


class StructuredOutputs(Struct, kw_only=True):
    """What the text has to look like, in vLLM's form: one of these.

    Attributes:
        json: a schema, as JSON or as its text.
        json_object: any JSON object.
        regex: an expression that the whole text matches.
        choice: one of these texts.
        grammar: in Lark's form, as llguidance reads it.
    """

    json: dict[str, Any] | str | None = None
    json_object: bool | None = None
    regex: str | None = None
    choice: list[str] | None = None
    grammar: str | None = None


def schema_grammar(schema: Any) -> Grammar:
    """The grammar of a JSON schema, given as JSON or as its text."""
    return Grammar("json_schema", schema if isinstance(schema, str) else msgspec.json.encode(schema).decode())


def format_grammar(form: ResponseFormat | None) -> Grammar | None:
    """What `response_format` says of the text.

    Raises:
        ApiError: there is no schema where there has to be one.
    """
    if form is None or form.type == "text":
        return None
    if form.type == "json_object":
        return Grammar("json_object") if form.schema is None else schema_grammar(form.schema)
    if form.json_schema is None or form.json_schema.schema is None:
        where = "response_format.json_schema.schema"
        raise ApiError(400, f"{where} is missing: expected a JSON schema.", param=where)
    return schema_grammar(form.json_schema.schema)


def named_grammars(
    prefix: str, schema: dict[str, Any] | str | None, regex: str | None, choice: list[str] | None, lark: str | None
) -> list[tuple[str, Grammar]]:
    """Name of the field and grammar for each that is given; fields have the same names in all such groups.

    Raises:
        ApiError: there are no texts to choose from.
    """
    found = []
    if schema is not None:
        found.append((prefix + "json", schema_grammar(schema)))
    if regex is not None:
        found.append((prefix + "regex", Grammar("regex", regex)))
    if choice is not None:
        if not choice:
            raise ApiError(400, f"{prefix}choice is empty: expected texts to choose from.", param=prefix + "choice")
        found.append((prefix + "choice", Grammar("regex", "|".join(f"(?:{re.escape(each)})" for each in choice))))
    if lark is not None:
        found.append((prefix + "grammar", Grammar("lark", lark)))
    return found
