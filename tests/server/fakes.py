"""An engine and a chat without a model: they answer with a script, so that servers are tested quickly and exactly."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field

from moesaic.engine.serving.interface import EngineStats, EngineStatus
from moesaic.engine.serving.outputs import Chunk, FinishReason, RequestStats, TokenLogprob
from moesaic.engine.serving.params import SamplingParams
from moesaic.errors import EngineDeadError, OverloadedError, RequestError


@dataclass
class ScriptedEngine:
    """Answers every prompt with the same words, one piece per word; remembers what it was asked.

    A prompt's tokens are the code points of its text.
    """

    words: Sequence[str] = ("Hello", ", ", "world", "!")
    finish: FinishReason = "stop"
    status: EngineStatus = "ready"
    error: str | None = None
    context_length: int = 4096
    delay: float = 0.0
    fail_after: int | None = None  # pieces, then the engine dies
    overloaded: bool = False
    asked: list[tuple[list[int], SamplingParams]] = field(default_factory=list)
    cancelled: int = 0

    async def generate(
        self, prompt_ids: Sequence[int], params: SamplingParams, *, request_id: str | None = None
    ) -> AsyncIterator[Chunk]:
        if self.status == "dead":
            raise EngineDeadError("dead")
        if self.overloaded:
            raise OverloadedError("too many requests wait", 2.0)
        if not prompt_ids or len(prompt_ids) >= self.context_length:
            raise RequestError(f"a prompt of {len(prompt_ids)} tokens in a context of {self.context_length}.", "prompt")
        self.asked.append((list(prompt_ids), params))
        limit = len(self.words) if params.max_tokens is None else min(params.max_tokens, len(self.words))
        try:
            for position in range(max(limit, 1)):
                for index in range(params.n):
                    await asyncio.sleep(self.delay)
                    if self.fail_after is not None and position >= self.fail_after:
                        self.status = "dead"
                        raise EngineDeadError("died")
                    word = self.words[position] if limit else ""
                    last = position == max(limit, 1) - 1
                    reason: FinishReason = self.finish if limit == len(self.words) else "length"
                    stats = RequestStats(len(prompt_ids), 1, position + 1, 0.01, 0.1, 0.2) if last else None
                    logprobs = (_logprob(word, params.logprobs),) if params.logprobs is not None and word else ()
                    ids = (len(word),) if word else ()
                    yield Chunk(index, word, ids, logprobs, reason if last else None, None, stats)
        except (GeneratorExit, asyncio.CancelledError):
            self.cancelled += 1
            raise

    def stats(self) -> EngineStats:
        return EngineStats(blocks=10, blocks_free=8, blocks_cached=1, finished=(("stop", len(self.asked)),))

    async def drain(self, timeout: float) -> bool:
        self.status = "draining"
        return True

    async def close(self) -> None:
        self.status = "dead"


def _logprob(word: str, alternatives: int) -> TokenLogprob:
    top = tuple(TokenLogprob(index, f"w{index}".encode(), -1.0 - index) for index in range(alternatives))
    return TokenLogprob(len(word), word.encode(), -0.5, top)
