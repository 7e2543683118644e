"""Answers of one person's conversation by the steps of the serving engine: sampling, text while it comes, timings.

It knows tokenizers, and not how tokens are computed.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

from moesaic.engine.answer import Answer, Sampling
from moesaic.engine.serving.defaults import GenerationDefaults
from moesaic.engine.serving.params import SamplingParams
from moesaic.engine.serving.sampler import RequestSampler
from moesaic.engine.serving.text import Detokenizer
from moesaic.engine.serving.token_stream import TokenStream
from moesaic.engine.torch_threads import one_torch_thread

__all__ = ["StreamAnswers"]

_PROMPT_TAIL = 8
"""Last tokens of a prompt, whose text the first of the answer may depend on."""


class StreamAnswers:
    """A stream of tokens, its tokenizer, and how the model's authors want it sampled.

    Args:
        stream: computes, and keeps what it has computed.
        tokenizer: the model's.
        defaults: what holds where a caller asks for nothing.
    """

    def __init__(self, stream: TokenStream, tokenizer: Any, defaults: GenerationDefaults) -> None:
        self._stream, self._tokenizer, self._defaults = stream, tokenizer, defaults

    @property
    def max_positions(self) -> int:
        """Most tokens of prompt and answer that there is room for."""
        return self._stream.max_positions

    def answer(
        self,
        prompt_ids: Sequence[int],
        sampling: Sampling,
        limit: int | None,
        on_text: Callable[[str], None],
        should_stop: Callable[[], bool],
    ) -> Answer:
        """As `Session.answer`, for at most `limit` tokens."""
        params = SamplingParams(
            temperature=sampling.temperature, top_p=sampling.top_p, top_k=sampling.top_k, seed=sampling.seed
        )
        vocab_size = self._stream.runner.vocab_size
        sampler = RequestSampler(params, self._defaults.sampling, vocab_size, prompt_ids, sampling.seed)
        text = Detokenizer(self._tokenizer, params, prompt_ids[-_PROMPT_TAIL:])
        answer = Answer(prompt_tokens=len(prompt_ids), seed=sampler.seed, finish_reason="length")
        pieces: list[str] = []

        def give(piece: str) -> None:
            if piece:
                pieces.append(piece)
                on_text(piece)

        started = first = last = time.perf_counter()
        try:
            with one_torch_thread():
                answer.cached_tokens = self._stream.begin(prompt_ids)
                for token in self._stream.generate(prompt_ids, sampler):
                    last = time.perf_counter()
                    answer.generated_tokens += 1
                    if answer.generated_tokens == 1:
                        first = last
                    if token in self._defaults.stop_ids:
                        answer.finish_reason = "stop"
                        break
                    give(text.push((token,)))
                    if should_stop():
                        answer.finish_reason = "interrupted"
                        break
                    if answer.generated_tokens == limit:
                        break
        except KeyboardInterrupt:  # perhaps in the middle of a step
            answer.finish_reason = "interrupted"
            self._stream.forget()
        except BaseException:
            self._stream.forget()
            raise
        give(text.finish())
        answer.text = "".join(pieces)
        if answer.generated_tokens:
            answer.prefill_seconds, answer.decode_seconds = first - started, last - first
        return answer

    def forget(self) -> None:
        """Give the memory of what is kept back."""
        self._stream.forget()
