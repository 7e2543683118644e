"""One sequence of tokens on a runner: what a conversation of one person needs of the serving engine.

Between two prompts it keeps what is computed, so that a longer conversation only computes what is new. It knows neither
text nor how tokens are chosen, and shares the runner with nobody.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import torch

from moesaic.engine.serving.cache_room import default_cache_bytes, position_bytes, room_for_cache
from moesaic.engine.serving.paged_runner import paged_runner_for
from moesaic.engine.serving.runner import StepRunner
from moesaic.engine.serving.sampler import RequestSampler, sample
from moesaic.errors import GenerationError, LogitsError
from moesaic.kvcache.paged import PagedSequence
from moesaic.placement import DEFAULT_CONTEXT

__all__ = ["TokenStream", "token_stream_of"]

_CACHE_SHARE = 2
"""The cache may grow to one in so many bytes of the DRAM that is free; what is not used takes none."""


class OneSequenceRunner(StepRunner, Protocol):
    """A `StepRunner` that says how long a sequence may be."""

    @property
    def max_positions(self) -> int:
        """Positions that a sequence may have."""
        ...


class TokenStream:
    """Tokens one after the other.

    Args:
        runner: computes.

    Attributes:
        runner: as given.
    """

    def __init__(self, runner: OneSequenceRunner) -> None:
        self.runner = runner
        self._sequence: PagedSequence | None = None
        self._ids: list[int] = []  # what the sequence holds

    @property
    def max_positions(self) -> int:
        """Most tokens of prompt and answer."""
        pool = self.runner.pool
        return min(self.runner.max_positions, pool.num_blocks * pool.block_size)

    def begin(self, ids: Sequence[int]) -> int:
        """Turn to a prompt, of which at least the last token will be computed.

        Args:
            ids: the whole of it, at least one token.

        Returns:
            How many of its tokens are computed already.
        """
        sequence, most = self._sequence, self._reusable(len(ids))
        kept = 0
        while kept < min(len(self._ids), len(ids) - 1, most) and self._ids[kept] == ids[kept]:
            kept += 1
        if sequence is not None and kept < sequence.length and sequence.is_recurrent:
            kept = 0  # a state cannot go back
        if sequence is None or kept == 0:
            self.forget()
            sequence = self._sequence = self.runner.new_sequence()
        sequence.truncate(kept)
        sequence.prompt_length = len(ids)
        self._ids = list(ids[:kept])
        return kept

    def fill(self, ids: Sequence[int]) -> torch.Tensor:
        """Compute what is missing of the prompt that `begin` was called with.

        Returns:
            float32 `[1, vocab_size]`, logits of its last token; as those of `step`, until the next call.

        Raises:
            GenerationError: the cache is full.
        """
        logits = None
        while len(self._ids) < len(ids):
            piece = list(ids[len(self._ids) : len(self._ids) + self.runner.max_chunk])
            logits = self._append(piece)
        if logits is None:
            raise GenerationError("nothing is missing of this prompt: begin() leaves its last token to be computed.")
        return logits

    def step(self, token: int) -> torch.Tensor:
        """Append a token; its logits, float32 `[1, vocab_size]`, until the next call.

        Raises:
            GenerationError: there is no prompt, or the cache is full.
        """
        logits = self.runner.decode((self._begun(),), (token,))
        self._ids.append(token)
        return logits

    def generate(self, ids: Sequence[int], sampler: RequestSampler) -> Iterator[int]:
        """Go on with a prompt for ever, from where `begin` has left it; each token is computed when it is asked for.

        Args:
            ids: the prompt.
            sampler: chooses, and has accepted what was chosen.

        Raises:
            GenerationError: the cache is full.
            LogitsError: the model's logits are no numbers.
        """
        samplers = (sampler,)
        (token,), _ = sample(self.fill(ids), samplers)
        while True:
            sampler.accept(token)
            yield token
            if sampler.takes_likeliest:
                token = self._likeliest_after(token)
            else:
                (token,), _ = sample(self.step(token), samplers)

    def forget(self) -> None:
        """Give back what is computed."""
        sequence, self._sequence, self._ids = self._sequence, None, []
        if sequence is not None:
            self.runner.forget(sequence)

    def _likeliest_after(self, token: int) -> int:
        """As `step`, and what is likeliest to come then."""
        (likeliest,) = self.runner.decode_likeliest((self._begun(),), (token,))
        self._ids.append(token)
        if likeliest < 0:
            raise LogitsError("the model's logits are no numbers. Its weights may be damaged.", 0)
        return likeliest

    def _begun(self) -> PagedSequence:
        if self._sequence is None:
            raise GenerationError("a token can only be appended to a prompt: begin and fill one in first.")
        return self._sequence

    def _append(self, ids: list[int]) -> torch.Tensor:
        assert self._sequence is not None, "begin() makes a sequence"
        work = self.runner.start_prefill([(self._sequence, torch.tensor(ids, dtype=torch.int64))])
        try:
            while work.num_layers_left:
                work.advance(work.num_layers_left)
            logits = work.logits()
        except BaseException:
            work.abandon()
            raise
        self._ids += ids
        return logits

    def _reusable(self, prompt_length: int) -> int:
        """How many first positions have the same keys in the last prompt and in one of this length."""
        most = self.runner.shared_positions
        if most is None:
            return prompt_length
        before = 0 if self._sequence is None else self._sequence.prompt_length
        return most if max(before, prompt_length) <= most else 0


def token_stream_of(model: Any, kv_dtype: torch.dtype = torch.bfloat16) -> TokenStream | None:
    """A stream of a loaded model; None if its layers do not run on a paged cache.

    Args:
        model: a causal language model, from `engine.loader.load`.
        kv_dtype: what the cache stores, if it is on the CPU.

    Raises:
        PlanDoesNotFitError: not even a short context fits into the DRAM that is free.
    """
    if hasattr(model, "runner"):
        from moesaic.engine.serving.gpu_runner import GpuStepRunner  # needs Triton

        return TokenStream(GpuStepRunner(model.runner, max_batch=1))
    sizes = position_bytes(model, kv_dtype)
    if sizes is None:
        return None
    nbytes = default_cache_bytes(model, *sizes, share=_CACHE_SHARE)
    room = room_for_cache(model, nbytes, max_batch=1, context=DEFAULT_CONTEXT, kv_dtype=kv_dtype)
    if room is None:
        return None
    runner = paged_runner_for(model, room.num_blocks, kv_dtype=kv_dtype, max_batch=1, num_states=room.num_states)
    return None if runner is None else TokenStream(runner)
