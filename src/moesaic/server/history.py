"""A conversation as the dictionaries that chat templates take, and what a template wants of them.

Templates differ in what they expect of calls in the history: arguments as an object or as its text, content that is
empty or null. Which one works is found out once, with a conversation that has a call. It does not know tokens.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any, Literal

from moesaic.errors import RequestError
from moesaic.server.conversation import ChatRequest, Message, Tool, ToolCall
from moesaic.server.parsers.base import ReasoningStyle, ToolStyle
from moesaic.server.parsers.values import renamed
from moesaic.server.prompt import Rename
from moesaic.server.template import ChatTemplate

__all__ = ["Turns", "texts_of"]

_PROBE = "qzprobe"


@dataclass(frozen=True, slots=True)
class Turns:
    """Makes dictionaries of conversations, for one template.

    Attributes:
        style: how calls are written, if it is known.
        reasoning: how thoughts are marked, if they are.
        developer: whether the template knows that role.
        takes_tools: whether it describes tools; otherwise `style` may do so.
        arguments_as_text: of calls.
        null_content: of turns that only call.
    """

    style: ToolStyle | None
    reasoning: ReasoningStyle | None
    developer: bool
    takes_tools: bool
    arguments_as_text: bool = False
    null_content: bool = False

    @classmethod
    def of(
        cls,
        template: ChatTemplate,
        style: ToolStyle | None,
        reasoning: ReasoningStyle | None,
        names: Mapping[str, str] | None = None,
    ) -> Turns:
        """What a template wants, found by trying; `names`: of special tokens, which it may use."""
        source = template.source
        takes_tools = re.search(r"\btools\b", source) is not None
        known = cls(style, reasoning, re.search(r"['\"]developer['\"]", source) is not None, takes_tools)
        if style is None:
            return known
        for arguments_as_text, null_content in ((False, False), (False, True), (True, False), (True, True)):
            tried = replace(known, arguments_as_text=arguments_as_text, null_content=null_content)
            if tried._works(template, names or {}):
                return tried
        return known

    def _works(self, template: ChatTemplate, names: Mapping[str, str]) -> bool:
        """Whether a call is rendered as its name and JSON."""
        assert self.style is not None
        call = ToolCall(
            self.style.history_id("call_0"), f"{_PROBE}name", json.dumps({f"{_PROBE}key": f"{_PROBE}value"})
        )
        asked, called = Message("user", "a"), Message("assistant", "", None, (call,))
        result = Message("tool", "1", None, (), call.id, call.name)
        messages = [self._message(message, lambda text: text, {}) for message in (asked, called, result)]
        tool = _tool(Tool(call.name), lambda text: text)
        variables = {**names, "messages": messages, "tools": [tool], "add_generation_prompt": True}
        try:
            text = template.render(variables)
        except RequestError:
            return False
        right, wrong = ("name", "key", "value"), (f"'{_PROBE}key'", f'\\"{_PROBE}key')
        return all(f"{_PROBE}{part}" in text for part in right) and not any(part in text for part in wrong)

    def tools(self, request: ChatRequest, rename: Rename) -> list[dict[str, Any]] | None:
        """The tools for the template; None if there are none or it takes none."""
        if not request.tools or request.tool_choice.mode == "none" or not self.takes_tools:
            return None
        return [_tool(tool, rename) for tool in request.tools]

    def messages(self, request: ChatRequest, rename: Rename, tail: str = "") -> list[dict[str, Any]]:
        """The turns for the template.

        Args:
            request: the conversation.
            rename: applied to every text of it.
            tail: put behind the last message's text, or behind its thoughts if it has no text.

        Raises:
            RequestError: arguments of a call in it are no JSON object.
        """
        turns = _merged_system([self._plain_role(message) for message in request.messages])
        turns = [self._without_inline_thoughts(message) for message in turns]
        if self.style is not None and self.style.single_calls:
            turns = _one_call_per_turn(turns)
        names = {call.id: call.name for message in turns for call in message.tool_calls}
        result = [self._message(message, rename, names) for message in turns]
        if self.style is not None and not self.takes_tools and request.tools and request.tool_choice.mode != "none":
            described = self.style.instructions(request.tools, rename)
            if result[0]["role"] == "system":
                result[0]["content"] += f"\n\n{described}"
            else:
                result.insert(0, {"role": "system", "content": described})
        if tail:
            _append(result[-1], tail)
        return result

    def _plain_role(self, message: Message) -> Message:
        return replace(message, role="system") if message.role == "developer" and not self.developer else message

    def _without_inline_thoughts(self, message: Message) -> Message:
        """Thoughts that a client gave back in the text, as it got them from a server that does not part them."""
        style, content = self.reasoning, message.content.lstrip()
        if style is None or message.role != "assistant" or message.reasoning is not None:
            return message
        if not content.startswith(style.opener) or style.closer not in content:
            return message
        thoughts, _, rest = content.removeprefix(style.opener).partition(style.closer)
        return replace(message, reasoning=thoughts.strip("\n"), content=rest.lstrip("\n"))

    def _message(self, message: Message, rename: Rename, names: Mapping[str, str]) -> dict[str, Any]:
        turn: dict[str, Any] = {"role": message.role, "content": rename(message.content)}
        name = message.name
        if message.role == "tool" and name is None and message.tool_call_id is not None:
            name = names.get(message.tool_call_id)
        if name is not None:
            turn["name"] = rename(name)
        if message.reasoning is not None and message.role == "assistant":
            turn["reasoning_content"] = turn["thinking"] = rename(message.reasoning)
        if message.tool_call_id is not None:
            turn["tool_call_id"] = rename(self._id(message.tool_call_id))
        if message.tool_calls:
            turn["tool_calls"] = [self._call(call, rename) for call in message.tool_calls]
            if not message.content and self.null_content:
                turn["content"] = None
            if self.style is not None:
                self.style.adapt(turn)
        return turn

    def _call(self, call: ToolCall, rename: Rename) -> dict[str, Any]:
        try:
            arguments = json.loads(call.arguments or "{}")
        except (ValueError, RecursionError):
            arguments = None
        if not isinstance(arguments, dict):
            raise RequestError(f"the arguments of the call {call.id!r} are no JSON object.", "messages")
        given = rename(call.arguments or "{}") if self.arguments_as_text else renamed(arguments, rename)
        function = {"name": rename(call.name), "arguments": given}
        return {"type": "function", "id": rename(self._id(call.id)), "function": function}

    def _id(self, call_id: str) -> str:
        return self.style.history_id(call_id) if self.style is not None else call_id


def texts_of(request: ChatRequest) -> list[str]:
    """All texts that the client chose, in any order: those that a `Rename` would see, as they are."""
    seen: list[str] = []

    def note(text: str) -> str:
        seen.append(text)
        return text

    for message in request.messages:
        for text in (message.content, message.reasoning, message.name, message.tool_call_id):
            note(text or "")
        for call in message.tool_calls:
            seen.extend((call.id, call.name, call.arguments))
            with suppress(ValueError, RecursionError):  # refused where it is needed
                renamed(json.loads(call.arguments or "{}"), note)
    for tool in request.tools:
        _tool(tool, note)
    renamed(dict(request.template_arguments), note)
    return seen


def _tool(tool: Tool, rename: Rename) -> dict[str, Any]:
    parameters = tool.parameters or {"type": "object", "properties": {}}
    function = {"name": rename(tool.name), "description": rename(tool.description)}
    return {"type": "function", "function": {**function, "parameters": renamed(parameters, rename)}}


def _merged_system(messages: list[Message]) -> list[Message]:
    """Instructions at the beginning are one message: templates take only one."""
    count = next((at for at, message in enumerate(messages) if message.role not in ("system", "developer")), None)
    count = len(messages) if count is None else count
    if count < 2:
        return messages
    role: Literal["system", "developer"] = "system" if messages[0].role == "system" else "developer"
    text = "\n\n".join(message.content for message in messages[:count] if message.content)
    return [Message(role, text), *messages[count:]]


def _one_call_per_turn(messages: list[Message]) -> list[Message]:
    """Turns with several calls taken apart, every call followed by its result."""
    result: list[Message] = []
    results = {message.tool_call_id: message for message in messages if message.role == "tool"}
    moved: set[int] = set()
    for message in messages:
        if id(message) in moved:
            continue
        if len(message.tool_calls) < 2:
            result.append(message)
            continue
        for at, call in enumerate(message.tool_calls):
            first = at == 0
            turn = replace(message, tool_calls=(call,), content=message.content if first else "")
            result.append(turn if first else replace(turn, reasoning=None))
            if (answer := results.get(call.id)) is not None:
                result.append(answer)
                moved.add(id(answer))
    return result


def _append(turn: dict[str, Any], tail: str) -> None:
    if turn["content"] or "reasoning_content" not in turn:
        turn["content"] = (turn["content"] or "") + tail
    else:
        turn["reasoning_content"] = turn["thinking"] = turn["reasoning_content"] + tail
