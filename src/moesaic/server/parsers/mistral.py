"""Calls of Mistral's models after `[TOOL_CALLS]`.

Format: mistral-common's instruct tokenizers and the chat templates of mistralai: up to version 7 (Mixtral 8x22B,
Nemo) a list, `[TOOL_CALLS][{"name": ..., "arguments": {...}, "id": ...}]`; from version 11 on (Small 3.2, Devstral,
Magistral, Ministral 3) `[TOOL_CALLS]NAME[ARGS]{...}` for every call, `[CALL_ID]` and an id before the arguments in
some. Ids are nine letters or digits.
"""

from __future__ import annotations

import hashlib
import re
import secrets
import string
from collections.abc import Mapping, Sequence

from moesaic.server.conversation import Tool
from moesaic.server.parsers.base import Call, Terminal, ToolStyle, Verdict
from moesaic.server.parsers.rules import (
    alternatives,
    arguments_rule,
    quote,
)
from moesaic.server.parsers.values import call_of, load_json, load_prefix

__all__ = ["Mistral", "MistralList"]

_OPENER, _ID, _ARGUMENTS = "[TOOL_CALLS]", "[CALL_ID]", "[ARGS]"
_LETTERS = string.ascii_letters + string.digits
_HEAD = re.compile(r"([\w.-]+)\s*(?:\[CALL_ID\]\s*([A-Za-z0-9]*))?\s*(?:\[ARGS\]\s*)?(?=\{)")
_NINE = re.compile(r"[A-Za-z0-9]{9}")


class Mistral(ToolStyle):
    """Version 11 and later: a marker, a name and JSON."""

    name = "mistral"
    openers = (_OPENER,)
    inner = (_ID, _ARGUMENTS)

    def read(self, block: str, tools: Mapping[str, Tool]) -> list[Call] | Verdict:
        """Calls of either form, up to the answer's end."""
        calls: list[Call] = []
        rest = block
        while rest:
            if not rest.startswith(_OPENER):
                return "malformed"
            rest = rest.removeprefix(_OPENER).lstrip()
            found = _list(rest) if rest.startswith("[") and not calls else _single(rest)
            if isinstance(found, str):
                return found
            more, rest = found
            calls += more
        return calls or "malformed"

    def new_id(self, name: str, count: int) -> str:
        """Nine letters or digits."""
        return "".join(secrets.choice(_LETTERS) for _ in range(9))

    def history_id(self, call_id: str) -> str:
        """The id itself if it has the form, otherwise one that follows from it."""
        if _NINE.fullmatch(call_id):
            return call_id
        return "".join(_LETTERS[byte % len(_LETTERS)] for byte in hashlib.sha256(call_id.encode()).digest()[:9])

    def grammar(self, tools: Sequence[Tool], parallel: bool, terminal: Terminal, first: str) -> str | None:
        """A marker, a name, perhaps an id, and JSON, for every call."""
        more = f"({terminal(_OPENER)} body)*" if parallel else ""
        rules = [f"calls: {first} body {more}", f"body: {alternatives('call', len(tools))}", "ID: /[A-Za-z0-9]{9}/"]
        for index, tool in enumerate(tools):
            head = f"{quote(tool.name)} ({terminal(_ID)} ID)? {terminal(_ARGUMENTS)}"
            rules.append(f"call_{index}: {head} {arguments_rule(tool)}")
        return "\n".join(rules)


class MistralList(Mistral):
    """Up to version 7: a list of objects."""

    name = "mistral_list"

    def grammar(self, tools: Sequence[Tool], parallel: bool, terminal: Terminal, first: str) -> str | None:
        """A marker and a list; an id behind the arguments is allowed."""
        more = '(", " body)*' if parallel else ""
        rules = [f'calls: {first} "[" body {more} "]"', f"body: {alternatives('call', len(tools))}"]
        rules.append(r"ID: /[A-Za-z0-9]{9}/")
        for index, tool in enumerate(tools):
            head = quote('{"name": "' + tool.name + '", "arguments": ')
            tail = r'''(", \"id\": \"" ID "\"")? "}"'''
            rules.append(f"call_{index}: {head} {arguments_rule(tool)} {tail}")
        return "\n".join(rules)


def _list(text: str) -> tuple[list[Call], str] | Verdict:
    loaded = load_json(text)
    if isinstance(loaded, str):
        return loaded
    calls = [call_of(value) for value in loaded[0]]
    found = [call for call in calls if call is not None]
    return (found, "") if len(found) == len(calls) else "malformed"


def _single(text: str) -> tuple[list[Call], str] | Verdict:
    """One call, and what follows it. Some models leave the marker between name and arguments out."""
    head = _HEAD.match(text)
    loaded = load_prefix(text[head.end() :]) if head is not None else "malformed"
    if head is None or isinstance(loaded, str):
        return loaded if isinstance(loaded, str) else "malformed"
    value, size = loaded
    if not isinstance(value, dict):
        return "malformed"
    end = head.end() + size
    return [Call(head[1], text[head.end() : end].strip(), head[2] or None)], text[end:].lstrip()
