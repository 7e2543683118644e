r"""Calls as JSON objects between `<tool_call>` and `</tool_call>`: Hermes 2 and 3, Qwen 2.5 and 3, and many others.

Format: the chat templates of NousResearch/Hermes-3-Llama-3.1-8B and Qwen/Qwen3-30B-A3B:
`<tool_call>\n{"name": ..., "arguments": {...}}\n</tool_call>`, one pair of tags per call.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from moesaic.server.conversation import Tool
from moesaic.server.parsers.base import Call, Terminal, ToolStyle, Verdict
from moesaic.server.parsers.rules import alternatives, call_object
from moesaic.server.parsers.values import call_of, load_json

__all__ = ["Hermes"]


class Hermes(ToolStyle):
    """JSON between tags."""

    name = "hermes"
    openers = ("<tool_call>",)
    closers = ("</tool_call>",)

    def read(self, block: str, tools: Mapping[str, Tool]) -> list[Call] | Verdict:
        """One object; the closing tag may stand inside of a string of it."""
        body = block.removeprefix(self.openers[0])
        loaded = load_json(body.removesuffix(self.closers[0]))
        if isinstance(loaded, str):
            return loaded
        call = call_of(loaded[0])
        return [call] if call is not None else "malformed"

    def grammar(self, tools: Sequence[Tool], parallel: bool, terminal: Terminal, first: str) -> str | None:
        """An object of the tool's schema between the tags, and further ones on new lines."""
        opener, closer = terminal(self.openers[0]), terminal(self.closers[0])
        more = f'("\\n" {opener} body)*' if parallel else ""
        rules = [f"calls: {first} body {more}", f'body: "\\n" {alternatives("call", len(tools))} "\\n" {closer}']
        rules += [f"call_{index}: {call_object(tool)}" for index, tool in enumerate(tools)]
        return "\n".join(rules)
