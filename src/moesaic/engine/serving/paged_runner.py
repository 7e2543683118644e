"""Runs steps of a model on the CPU on a paged cache: tokens of all sequences go through the layers together.

An expert that several sequences choose is read once for all of them, which is what makes a step of many sequences
cheaper than as many steps. It chooses neither tokens nor whose turn it is; see `runner`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch

from moesaic.engine.serving.cache_room import BLOCK_SIZE
from moesaic.errors import GenerationError, KernelError, UnsupportedModelError
from moesaic.kernels import independent_rows, ops
from moesaic.kernels.paged_model import DecodeStep
from moesaic.kvcache.paged import BlockPool, PagedSequence, PoolLayer
from moesaic.kvcache.states import StateLayer, StatePool, StateShape
from moesaic.kvcache.step_input import StepInput
from moesaic.modules.paged_decoder import PagedDecoder
from moesaic.modules.paged_layers import PagedLayers
from moesaic.modules.rotary import longest_context

__all__ = ["IndependentRows", "PagedRunner", "paged_runner_for"]

IndependentRows = Literal["none", "decode", "all"]
"""In which steps the numbers of a sequence do not depend, to the bit, on what else is in the step. That makes a
difference on processors with tiles (AMX), whose products of many tokens round otherwise than those of few, and with
latent attention, whose prompts are computed in the cheaper of two forms: prompts are much faster so."""


class PagedRunner:
    """A decoder on the CPU with its cache: a `StepRunner`.

    Args:
        decoder: the model.
        num_blocks: blocks of the cache.
        block_size: positions of a block; a divisor or a multiple of 64.
        kv_dtype: what the cache stores.
        max_batch: most sequences of a decode step.
        max_chunk: most tokens of a prefill.
        num_states: sequences that can be there at once, if the model has recurrent states; `max_batch` if None.
        independent: in which steps rows are independent of each other.

    Attributes: as `StepRunner`.
    """

    def __init__(
        self,
        decoder: PagedDecoder,
        num_blocks: int,
        *,
        block_size: int = BLOCK_SIZE,
        kv_dtype: torch.dtype = torch.bfloat16,
        max_batch: int = 64,
        max_chunk: int = 2048,
        num_states: int | None = None,
        independent: IndependentRows = "decode",
    ) -> None:
        self.decoder, self._independent = decoder, independent
        self.pool = BlockPool(num_blocks, block_size)
        self.max_batch, self.max_chunk = max_batch, max_chunk
        self.num_layers, self.vocab_size = decoder.num_layers, decoder.ends.vocab_size
        num_states = num_states or max_batch
        is_recurrent = any(isinstance(shape, StateShape) for shape in decoder.cache_shapes)
        self.states = StatePool(num_states) if is_recurrent else None
        self.on_launch: Callable[[], None] = lambda: None
        self.shares_prefixes, self.shared_positions = not is_recurrent, decoder.angles.shared_positions
        self._layers: PagedLayers | None = decoder.with_caches(
            [
                StateLayer.empty(shape, num_states)
                if isinstance(shape, StateShape)
                else PoolLayer.empty(shape, num_blocks, block_size, kv_dtype)
                for shape in decoder.cache_shapes
            ]
        )
        self._step: DecodeStep | None = decoder.decode_step(self._layers, max_batch)

    @property
    def max_positions(self) -> int:
        """Most positions that a sequence may have."""
        return self.decoder.max_positions

    def new_sequence(self) -> PagedSequence:
        """An empty one."""
        return PagedSequence(self.pool, self.states)

    def decode(self, sequences: Sequence[PagedSequence], token_ids: Sequence[int]) -> torch.Tensor:
        """Append one token to each sequence; see `StepRunner`."""
        if not 1 <= len(sequences) <= self.max_batch or len(token_ids) != len(sequences):
            raise KernelError(f"{len(sequences)} sequences, {len(token_ids)} tokens: expected 1 to {self.max_batch}.")
        step, angles = self._step, self.decoder.angles
        if step is None or not all(angles.in_tables(each.length, each.prompt_length) for each in sequences):
            return self._decode_in_parts(sequences, token_ids)
        self._check_room(sequences, 1)
        before = [sequence.length for sequence in sequences]
        try:
            _fill(step, sequences, token_ids)
            self.on_launch()
            return step.run(len(sequences), independent=self._independent != "none")
        except BaseException:
            for sequence, length in zip(sequences, before, strict=True):
                sequence.truncate(min(length, sequence.length))
            raise

    def decode_likeliest(self, sequences: Sequence[PagedSequence], token_ids: Sequence[int]) -> list[int]:
        """As `StepRunner.decode_likeliest`."""
        return ops.likeliest(self.decode(sequences, token_ids))

    @torch.no_grad()
    def _decode_in_parts(self, sequences: Sequence[PagedSequence], token_ids: Sequence[int]) -> torch.Tensor:
        self.on_launch()
        parts = [(sequence, 1) for sequence in sequences]
        work = self._start(parts, torch.tensor(token_ids, dtype=torch.int64), self._independent != "none")
        try:
            work.advance(self.num_layers)
            return work.logits()
        except BaseException:
            work.abandon()
            raise

    @torch.no_grad()
    def start_prefill(self, parts: Sequence[tuple[PagedSequence, torch.Tensor]]) -> PagedPrefill:
        """Append tokens to sequences; see `StepRunner`."""
        count = sum(len(ids) for _, ids in parts)
        if count > self.max_chunk:
            raise KernelError(f"a prefill of {count} tokens: expected at most {self.max_chunk}.")
        token_ids = torch.cat([ids for _, ids in parts])
        return self._start([(sequence, len(ids)) for sequence, ids in parts], token_ids, self._independent == "all")

    def _start(
        self, parts: list[tuple[PagedSequence, int]], token_ids: torch.Tensor, independent: bool
    ) -> PagedPrefill:
        if self._layers is None:
            raise KernelError("the runner is closed.")
        for sequence, count in parts:
            self._check_room([sequence], count)
        hidden = self.decoder.ends.embed(token_ids)
        return PagedPrefill(self.decoder, self._layers, parts, hidden, independent)

    def _check_room(self, sequences: Sequence[PagedSequence], count: int) -> None:
        for sequence in sequences:
            if sequence.length + count > self.max_positions:
                raise GenerationError(
                    f"a sequence of {sequence.length} tokens cannot get {count} more: the model and its cache have "
                    f"room for {self.max_positions} positions. Use a shorter prompt, or fewer new tokens."
                )

    def prepare(self, num_sequences: int) -> bool:
        """As `StepRunner.prepare`: there is nothing to prepare."""
        return False

    def expert_uses(self) -> tuple[int, int]:
        """There is no cache of experts."""
        return 0, 0

    def forget(self, sequence: PagedSequence) -> None:
        """Give back what a sequence holds."""
        sequence.free()

    def close(self) -> None:
        """Give the cache's memory back; no further call is allowed."""
        self._layers = self._step = None


