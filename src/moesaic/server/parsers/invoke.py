"""Calls as `invoke` and `parameter` tags, of which several models have a form of their own."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from moesaic.server.conversation import Tool
from moesaic.server.parsers.base import Call, Terminal, ToolStyle, Verdict
from moesaic.server.parsers.rules import alternatives, parameters
from moesaic.server.parsers.values import dump_json, load_json, property_schema, typed_value

__all__ = ["Invoke"]


class Invoke(ToolStyle):
    """A block with a tag for every call, and in it one for every argument.

    Attributes:
        prefix: before the names of the tags.
        says_text: whether arguments have an attribute that tells texts from JSON; otherwise the schema does.
    """

    prefix: ClassVar[str] = ""
    says_text: ClassVar[bool] = False

    def __init__(self) -> None:
        prefix = re.escape(self.prefix)
        self._call = re.compile(
            rf'\s*<{prefix}invoke name="([^"\n]+)">(.*?)</{prefix}invoke>(?=\s*<{prefix}invoke |\s*\Z)', re.DOTALL
        )
        self._value = re.compile(
            rf'\s*<{prefix}parameter name="([^"\n]+)"(?: string="(true|false)")?>(.*?)</{prefix}parameter>'
            rf"(?=\s*<{prefix}parameter |\s*\Z)",
            re.DOTALL,
        )

    def read(self, block: str, tools: Mapping[str, Tool]) -> list[Call] | Verdict:
        """All calls of a block; the closing tag may stand in a value."""
        body = next(block.removeprefix(opener) for opener in self.openers if block.startswith(opener))
        body = next((body.removesuffix(closer) for closer in self.closers if body.endswith(closer)), body)
        calls, end = [], 0
        while (found := self._call.match(body, end)) is not None:
            arguments = self._arguments(found[2], tools.get(found[1]))
            if arguments is None:
                break
            calls.append(Call(found[1], dump_json(arguments)))
            end = found.end()
        if calls and not body[end:].strip():
            return calls
        return "incomplete" if body[end:].lstrip().startswith(f"<{self.prefix}invoke ") else "malformed"

    def _arguments(self, body: str, tool: Tool | None) -> dict[str, Any] | None:
        arguments, end = {}, 0
        while (found := self._value.match(body, end)) is not None:
            key, text, end = found[1], found[3], found.end()
            if found[2] is None:
                text = text.removeprefix("\n").removesuffix("\n")
                arguments[key] = typed_value(text, property_schema(tool, key))
            else:
                loaded = load_json(text) if found[2] == "false" else (text,)
                arguments[key] = text if isinstance(loaded, str) else loaded[0]
        return None if body[end:].strip() else arguments

    def grammar(self, tools: Sequence[Tool], parallel: bool, terminal: Terminal, first: str) -> str | None:
        """A block of calls with their arguments in the order of the schema."""
        opener = self.start_of_calls()
        closer = terminal(self.closers[self.openers.index(opener)])
        end = terminal(f"</{self.prefix}invoke>\n")
        rules = [f'calls: {first} "\\n" body{"+" if parallel else ""} {closer}']
        rules.append(f"body: {alternatives('call', len(tools))} {end}")

        def before(name: str, text: bool) -> str:
            kind = f' string="{"true" if text else "false"}"' if self.says_text else ""
            return terminal(f'<{self.prefix}parameter name="{name}"{kind}>')

        for index, tool in enumerate(tools):
            after = f"</{self.prefix}parameter>"
            arguments, needed = parameters(tool, index, before, after, terminal, '"\\n"')
            head = terminal(f'<{self.prefix}invoke name="{tool.name}">\n')
            rules += [f"call_{index}: {head} {arguments}", *needed]
        return "\n".join(rules)
