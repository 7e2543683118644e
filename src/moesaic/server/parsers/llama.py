"""Calls of Llama 3.1, 3.2 and 3.3: the answer is a JSON object.

Format: the chat template of meta-llama/Llama-3.1-8B-Instruct, `{"name": ..., "parameters": {...}}`, after
`<|python_tag|>` or not. The template takes one call per turn; models write several with `;` between them now and then.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from moesaic.server.conversation import Tool
from moesaic.server.parsers.base import Call, Terminal, ToolStyle, Verdict
from moesaic.server.parsers.rules import alternatives, call_object
from moesaic.server.parsers.values import call_of, load_prefix

__all__ = ["Llama"]

_TAG = "<|python_tag|>"
_BETWEEN = re.compile(r"[\s;,]*")


class Llama(ToolStyle):
    """A JSON object that is the whole answer and names a tool; other objects are text."""

    name = "llama"
    openers = (_TAG, "{")
    only_at_start = True
    calls_first = True
    single_calls = True

    def read(self, block: str, tools: Mapping[str, Tool]) -> list[Call] | Verdict:
        """One object or several."""
        rest, calls = block.removeprefix(_TAG), []
        while rest:
            loaded = load_prefix(rest)
            if isinstance(loaded, str):
                return loaded
            value, end = loaded
            call = call_of(value, ("parameters", "arguments"))
            if call is None or call.name not in tools or not value.keys() & {"parameters", "arguments"}:
                return "malformed"
            calls.append(call)
            rest = rest[end:]
            rest = rest[_BETWEEN.match(rest).end() :]  # type: ignore[union-attr]  # it matches the empty text
        return calls or "malformed"

    def start_of_calls(self) -> str:
        """Nothing: the object itself."""
        return ""

    def grammar(self, tools: Sequence[Tool], parallel: bool, terminal: Terminal, first: str) -> str | None:
        """One object."""
        rules = [f"calls: {alternatives('call', len(tools))}"]
        return "\n".join(
            rules + [f"call_{index}: {call_object(tool, 'parameters')}" for index, tool in enumerate(tools)]
        )
