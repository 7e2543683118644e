r"""Calls of DeepSeek V3, R1 and V3.1, between special tokens with full-width bars.

Format: model cards and chat templates of deepseek-ai/DeepSeek-V3-0324 and DeepSeek-R1-0528, a type, a name and fenced
JSON: `<｜tool▁call▁begin｜>function<｜tool▁sep｜>NAME\n```json\n{...}\n```<｜tool▁call▁end｜>`; and of
deepseek-ai/DeepSeek-V3.1: `<｜tool▁call▁begin｜>NAME<｜tool▁sep｜>{...}<｜tool▁call▁end｜>`. Either way all calls of a
turn stand between `<｜tool▁calls▁begin｜>` and `<｜tool▁calls▁end｜>`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence

from moesaic.server.conversation import Tool
from moesaic.server.parsers.base import Call, Terminal, ToolStyle, Verdict
from moesaic.server.parsers.rules import alternatives, arguments_rule, quote
from moesaic.server.parsers.values import dump_json, load_json, renamed

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
    describes_tools = True

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

    def instructions(self, tools: Sequence[Tool], rename: Callable[[str], str]) -> str:
        """A section per tool, then how to call them: the official templates leave both to the system's text."""
        parts = ["## Tools"]
        for tool in tools:
            schema = dump_json(renamed(tool.parameters or {"type": "object", "properties": {}}, rename))
            parts.append(f"### {rename(tool.name)}\nDescription: {rename(tool.description)}\n\nParameters: {schema}")
        call = self._example()
        parts.append(
            "To use tools, end your answer with calls in exactly this form, one after the other without blanks:\n"
            f"{_SECTION}{call}{_SECTION_END}\n"
            "tool_name is the name of a tool above, and tool_arguments is a JSON object that fits its parameters."
        )
        return "\n\n".join(parts)

    def _example(self) -> str:
        return f"{_CALL}tool_name{_SEPARATOR}tool_arguments{_CALL_END}"

    def start_of_calls(self) -> str:
        """The section's beginning."""
        return _SECTION

    def grammar(self, tools: Sequence[Tool], parallel: bool, terminal: Terminal, first: str) -> str | None:
        """A section with calls, which may be parted by a line break."""
        more = "(BREAK body)*" if parallel else ""
        rules = [f"calls: {first} body {more} {terminal(_SECTION_END)}", r"BREAK: /\n?/"]
        rules.append(f"body: {terminal(_CALL)} {alternatives('call', len(tools))} {terminal(_CALL_END)}")
        rules += [f"call_{index}: {self._body(tool, terminal)}" for index, tool in enumerate(tools)]
        return "\n".join(rules)

    def _body(self, tool: Tool, terminal: Terminal) -> str:
        return f"{quote(tool.name)} {terminal(_SEPARATOR)} {arguments_rule(tool)}"


class DeepSeekFenced(DeepSeek):
    """V3 and R1: a type, a name and fenced JSON."""

    name = "deepseek_fenced"

    def _example(self) -> str:
        return f"{_CALL}function{_SEPARATOR}tool_name\n```json\ntool_arguments\n```{_CALL_END}"

    def _body(self, tool: Tool, terminal: Terminal) -> str:
        head, tail = quote(f"{tool.name}\n```json\n"), quote("\n```")
        return f'"function" {terminal(_SEPARATOR)} {head} {arguments_rule(tool)} {tail}'
