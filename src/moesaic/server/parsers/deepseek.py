r"""Calls of DeepSeek V3, R1 and V3.1, between special tokens with full-width bars.

Format: model cards and chat templates of deepseek-ai/DeepSeek-V3-0324 and DeepSeek-R1-0528, a type, a name and fenced
JSON: `<｜tool▁call▁begin｜>function<｜tool▁sep｜>NAME\n```json\n{...}\n```<｜tool▁call▁end｜>`; and of
deepseek-ai/DeepSeek-V3.1: `<｜tool▁call▁begin｜>NAME<｜tool▁sep｜>{...}<｜tool▁call▁end｜>`. Either way all calls of a
turn stand between `<｜tool▁calls▁begin｜>` and `<｜tool▁calls▁end｜>`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from moesaic.server.conversation import Tool
from moesaic.server.parsers.base import Call, Terminal, ToolStyle, Verdict
from moesaic.server.parsers.rules import arguments_schema, json_rule, quote
from moesaic.server.parsers.values import load_json

__all__ = ["DeepSeek", "DeepSeekFenced"]

_SECTION, _SECTION_END = "<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>"
_CALL, _SEPARATOR, _CALL_END = "<｜tool▁call▁begin｜>", "<｜tool▁sep｜>", "<｜tool▁call▁end｜>"
_FENCED = re.compile(r"([^\n]+)\n\s*```(?:json)?\s*(.*?)\s*(?:```\s*)?", re.DOTALL)


class DeepSeek(ToolStyle):
    """V3.1: a name and JSON."""

    name = "deepseek"
    openers = (_CALL,)
    closers = (_CALL_END,)
    noise = (_SECTION, _SECTION_END)
    inner = (_SEPARATOR,)

    def read(self, block: str, tools: Mapping[str, Tool]) -> list[Call] | Verdict:
        """One call of either form."""
        head, found, body = block.removeprefix(_CALL).removesuffix(_CALL_END).partition(_SEPARATOR)
        if not found:
            return "malformed"
        name, arguments = head.strip(), body.strip()
        if name == "function" and (fenced := _FENCED.fullmatch(body.strip())):
            name, arguments = fenced[1].strip(), fenced[2]
        loaded = load_json(arguments)
        if isinstance(loaded, str):
            return loaded
        return [Call(name, arguments)] if name and isinstance(loaded[0], dict) else "malformed"

    def start_of_calls(self) -> str:
        """The section's beginning."""
        return _SECTION

    def grammar(self, tools: Sequence[Tool], parallel: bool, terminal: Terminal, first: str) -> str | None:
        """A section with calls without blanks between them."""
        names = " | ".join(f"call_{index}" for index in range(len(tools)))
        rules = [f"calls: {first} call{'+' if parallel else ''} {terminal(_SECTION_END)}"]
        rules.append(f"call: {terminal(_CALL)} ({names}) {terminal(_CALL_END)}")
        rules += [f"call_{index}: {self._body(tool, terminal)}" for index, tool in enumerate(tools)]
        return "\n".join(rules)

    def _body(self, tool: Tool, terminal: Terminal) -> str:
        return f"{quote(tool.name)} {terminal(_SEPARATOR)} {json_rule(arguments_schema(tool))}"


class DeepSeekFenced(DeepSeek):
    """V3 and R1: a type, a name and fenced JSON."""

    name = "deepseek_fenced"

    def _body(self, tool: Tool, terminal: Terminal) -> str:
        head, tail = quote(f"{tool.name}\n```json\n"), quote("\n```")
        return f'"function" {terminal(_SEPARATOR)} {head} {json_rule(arguments_schema(tool))} {tail}'
