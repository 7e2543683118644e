"""A body of /v1/chat/completions as a conversation.

It does not know how the answer is sent.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from moesaic.engine.serving.params import SamplingParams
from moesaic.server.conversation import ChatRequest, Message, ToolCall, ToolChoice
from moesaic.server.errors import ApiError
from moesaic.server.openai.chat_types import ChatBody, InputMessage, NamedTool, Part
from moesaic.server.openai.formats import format_grammar
from moesaic.server.openai.sampling import make_params
from moesaic.server.openai.tools import check_tools, make_tools, template_arguments
from moesaic.server.openai.unsupported import refuse
from moesaic.server.state import Chat

__all__ = ["chat_request", "continues", "make_messages", "text_of"]

_TEXTS = frozenset({"text", "input_text", "output_text", "reasoning_text", "summary_text"})
_MEDIA = frozenset({"image_url", "input_image", "input_audio", "audio_url", "video_url", "file", "input_file"})


def chat_request(chat: Chat, body: ChatBody) -> ChatRequest:
    """The conversation that a body asks to go on with.

    Args:
        chat: whose model has tools and thoughts, or not.
        body: decoded.

    Raises:
        ApiError: a field is not supported, or contradicts another.
        RequestError: a sampling parameter is out of range.
    """
    refuse(body)
    tools = make_tools(tool.function for tool in body.tools or ())
    asked = body.tool_choice
    choice = ToolChoice("named", asked.function.name) if isinstance(asked, NamedTool) else ToolChoice(asked or "auto")
    check_tools(chat, tools, choice)
    messages = make_messages(body.messages)
    return ChatRequest(
        messages,
        _params(body),
        tools,
        choice,
        body.parallel_tool_calls is not False,
        template_arguments(chat, body.reasoning_effort, body.chat_template_kwargs, "reasoning_effort"),
        continues(messages, body.continue_final_message, body.add_generation_prompt),
    )


def make_messages(bodies: Sequence[InputMessage]) -> tuple[Message, ...]:
    """Turns as models see them.

    Raises:
        ApiError: a message has what its role cannot have, or no text where it needs some.
    """
    names: dict[str, str] = {}
    return tuple(_message(each, f"messages[{index}]", names) for index, each in enumerate(bodies))


def continues(messages: Sequence[Message], last: bool | None, begin: bool | None) -> bool:
    """Whether the last message is gone on with; `begin` is vLLM's `add_generation_prompt`."""
    if not last:
        if begin is False:
            name = "add_generation_prompt"
            raise ApiError(400, f"{name} is false without continue_final_message: nobody would speak.", param=name)
        return False
    if begin or messages[-1].role != "assistant" or messages[-1].tool_calls:
        name = "continue_final_message"
        message = f"{name}: expected an assistant's text as the last message, and add_generation_prompt false or unset."
        raise ApiError(400, message, param=name)
    return True


def text_of(content: str | Iterable[Part] | None, where: str) -> str:
    """The text of a message; parts of it are lines.

    Raises:
        ApiError: a part is no text.
    """
    if content is None or isinstance(content, str):
        return content or ""
    texts = []
    for index, part in enumerate(content):
        place = f"{where}[{index}]"
        if part.type in _MEDIA:
            raise ApiError(
                400, f"{place}: this model takes no images, sounds or files.", param=place, code="unsupported"
            )
        text = part.text if part.type in _TEXTS else part.refusal if part.type == "refusal" else None
        if text is None:
            raise ApiError(400, f"{place}: expected a part of type 'text' with its text.", param=place)
        texts.append(text)
    return "\n".join(texts)


def _message(body: InputMessage, where: str, names: dict[str, str]) -> Message:
    """One turn; `names` are of the functions called so far, by the call's number."""
    refuse(body, where)
    calls = tuple(ToolCall(call.id, call.function.name, call.function.arguments) for call in body.tool_calls or ())
    names |= {call.id: call.name for call in calls}
    if calls and body.role != "assistant":
        raise ApiError(400, f"{where}.tool_calls: only an assistant calls tools.", param=f"{where}.tool_calls")
    if body.role == "tool" and body.tool_call_id is None:
        raise ApiError(400, f"{where}.tool_call_id is missing: which call is answered?", param=f"{where}.tool_call_id")
    if body.content is None and body.role != "assistant":
        raise ApiError(400, f"{where}.content is missing.", param=f"{where}.content")
    assistant = body.role == "assistant"
    refused = body.refusal if assistant and body.content is None else None
    thoughts = body.reasoning_content if body.reasoning_content is not None else body.reasoning
    return Message(
        body.role,
        refused or text_of(body.content, f"{where}.content"),
        thoughts if assistant else None,
        calls,
        body.tool_call_id if body.role == "tool" else None,
        body.name or names.get(body.tool_call_id or ""),
    )


def _params(body: ChatBody) -> SamplingParams:
    """How the answer is chosen."""
    if body.top_logprobs and not body.logprobs:
        raise ApiError(400, "top_logprobs needs logprobs to be true.", param="top_logprobs")
    limit, name = body.max_completion_tokens, "max_completion_tokens"
    if limit is None:
        limit, name = body.max_tokens, "max_tokens"
    return make_params(
        body,
        n=body.n or 1,
        max_tokens=limit,
        logprobs=(body.top_logprobs or 0) if body.logprobs else None,
        grammar=format_grammar(body.response_format),
        names={"max_tokens": name, "logprobs": "top_logprobs"},
    )
