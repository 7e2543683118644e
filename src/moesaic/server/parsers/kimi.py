"""Calls of Kimi K2, between special tokens.

Format: docs/tool_call_guidance.md and chat template of moonshotai/Kimi-K2-Instruct:
`<|tool_call_begin|>functions.NAME:NUMBER<|tool_call_argument_begin|>{...}<|tool_call_end|>`, all calls of a turn
between `<|tool_calls_section_begin|>` and `<|tool_calls_section_end|>`. What stands before the arguments is the call's
id; its number counts all calls of a conversation.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from moesaic.server.conversation import Tool
from moesaic.server.parsers.base import Call, Terminal, ToolStyle, Verdict
from moesaic.server.parsers.rules import alternatives, arguments_rule, quote
from moesaic.server.parsers.values import load_json

__all__ = ["Kimi"]

_SECTION, _SECTION_END = "<|tool_calls_section_begin|>", "<|tool_calls_section_end|>"
_CALL, _ARGUMENTS, _CALL_END = "<|tool_call_begin|>", "<|tool_call_argument_begin|>", "<|tool_call_end|>"
_ID = re.compile(r"(?:functions\.)?([\w.-]+?)(?::\d+)?")


class Kimi(ToolStyle):
    """An id and JSON."""

    name = "kimi"
    openers = (_CALL,)
    closers = (_CALL_END,)
    noise = (_SECTION, _SECTION_END)
    inner = (_ARGUMENTS,)

    def read(self, block: str, tools: Mapping[str, Tool]) -> list[Call] | Verdict:
        """One call."""
        head, found, body = block.removeprefix(_CALL).removesuffix(_CALL_END).partition(_ARGUMENTS)
        name = _ID.fullmatch(head.strip())
        if not found or name is None:
            return "malformed"
        loaded = load_json(body)
        if isinstance(loaded, str):
            return loaded
        identity = head.strip() if ":" in head else None
        return [Call(name[1], body.strip(), identity)] if isinstance(loaded[0], dict) else "malformed"

    def start_of_calls(self) -> str:
        """The section's beginning."""
        return _SECTION

    def new_id(self, name: str, count: int) -> str:
        """As the model writes them."""
        return f"functions.{name}:{count}"

    def grammar(self, tools: Sequence[Tool], parallel: bool, terminal: Terminal, first: str) -> str | None:
        """A section with calls without blanks between them."""
        rules = [f"calls: {first} body{'+' if parallel else ''} {terminal(_SECTION_END)}", "NUMBER: /[0-9]{1,4}/"]
        rules.append(f"body: {terminal(_CALL)} {alternatives('call', len(tools))} {terminal(_CALL_END)}")
        for index, tool in enumerate(tools):
            head = f"{quote(f'functions.{tool.name}:')} NUMBER {terminal(_ARGUMENTS)}"
            rules.append(f"call_{index}: {head} {arguments_rule(tool)}")
        return "\n".join(rules)
