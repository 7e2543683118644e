"""A body of /v1/responses as a conversation.

It does not know how the response is made.
"""

from __future__ import annotations

from collections.abc import Sequence

from moesaic.engine.serving.params import Grammar, SamplingParams
from moesaic.server.conversation import ChatRequest, Message, ToolCall, ToolChoice
from moesaic.server.errors import ApiError
from moesaic.server.openai.chat_input import text_of
from moesaic.server.openai.formats import schema_grammar
from moesaic.server.openai.response_types import InputItem, NamedFunction, ResponseBody, TextFormat
from moesaic.server.openai.sampling import make_params
from moesaic.server.openai.tools import check_tools, make_tools, template_arguments
from moesaic.server.openai.unsupported import refuse
from moesaic.server.state import Chat

__all__ = ["logprobs_of", "response_request"]

_NO_STATE = "no responses are kept by this server: send the conversation as input."


def response_request(chat: Chat, body: ResponseBody) -> ChatRequest:
    """The conversation that a body asks to go on with.

    Args:
        chat: whose model has tools and thoughts, or not.
        body: decoded.

    Raises:
        ApiError: a field is not supported, or contradicts another.
        RequestError: a sampling parameter is out of range.
    """
    if body.previous_response_id:
        raise ApiError(400, f"previous_response_id: {_NO_STATE}", param="previous_response_id", code="unsupported")
    refuse(body)
    if body.text is not None:
        refuse(body.text, "text")
    if body.reasoning is not None:
        refuse(body.reasoning, "reasoning")
    tools = make_tools(body.tools or ())
    asked = body.tool_choice
    choice = ToolChoice("named", asked.name) if isinstance(asked, NamedFunction) else ToolChoice(asked or "auto")
    check_tools(chat, tools, choice)
    effort = body.reasoning.effort if body.reasoning is not None else None
    return ChatRequest(
        _messages(body),
        _params(body),
        tools,
        choice,
        body.parallel_tool_calls is not False,
        template_arguments(chat, effort, body.chat_template_kwargs, "reasoning.effort"),
    )


def logprobs_of(body: ResponseBody) -> int | None:
    """How many alternatives are wanted with the text's tokens; None for no logprobs."""
    wanted = bool(body.top_logprobs) or "message.output_text.logprobs" in (body.include or ())
    return (body.top_logprobs or 0) if wanted else None


def _params(body: ResponseBody) -> SamplingParams:
    """How the answer is chosen."""
    return make_params(
        body,
        max_tokens=body.max_output_tokens,
        logprobs=logprobs_of(body),
        grammar=_grammar(body.text.format if body.text is not None else None),
        names={"max_tokens": "max_output_tokens", "logprobs": "top_logprobs", "grammar": "text.format"},
    )


def _grammar(form: TextFormat | None) -> Grammar | None:
    if form is None or form.type == "text":
        return None
    if form.type == "json_object":
        return Grammar("json_object")
    if not isinstance(form.schema, dict):
        raise ApiError(400, "text.format.schema is missing: expected a JSON schema.", param="text.format.schema")
    return schema_grammar(form.schema)


def _messages(body: ResponseBody) -> tuple[Message, ...]:
    """Turns as models see them; the instructions are the first."""
    before = (Message("system", body.instructions),) if body.instructions else ()
    if isinstance(body.input, str):
        return (*before, Message("user", body.input))
    return before + _turns(body.input)


def _turns(items: Sequence[InputItem]) -> tuple[Message, ...]:
    """Items as turns: thoughts, text and calls that follow each other are one turn of the assistant's."""
    turns: list[Message] = []
    names: dict[str, str] = {}
    begun: _AssistantTurn | None = None
    for index, item in enumerate(items):
        where = f"input[{index}]"
        own = _is_assistants(item, where)
        if begun is not None and not (own and begun.takes(item)):
            turns.append(begun.message())
            begun = None
        if own:
            begun = begun or _AssistantTurn()
            begun.add(item, where)
            if item.call_id is not None and item.name is not None:
                names[item.call_id] = item.name
        elif item.type == "function_call_output":
            turns.append(_result(item, where, names))
        else:
            turns.append(_said(item, where))
    if begun is not None:
        turns.append(begun.message())
    return tuple(turns)


def _is_assistants(item: InputItem, where: str) -> bool:
    """Whether an item is part of an assistant's turn."""
    if item.type in ("reasoning", "function_call"):
        return True
    if item.type == "item_reference":
        raise ApiError(400, f"{where}: {_NO_STATE}", param=where, code="unsupported")
    if item.type not in ("message", "function_call_output"):
        message = f"{where}: items of type {item.type[:100]!r} are not supported: leave it out."
        raise ApiError(400, message, param=f"{where}.type", code="unsupported")
    return item.type == "message" and item.role == "assistant"


class _AssistantTurn:
    """Items of one turn, put together."""

    def __init__(self) -> None:
        self._thoughts: list[str] = []
        self._text: str | None = None
        self._calls: list[ToolCall] = []

    def takes(self, item: InputItem) -> bool:
        """Whether an item belongs to this turn: thoughts and text only before what follows them."""
        if item.type == "function_call":
            return True
        return not self._calls and self._text is None

    def add(self, item: InputItem, where: str) -> None:
        if item.type == "reasoning":
            content = text_of(item.content, f"{where}.content") or text_of(item.summary, f"{where}.summary")
            self._thoughts += [content] if content else []
        elif item.type == "message":
            self._text = _required(text_of(item.content, f"{where}.content"), item.content, f"{where}.content")
        else:
            name = _required(item.name, item.name, f"{where}.name")
            arguments = _required(item.arguments, item.arguments, f"{where}.arguments")
            call_id = _required(item.call_id, item.call_id, f"{where}.call_id")
            self._calls.append(ToolCall(call_id, name, arguments))

    def message(self) -> Message:
        """The turn."""
        thoughts = "\n".join(self._thoughts) if self._thoughts else None
        return Message("assistant", self._text or "", thoughts, tuple(self._calls))


def _result(item: InputItem, where: str, names: dict[str, str]) -> Message:
    """What a tool gave."""
    call_id = _required(item.call_id, item.call_id, f"{where}.call_id")
    text = _required(text_of(item.output, f"{where}.output"), item.output, f"{where}.output")
    return Message("tool", text, tool_call_id=call_id, name=item.name or names.get(call_id))


def _said(item: InputItem, where: str) -> Message:
    """What somebody else than the assistant said."""
    if item.role is None:
        raise ApiError(400, f"{where}.role is missing.", param=f"{where}.role")
    return Message(item.role, _required(text_of(item.content, f"{where}.content"), item.content, f"{where}.content"))


def _required(value: str | None, given: object, where: str) -> str:
    """A value, if its field is given."""
    if value is None or given is None:
        raise ApiError(400, f"{where} is missing.", param=where)
    return value
