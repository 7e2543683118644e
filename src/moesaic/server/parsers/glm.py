r"""Calls as a name and pairs of tags: GLM-4.5, 4.6, 4.7 and 5.

Format: the chat templates of zai-org/GLM-4.5 and GLM-4.6:
`<tool_call>NAME\n<arg_key>KEY</arg_key>\n<arg_value>VALUE</arg_value>\n</tool_call>`; from GLM-4.7 on without the line
breaks. Values are texts without quotes, or JSON where the schema has another type.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from moesaic.server.conversation import Tool
from moesaic.server.parsers.base import Call, Terminal, ToolStyle, Verdict
from moesaic.server.parsers.rules import alternatives, parameters, quote
from moesaic.server.parsers.values import dump_json, property_schema, typed_value

__all__ = ["Glm"]

_NAME = re.compile(r"\s*([\w.:-]+)\s*")
_PAIR = re.compile(r"<arg_key>(.*?)</arg_key>\s*<arg_value>(.*?)</arg_value>\s*(?=<arg_key>|\Z)", re.DOTALL)


class Glm(ToolStyle):
    """A name, keys and values."""

    name = "glm"
    openers = ("<tool_call>",)
    closers = ("</tool_call>",)
    inner = ("<arg_key>", "</arg_key>", "<arg_value>", "</arg_value>")

    def read(self, block: str, tools: Mapping[str, Tool]) -> list[Call] | Verdict:
        """One call; the closing tag may stand in a value."""
        body = block.removeprefix("<tool_call>").removesuffix("</tool_call>")
        head = _NAME.match(body)
        if head is None:
            return "malformed"
        name, arguments, end = head[1], {}, head.end()
        while (pair := _PAIR.match(body, end)) is not None:
            key, end = pair[1].strip(), pair.end()
            arguments[key] = typed_value(pair[2], property_schema(tools.get(name), key))
        if body[end:].strip():
            return "incomplete" if body.startswith("<arg_key>", end) else "malformed"
        return [Call(name, dump_json(arguments))]

    def grammar(self, tools: Sequence[Tool], parallel: bool, terminal: Terminal, first: str) -> str | None:
        """Calls with their arguments in the order of the schema, with line breaks or without."""
        opener, closer = terminal("<tool_call>"), terminal("</tool_call>")
        more = f"(BREAK {opener} body)*" if parallel else ""
        rules = [f"calls: {first} body {more}", r"BREAK: /\n?/"]
        rules.append(f"body: {alternatives('call', len(tools))} {closer}")
        key, end, value = (terminal(text) for text in ("<arg_key>", "</arg_key>", "<arg_value>"))

        def before(name: str, text: bool) -> str:
            return f"{key} {quote(name)} {end} BREAK {value}"

        for index, tool in enumerate(tools):
            arguments, needed = parameters(tool, index, before, "</arg_value>", terminal, "BREAK")
            rules += [f"call_{index}: {quote(tool.name)} BREAK {arguments}", *needed]
        return "\n".join(rules)
