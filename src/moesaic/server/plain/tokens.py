"""/tokenize and /detokenize: texts and conversations as the model's tokens, and back, in vLLM's form."""

from __future__ import annotations

import asyncio
from typing import Annotated, Any

from msgspec import UNSET, Meta, Struct, UnsetType
from starlette.requests import Request
from starlette.responses import Response

from moesaic.engine.serving.params import SamplingParams
from moesaic.server.bodies import read_body
from moesaic.server.conversation import ChatRequest
from moesaic.server.errors import ApiError
from moesaic.server.names import require_model
from moesaic.server.openai.chat_input import continues, make_messages
from moesaic.server.openai.chat_types import InputMessage, ToolBody
from moesaic.server.openai.models import json_response
from moesaic.server.openai.sampling import TokenId
from moesaic.server.openai.tools import check_tools, make_tools, template_arguments
from moesaic.server.openai.unsupported import OnlyFalse, OnlyNull, refuse
from moesaic.server.operation import Operation
from moesaic.server.state import Chat, ServerState, state_of

__all__ = ["OPERATIONS", "DetokenizeBody", "Detokenized", "TokenizeBody", "Tokenized"]


class TokenizeBody(Struct, kw_only=True):
    """A text or a conversation.

    Attributes:
        model: need not be given.
        prompt: a text.
        messages: a conversation, encoded up to where the answer would begin.
        add_special_tokens: whether those of the tokenizer are put around a text; they are if it is not given.
        return_token_strs: whether the text of each token is wanted.
    """

    model: str | None = None
    prompt: str | None = None
    messages: Annotated[list[InputMessage], Meta(min_length=1)] | None = None
    tools: list[ToolBody] | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    continue_final_message: bool | None = None
    add_generation_prompt: bool | None = None
    add_special_tokens: bool | None = None
    return_token_strs: bool | None = None
    chat_template: OnlyNull | UnsetType = UNSET
    mm_processor_kwargs: OnlyNull | UnsetType = UNSET
    return_offsets: OnlyFalse | UnsetType = UNSET


class Tokenized(Struct, kw_only=True):
    """Tokens, and the longest context."""

    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None = None


class DetokenizeBody(Struct, kw_only=True):
    """Tokens; `model` need not be given."""

    model: str | None = None
    tokens: list[TokenId]


class Detokenized(Struct, kw_only=True):
    """Their text."""

    prompt: str


async def tokenize(request: Request) -> Response:
    """Tokens of a text or a conversation."""
    state = state_of(request)
    body = await read_body(request, TokenizeBody)
    _check_model(state, body.model)
    refuse(body)
    if (body.prompt is None) == (body.messages is None):
        raise ApiError(400, "expected either prompt or messages.", param="prompt")
    if body.prompt is not None:
        special = body.add_special_tokens is not False
        tokens = await asyncio.to_thread(state.chat.encode, body.prompt, add_special_tokens=special)
    else:
        conversation = _conversation(state.chat, body, body.messages or [])
        tokens = await asyncio.to_thread(state.chat.encode_chat, conversation)
    return json_response(
        Tokenized(
            count=len(tokens),
            max_model_len=state.engine.context_length,
            tokens=tokens,
            token_strs=[state.chat.token_text(each) for each in tokens] if body.return_token_strs else None,
        )
    )


async def detokenize(request: Request) -> Response:
    """Text of tokens."""
    state = state_of(request)
    body = await read_body(request, DetokenizeBody)
    _check_model(state, body.model)
    return json_response(Detokenized(prompt=state.chat.decode(body.tokens)))


def _conversation(chat: Chat, body: TokenizeBody, bodies: list[InputMessage]) -> ChatRequest:
    """The conversation to encode."""
    if body.add_special_tokens:
        message = "add_special_tokens is not supported with messages: the chat template has them."
        raise ApiError(400, message, param="add_special_tokens", code="unsupported")
    messages = make_messages(bodies)
    request = ChatRequest(
        messages,
        SamplingParams(),
        make_tools(tool.function for tool in body.tools or ()),
        template_arguments=template_arguments(chat, None, body.chat_template_kwargs, "chat_template_kwargs"),
        continue_last=continues(messages, body.continue_final_message, body.add_generation_prompt),
    )
    check_tools(chat, request.tools, request.tool_choice)
    return request


def _check_model(state: ServerState, name: str | None) -> None:
    if name is not None:
        require_model(state, name)


OPERATIONS = (
    Operation("POST", "/tokenize", tokenize, "Tokens of a text or a conversation", "plain", TokenizeBody, Tokenized),
    Operation("POST", "/detokenize", detokenize, "Text of tokens", "plain", DetokenizeBody, Detokenized),
)