def _fill(step: DecodeStep, sequences: Sequence[PagedSequence], token_ids: Sequence[int]) -> None:
    """Append a token to each sequence, and say where they are.

    Raises:
        GenerationError: the pool is full; some sequences have their token.
    """
    ids, positions, slots, lengths = step.ids, step.positions, step.slots, step.lengths
    for index, (sequence, token) in enumerate(zip(sequences, token_ids, strict=True)):
        position = sequence.length
        slots[index] = sequence.append_one()
        ids[index], positions[index], lengths[index] = token, position, position + 1
        sequence.prompt_length = sequence.prompt_length or position  # without a word on its prompt: what comes first
    tables = step.tables(max([len(sequence.table_array) for sequence in sequences]))
    for index, sequence in enumerate(sequences):
        table = sequence.table_array
        tables[index, : len(table)] = table


class PagedPrefill:
    """Tokens of sequences on their way through the layers: a `PrefillWork`; a decode step is one too.

    Args:
        decoder: the model.
        layers: its layers with their caches.
        parts: sequences, each with its number of new tokens, which it gets now.
        hidden: their embeddings, float32 `[tokens, hidden_size]`, which the layers overwrite.
        independent: whether rows are independent of each other.

    Raises:
        GenerationError: the cache is full; nothing was appended.
    """

    def __init__(
        self,
        decoder: PagedDecoder,
        layers: PagedLayers,
        parts: list[tuple[PagedSequence, int]],
        hidden: torch.Tensor,
        independent: bool,
    ) -> None:
        self._decoder, self._layers, self._hidden, self._independent = decoder, layers, hidden, independent
        self._before = [(sequence, sequence.length) for sequence, _ in parts]
        self._where = StepInput.build(parts)
        for sequence, _ in parts:  # without a word on its prompt, that is what comes first
            sequence.prompt_length = sequence.prompt_length or sequence.length
        prompts = [sequence.prompt_length for sequence, _ in parts]
        self._angles = decoder.angles(self._where.positions, self._where.query_start, prompts)
        self._done = 0
        self._last: torch.Tensor | None = None  # of each sequence, behind the layers

    @property
    def num_layers_left(self) -> int:
        """Layers still to go."""
        return self._decoder.num_layers - self._done

    @torch.no_grad()
    def advance(self, num_layers: int) -> None:
        """Go through so many more layers, or those that are left."""
        count = min(num_layers, self.num_layers_left)
        finishes = count > 0 and count == self.num_layers_left
        # Of the last layer only the last tokens are asked for; where there are no others, it is a layer like all.
        apart = finishes and len(self._hidden) > len(self._before)
        with independent_rows(self._independent):
            self._layers(self._hidden, self._angles, self._where, self._done, count - apart)
            if apart:
                self._last = self._layers.finish(self._hidden, self._angles, self._where)
            elif finishes:
                self._last = self._hidden
        self._done += count

    @torch.no_grad()
    def logits(self) -> torch.Tensor:
        """float32 `[sequences, vocab_size]` of the last token of each; when no layer is left."""
        if self._last is None:
            raise KernelError(f"{self.num_layers_left} layers are left: there are no logits yet.")
        with independent_rows(self._independent):
            return self._decoder.ends.logits(self._last)

    def abandon(self) -> None:
        """Take the new positions back; the work is over. Sequences with recurrent states are emptied."""
        for sequence, length in self._before:
            sequence.truncate(0 if sequence.is_recurrent else min(length, sequence.length))
        self._done = self._decoder.num_layers


