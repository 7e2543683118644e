"""Counts of an answer's tokens, as OpenAI's API has them (`usage`).

It does not know how they were counted.
"""

from __future__ import annotations

from collections.abc import Iterable

from msgspec import Struct

from moesaic.engine.serving.outputs import RequestStats

__all__ = ["CompletionTokensDetails", "PromptTokensDetails", "StreamOptions", "Usage", "make_usage"]


class PromptTokensDetails(Struct):
    """Of the prompt's tokens, those that a cache still held."""

    cached_tokens: int


class CompletionTokensDetails(Struct):
    """Of the answer's tokens, those of thoughts."""

    reasoning_tokens: int


class Usage(Struct):
    """Tokens; a prompt is counted once, however many answers it gets."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails
    completion_tokens_details: CompletionTokensDetails


class StreamOptions(Struct, kw_only=True):
    """What a stream has beside the answer."""

    include_usage: bool | None = None


def make_usage(prompts: Iterable[Iterable[RequestStats]], reasoning_tokens: int = 0) -> Usage:
    """Tokens of one or several prompts.

    Args:
        prompts: of each prompt, the stats of its answers.
        reasoning_tokens: of all answers.
    """
    answers = [list(each) for each in prompts]
    prompt = sum(max((stats.prompt_tokens for stats in each), default=0) for each in answers)
    cached = sum(max((stats.cached_tokens for stats in each), default=0) for each in answers)
    completion = sum(stats.generated_tokens for each in answers for stats in each)
    return Usage(
        prompt,
        completion,
        prompt + completion,
        PromptTokensDetails(cached),
        CompletionTokensDetails(min(reasoning_tokens, completion)),
    )
