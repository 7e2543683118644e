"""What comes back from a request: pieces of text as they are made, and how long things took.

It imports neither torch nor transformers.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

__all__ = ["Chunk", "Completion", "FinishReason", "RequestOutput", "RequestStats", "TokenLogprob"]

FinishReason = Literal["stop", "length", "cancelled", "error"]


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """A token and the logarithm of its probability.

    Attributes:
        token_id: its number.
        raw: its bytes, which need not be whole characters.
        logprob: natural logarithm.
        top: the likeliest tokens at its place, likeliest first.
    """

    token_id: int
    raw: bytes
    logprob: float
    top: tuple[TokenLogprob, ...] = ()


@dataclass(slots=True)
class RequestStats:
    """Counts and times of one answer.

    Attributes:
        prompt_tokens: of the prompt.
        cached_tokens: how many of them a cache still held.
        generated_tokens: of the answer, the one that stopped it included.
        queue_seconds: until its first step.
        prefill_seconds: from there to the first token.
        decode_seconds: from there to the last.
        expert_hits: of routed experts that were asked for in its steps, those found in the cache on the GPU.
        expert_lookups: all of them; 0 without such a cache.
        seed: that its tokens were drawn with; None where nothing was drawn.
    """

    prompt_tokens: int = 0
    cached_tokens: int = 0
    generated_tokens: int = 0
    queue_seconds: float = 0.0
    prefill_seconds: float = 0.0
    decode_seconds: float = 0.0
    expert_hits: int = 0
    expert_lookups: int = 0
    seed: int | None = None


@dataclass(frozen=True, slots=True)
class Chunk:
    """A piece of an answer.

    Attributes:
        index: which of the `n` answers.
        text: new text; may be empty while a character or a possible stop is incomplete.
        token_ids: new tokens.
        logprobs: of these tokens, if asked for.
        finish_reason: with the last piece of an answer.
        stop: the text or token that stopped it, if one of the request's did.
        stats: with the last piece.
    """

    index: int
    text: str = ""
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprob, ...] = ()
    finish_reason: FinishReason | None = None
    stop: str | int | None = None
    stats: RequestStats | None = None


@dataclass(slots=True)
class Completion:
    """A whole answer; fields as those of `Chunk`."""

    index: int
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    stop: str | int | None = None
    stats: RequestStats = field(default_factory=RequestStats)

    def add(self, chunk: Chunk) -> None:
        """Append the next piece."""
        self.text += chunk.text
        self.token_ids.extend(chunk.token_ids)
        self.logprobs.extend(chunk.logprobs)
        if chunk.finish_reason is not None:
            self.finish_reason, self.stop = chunk.finish_reason, chunk.stop
        if chunk.stats is not None:
            self.stats = chunk.stats


@dataclass(slots=True)
class RequestOutput:
    """All answers to a prompt.

    Attributes:
        request_id: of the request.
        prompt_token_ids: of the prompt.
        completions: its `n` answers.
    """

    request_id: str
    prompt_token_ids: list[int]
    completions: list[Completion]