def paged_runner_for(
    model: Any,
    num_blocks: int,
    *,
    block_size: int = BLOCK_SIZE,
    kv_dtype: torch.dtype = torch.bfloat16,
    max_batch: int = 64,
    max_chunk: int = 2048,
    num_states: int | None = None,
    independent: IndependentRows = "decode",
) -> PagedRunner | None:
    """A runner for a loaded model; None if the model cannot be paged, so that another runner has to serve it.

    Args:
        model: a causal language model on the CPU, as `engine.loader.load` gives it.
        num_blocks: blocks of the cache; see `cache_room`.
        block_size: positions of a block; a divisor or a multiple of 64.
        kv_dtype: what the cache stores: bfloat16, float16 or float32.
        max_batch: most sequences of a decode step.
        max_chunk: most tokens of a prefill.
        num_states: recurrent states, if the model has any; `max_batch` if None.
        independent: in which steps rows are independent of each other.
    """
    longest = longest_context(model.config.get_text_config())
    capacity = num_blocks * block_size
    try:
        decoder = PagedDecoder(model, capacity if longest is None else min(capacity, longest))
    except UnsupportedModelError:
        return None
    return PagedRunner(
        decoder,
        num_blocks,
        block_size=block_size,
        kv_dtype=kv_dtype,
        max_batch=max_batch,
        max_chunk=max_chunk,
        num_states=num_states,
        independent=independent,
    )
