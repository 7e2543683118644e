r"""Calls as tags with the arguments' text between them: Qwen3-Coder, Qwen3.5, Step-3.5, Nemotron-3.

Format: the chat templates of Qwen/Qwen3-Coder-480B-A35B-Instruct and stepfun-ai/Step-3.5-Flash:
`<tool_call>\n<function=NAME>\n<parameter=KEY>\nVALUE\n</parameter>\n</function>\n</tool_call>`. Values are texts
without quotes, or JSON where the schema has another type. The outer tag is missing now and then.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from moesaic.server.conversation import Tool
from moesaic.server.parsers.base import Call, Terminal, ToolStyle, Verdict
from moesaic.server.parsers.rules import alternatives, parameters
from moesaic.server.parsers.values import dump_json, property_schema, typed_value

__all__ = ["QwenCoder"]

_CALL = re.compile(r"\s*(?:<tool_call>\s*)?<function=([^>\n]+)>(.*)</function>\s*", re.DOTALL)
_VALUE = re.compile(r"\s*<parameter=([^>\n]+)>\n?(.*?)\n?</parameter>(?=\s*<parameter=[^>\n]+>|\s*\Z)", re.DOTALL)


class QwenCoder(ToolStyle):
    """A function's tag, with a tag for every argument."""

    name = "qwen_coder"
    openers = ("<tool_call>", "<function=")
    closers = ("</function>",)
    noise = ("</tool_call>",)

    def read(self, block: str, tools: Mapping[str, Tool]) -> list[Call] | Verdict:
        """One function."""
        call = _CALL.fullmatch(block)
        if call is None:
            return "malformed"
        name, body = call[1].strip(), call[2]
        arguments, end = {}, 0
        while (value := _VALUE.match(body, end)) is not None:
            key, end = value[1].strip(), value.end()
            arguments[key] = typed_value(value[2], property_schema(tools.get(name), key))
        if body[end:].strip():
            return "incomplete" if body[end:].lstrip().startswith("<parameter=") else "malformed"
        return [Call(name, dump_json(arguments))]

    def grammar(self, tools: Sequence[Tool], parallel: bool, terminal: Terminal, first: str) -> str | None:
        """Functions with their arguments in the order of the schema."""
        opener, closer = terminal("<tool_call>"), terminal("</tool_call>")
        more = f'("\\n" {opener} body)*' if parallel else ""
        rules = [f"calls: {first} body {more}", f'body: "\\n" {alternatives("call", len(tools))} "\\n" {closer}']

        def before(name: str, text: bool) -> str:
            return terminal(f"<parameter={name}>\n")

        for index, tool in enumerate(tools):
            arguments, needed = parameters(tool, index, before, "\n</parameter>\n", terminal)
            head = terminal(f"<function={tool.name}>\n")
            rules += [f"call_{index}: {head} {arguments} {terminal('</function>')}", *needed]
        return "\n".join(rules)
