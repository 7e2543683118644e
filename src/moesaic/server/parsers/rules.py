"""Parts of Lark grammars (llguidance's dialect) that several styles of calls share.

Every grammar that these parts stand in has the terminals `TEXT` (anything) and `BLANKS` (a few blanks, or none).
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from moesaic.engine.serving.grammar_checks import check_grammar
from moesaic.engine.serving.params import Grammar
from moesaic.errors import RequestError
from moesaic.server.conversation import Tool
from moesaic.server.parsers.base import Terminal
from moesaic.server.parsers.markers import find_any
from moesaic.server.parsers.values import kinds_of

__all__ = [
    "alternatives",
    "arguments_rule",
    "call_object",
    "json_rule",
    "marker_terminal",
    "parameters",
    "quote",
    "until",
]


def quote(text: str) -> str:
    """A Lark string."""
    return json.dumps(text, ensure_ascii=False)


def marker_terminal(special: Mapping[str, int]) -> Terminal:
    """Writes texts such that special tokens in them are named by number: text never matches these."""
    pattern = find_any(special)

    def terminal(text: str) -> str:
        parts, end = [], 0
        for found in pattern.finditer(text):
            parts += [text[end : found.start()], found[0]]
            end = found.end()
        parts = [part for part in (*parts, text[end:]) if part]
        return " ".join(f"<[{special[part]}]>" if part in special else quote(part) for part in parts)

    return terminal


def until(text: str, terminal: Terminal) -> str:
    """What follows a rule's name: anything up to a text, and the text."""
    written = terminal(text)
    head, number, rest = written.partition("<[")
    if not number:
        return f"[lazy]: TEXT {quote(text)}"
    before = re.escape(json.loads(head)).replace("/", "\\/") if head else ""
    return f": /(.|\\n)*{before}/ {number}{rest}"


def json_rule(schema: Any, *, lenient: bool = False) -> str:
    """What stands for JSON of a schema.

    Args:
        schema: as JSON has it.
        lenient: leave out what llguidance cannot enforce; otherwise the engine refuses the request for it.
    """
    if not isinstance(schema, Mapping):
        schema = {} if schema is True else {"not": {}}
    guidance = {"lenient": lenient, "whitespace_pattern": r"[\x20\x0A\x0D\x09]{1,80}"}  # not blanks for ever
    return f"%json {json.dumps({**schema, 'x-guidance': guidance})}"


def arguments_rule(tool: Tool) -> str:
    """What stands for a tool's arguments: JSON of an object in any case.

    Raises:
        RequestError: the tool is strict, and its schema is too large or refers to other documents.
    """
    schema = {**tool.parameters}
    schema.setdefault("type", "object")
    return _checked_rule(schema, tool)


def _checked_rule(schema: dict[str, Any], tool: Tool) -> str:
    try:
        check_grammar(Grammar("json_schema", json.dumps(schema)))
    except RequestError as error:
        if tool.strict:
            raise RequestError(f"tool {tool.name!r}: {error}", "tools") from None
        schema = {key: value for key, value in schema.items() if key == "type"}
    return json_rule(schema, lenient=not tool.strict)


def call_object(tool: Tool, arguments_key: str = "arguments") -> str:
    """An object with a tool's name and its arguments, spelt as templates do."""
    head = '{"name": ' + json.dumps(tool.name) + f', "{arguments_key}": '
    return f"{quote(head)} {arguments_rule(tool)} {quote('}')}"


def alternatives(name: str, count: int) -> str:
    """One of the rules NAME_0, NAME_1, ..."""
    return "(" + " | ".join(f"{name}_{index}" for index in range(count)) + ")"


def parameters(
    tool: Tool, index: int, before: Callable[[str, bool], str], after: str, terminal: Terminal, gap: str = ""
) -> tuple[str, list[str]]:
    """Arguments written one by one, as text where the schema says that they are texts, and as JSON otherwise.

    Args:
        tool: whose arguments.
        index: of the tool, for the names of rules.
        before: what stands before a value (Lark), for the argument's name and whether it is written as text.
        after: what stands behind a value.
        terminal: says how markers are written.
        gap: what may follow (Lark).

    Returns:
        What stands for all arguments, in the order of the schema, optional ones left out or not; and the rules that
        this needs.
    """
    properties = tool.parameters.get("properties")
    properties = properties if isinstance(properties, Mapping) else {}
    required = tool.parameters.get("required", ())
    required = required if isinstance(required, Sequence) else ()
    names, rules = [], [f"text_{index}{until(after, terminal)}"]
    for number, (name, schema) in enumerate(properties.items()):
        rule = f"argument_{index}_{number}"
        value = _value(schema if isinstance(schema, Mapping) else {}, tool)
        tail = f"text_{index}" if value is None else f"{value} {terminal(after)}"
        rules.append(f"{rule}: {before(name, value is None or not value.startswith('%json'))} {tail} {gap}")
        names.append(rule if name in required else f"{rule}?")
    return " ".join(names), rules


def _value(schema: Mapping[str, Any], tool: Tool) -> str | None:
    """What stands for a value; None for any text."""
    enum = schema.get("enum")
    if isinstance(enum, Sequence) and enum and all(isinstance(each, str) and each for each in enum):
        return "(" + " | ".join(map(quote, enum)) + ")"
    kinds = kinds_of(schema)
    if not kinds or "string" in kinds:
        return None
    shared = {key: tool.parameters[key] for key in ("$defs", "definitions") if key in tool.parameters}
    return _checked_rule({**schema, **shared}, tool)
