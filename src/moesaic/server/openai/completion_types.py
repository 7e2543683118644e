"""Bodies of /v1/completions: what is asked, what is answered, whole and in pieces."""

from __future__ import annotations

from typing import Annotated, Literal

from msgspec import UNSET, Meta, Struct, UnsetType

from moesaic.server.openai.formats import ResponseFormat
from moesaic.server.openai.logprobs import CompletionLogprobs
from moesaic.server.openai.sampling import Count, SamplingFields, TokenId, TopLogprobs
from moesaic.server.openai.unsupported import OnlyEmpty, OnlyNull, OnlyTrue
from moesaic.server.openai.usage import StreamOptions, Usage
from moesaic.server.timings import Timings

__all__ = ["Completion", "CompletionBody", "CompletionChoice"]


class CompletionBody(SamplingFields, kw_only=True):
    """What /v1/completions takes. Fields that are not here are ignored.

    Attributes:
        prompt: a text, several, tokens, or several times tokens.
        max_tokens: 16 if it is not given, as OpenAI's API has it.
        logprobs: number of alternatives; 0 for the chosen tokens alone.
        echo: whether the prompt's text comes before the answer's.
    """

    model: str
    prompt: str | Annotated[list[str | TokenId | list[TokenId]], Meta(min_length=1)]
    n: Annotated[int, Meta(ge=1, le=128)] | None = None
    best_of: int | None = None
    max_tokens: Count | None = None
    logprobs: TopLogprobs | None = None
    echo: bool | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    response_format: ResponseFormat | None = None
    suffix: OnlyEmpty | UnsetType = UNSET
    prompt_embeds: OnlyNull | UnsetType = UNSET
    add_special_tokens: OnlyTrue | UnsetType = UNSET


class CompletionChoice(Struct, kw_only=True):
    """An answer or a piece of one; answers to the first prompt come first."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None = None
    finish_reason: Literal["stop", "length"] | None = None
    stop_reason: str | int | UnsetType | None = UNSET


class Completion(Struct, kw_only=True):
    """All answers, or a piece of one; with `include_usage`, the last piece has no choices but the counts."""

    id: str
    object: Literal["text_completion"] = "text_completion"
    created: int
    model: str
    system_fingerprint: str | None = None
    choices: list[CompletionChoice]
    usage: Usage | UnsetType | None = UNSET
    timings: Timings | UnsetType = UNSET
