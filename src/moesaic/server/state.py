"""What handlers need: the engine, the tokenizer's side of a conversation, names and options; one per application.

It does not know how any of it is made.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from starlette.requests import Request

from moesaic.engine.serving.interface import EngineClient
from moesaic.engine.serving.outputs import Chunk
from moesaic.engine.serving.params import SamplingParams
from moesaic.server.conversation import ChatRequest, Event

__all__ = ["Chat", "ModelInfo", "ServerState", "state_of"]


class Chat(Protocol):
    """Conversations and plain text over an engine; `ChatService` is the one with a tokenizer."""

    @property
    def has_reasoning(self) -> bool:
        """Whether the model thinks before it answers."""
        ...

    @property
    def has_tools(self) -> bool:
        """Whether the chat template takes tools and a parser is known for its calls."""
        ...

    def chat(self, request: ChatRequest, request_id: str) -> AsyncIterator[Event]:
        """Answer a conversation; closing the iterator cancels. Raises as `EngineClient.generate`."""
        ...

    def complete(self, prompt: str | Sequence[int], params: SamplingParams, request_id: str) -> AsyncIterator[Chunk]:
        """Go on with a text (encoded with the tokenizer's own special tokens around it) or with tokens."""
        ...

    def encode_chat(self, request: ChatRequest) -> list[int]:
        """Tokens of a conversation up to where the answer begins. Raises RequestError if the template refuses it."""
        ...

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Tokens of plain text, in which names of special tokens are text."""
        ...

    def decode(self, ids: Sequence[int]) -> str:
        """Text of tokens. Raises RequestError for numbers that are no tokens."""
        ...

    def token_text(self, token_id: int) -> str:
        """Text of a token alone, with replacement characters where it is no whole character."""
        ...


@dataclass(frozen=True, slots=True)
class ModelInfo:
    """What the APIs tell of the model.

    Attributes:
        name: by which it is asked for; other names are refused with 404.
        created: Unix time at which it was loaded.
        path: MODEL as given, for people.
        family: the model type.
        container: what its files are, e.g. "gguf".
        format: the format that most of its weights have.
        parameters: number of weights, 0 if unknown.
        nbytes: of its weights.
        context_length: most tokens.
        template: source of the chat template, or "".
        digest: of its file names and sizes, hexadecimal.
    """

    name: str
    created: int = 0
    path: str = ""
    family: str = ""
    container: str = ""
    format: str = ""
    parameters: int = 0
    nbytes: int = 0
    context_length: int = 0
    template: str = ""
    digest: str = ""


@dataclass(slots=True)
class ServerState:
    """Of one application.

    Attributes:
        engine: answers.
        chat: the tokenizer's side.
        model: what is served.
        aliases: further names of the model.
        extra: for the application's own parts (metrics, limits).
    """

    engine: EngineClient
    chat: Chat
    model: ModelInfo
    aliases: tuple[str, ...] = ()
    extra: dict[str, Any] = field(default_factory=dict)


def state_of(request: Request) -> ServerState:
    """The state of the application that a request came to."""
    state: ServerState = request.app.state.moesaic
    return state
