"""Times of a response, as llama.cpp's server tells them (`timings`); answers of all APIs have them beside their own.

It does not know how they were measured.
"""

from __future__ import annotations

from collections.abc import Iterable

from msgspec import Struct

from moesaic.engine.serving.outputs import RequestStats

__all__ = ["Timings", "make_timings"]


class Timings(Struct):
    """Times of a response. Of several answers at once, the longest time and all their tokens.

    Attributes:
        queue_ms: until the first step.
        cache_n: tokens of the prompt that were not computed anew.
        prompt_n: tokens of the prompt that were.
        prompt_ms: from the first step to the first token.
        prompt_per_second: prefill speed; null if it took no time.
        predicted_n: tokens of the answers.
        predicted_ms: from the first token to the last.
        predicted_per_second: decode speed, for the tokens after the first; null if it took no time.
        expert_hits: routed experts found in the cache on the GPU.
        expert_lookups: routed experts asked for; 0 without such a cache.
    """

    queue_ms: float
    cache_n: int
    prompt_n: int
    prompt_ms: float
    prompt_per_second: float | None
    predicted_n: int
    predicted_ms: float
    predicted_per_second: float | None
    expert_hits: int
    expert_lookups: int


def make_timings(prompts: Iterable[Iterable[RequestStats]]) -> Timings:
    """Times of one or several prompts.

    Args:
        prompts: of each prompt, the stats of its answers.
    """
    answers = [list(each) for each in prompts]
    every = [stats for each in answers for stats in each]
    cached = sum(max((stats.cached_tokens for stats in each), default=0) for each in answers)
    computed = sum(max((stats.prompt_tokens for stats in each), default=0) for each in answers) - cached
    prefill = max((stats.prefill_seconds for stats in every), default=0.0)
    decode = max((stats.decode_seconds for stats in every), default=0.0)
    later = sum(max(stats.generated_tokens - 1, 0) for stats in every)
    return Timings(
        queue_ms=_ms(max((stats.queue_seconds for stats in every), default=0.0)),
        cache_n=cached,
        prompt_n=computed,
        prompt_ms=_ms(prefill),
        prompt_per_second=round(computed / prefill, 3) if prefill > 0 else None,
        predicted_n=sum(stats.generated_tokens for stats in every),
        predicted_ms=_ms(decode),
        predicted_per_second=round(later / decode, 3) if decode > 0 else None,
        expert_hits=sum(stats.expert_hits for stats in every),
        expert_lookups=sum(stats.expert_lookups for stats in every),
    )


def _ms(seconds: float) -> float:
    return round(seconds * 1000, 3)
