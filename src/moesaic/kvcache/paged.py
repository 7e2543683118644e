"""A paged cache: keys, values and MLA latents in blocks of positions that sequences take from a pool and give back.

A block has the same number in all layers, so one table per sequence serves the whole model. `BlockPool` counts how many
sequences hold a block; `PoolLayer` is the memory of a layer; `PagedSequence` is a table, a length and, for models with
linear attention, the slot of a recurrent state (`states`). Where the tokens of a step go is `step_input`'s business.
This module does not know what computes attention.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch

from moesaic.errors import GenerationError, KernelError
from moesaic.kvcache.states import StatePool

__all__ = ["BlockPool", "BlockStore", "KvShape", "PagedSequence", "PoolLayer", "check_dtype", "pool_bytes"]

POOL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
"""What a pool may store."""


@dataclass(frozen=True, slots=True)
class KvShape:
    """What a layer stores per position.

    Attributes:
        kv_heads: heads of keys and values; 1 for latents.
        key_dim: of a key; of MLA, of a latent and a rotary key together.
        value_dim: of a value; 0 for MLA, whose values are the latents.
    """

    kv_heads: int
    key_dim: int
    value_dim: int

    @classmethod
    def latent(cls, latent_dim: int, rope_dim: int) -> KvShape:
        """Of multi-head latent attention."""
        return cls(1, latent_dim + rope_dim, 0)

    @property
    def width(self) -> int:
        """Numbers per position."""
        return self.kv_heads * (self.key_dim + self.value_dim)


def pool_bytes(layers: Iterable[KvShape], num_blocks: int, block_size: int, dtype: torch.dtype) -> int:
    """Bytes that the pools of these layers take, to the byte; of one block if num_blocks is 1."""
    return num_blocks * block_size * dtype.itemsize * sum(layer.width for layer in layers)


def check_dtype(dtype: torch.dtype) -> None:
    """KernelError if a pool cannot store it."""
    if dtype not in POOL_DTYPES:
        raise KernelError(f"a cache of {dtype}: expected one of {', '.join(map(str, POOL_DTYPES))}.")


@dataclass(frozen=True, slots=True)
class PoolLayer:
    """The memory of one layer, uninitialised: kernels read only positions that have been written.

    Attributes:
        keys: `[num_blocks, block_size, kv_heads, key_dim]`; of MLA `[num_blocks, block_size, latent_dim + rope_dim]`.
        values: `[num_blocks, block_size, kv_heads, value_dim]`, or None for MLA.
    """

    keys: torch.Tensor
    values: torch.Tensor | None

    @classmethod
    def empty(
        cls,
        shape: KvShape,
        num_blocks: int,
        block_size: int,
        dtype: torch.dtype = torch.bfloat16,
        device: torch.device | str = "cpu",
    ) -> PoolLayer:
        """Allocate; KernelError if a pool cannot store the dtype."""
        check_dtype(dtype)
        if shape.value_dim == 0:
            return cls(torch.empty(num_blocks, block_size, shape.key_dim, dtype=dtype, device=device), None)
        heads = (num_blocks, block_size, shape.kv_heads)
        keys, values = (
            torch.empty(*heads, dim, dtype=dtype, device=device) for dim in (shape.key_dim, shape.value_dim)
        )
        return cls(keys, values)

    def copy(self, source: torch.Tensor, target: torch.Tensor) -> None:
        """Give blocks, int64 `[blocks]`, the contents of other ones."""
        for states in (self.keys, self.values):
            if states is not None:
                states[target] = states[source]


class BlockStore(Protocol):
    """Memory behind the first blocks of a pool, which comes when it is needed."""

    def extend(self, num_blocks: int) -> int:
        """Have memory behind so many blocks at least; behind how many there is now.

        Raises:
            GenerationError: there is none.
        """


class BlockPool:
    """Hands out the numbers of blocks, the lowest first; a block is free when nobody holds it.

    Args:
        num_blocks: blocks of every layer.
        block_size: positions of a block.
        store: memory behind the blocks, if not all of them have it from the beginning.
        num_backed: blocks that do; all if None.

    Attributes:
        num_backed: blocks that have memory; the others get it when they are taken.
        num_own: of those, blocks that keep it.
    """

    def __init__(
        self, num_blocks: int, block_size: int, store: BlockStore | None = None, num_backed: int | None = None
    ) -> None:
        if num_blocks < 1 or block_size < 1:
            raise KernelError(f"a pool of {num_blocks} blocks of {block_size} positions: expected at least 1 of each.")
        self.num_blocks, self.block_size = num_blocks, block_size
        self.num_backed = self.num_own = num_blocks if num_backed is None else num_backed
        self._store = store
        self._holders = [0] * num_blocks
        self._free = list(range(num_blocks))  # a heap

    @property
    def num_free(self) -> int:
        """Blocks that nobody holds, those that would have to get memory first among them."""
        return len(self._free)

    @property
    def num_free_backed(self) -> int:
        """Blocks that nobody holds and that have memory."""
        return self.num_backed - (self.num_blocks - len(self._free))

    @property
    def end(self) -> int:
        """The number behind the last block that is held."""
        return next((block + 1 for block in range(self.num_backed - 1, -1, -1) if self._holders[block]), 0)

    def blocks_for(self, length: int) -> int:
        """Blocks that so many positions take."""
        return -(-length // self.block_size)

    def holders(self, block: int) -> int:
        """How often a block is held."""
        return self._holders[block]

    def take(self, count: int) -> list[int]:
        """Numbers of `count` blocks, held once.

        Raises:
            GenerationError: fewer are free, or there is no memory for them after all; none is taken.
        """
        if count > len(self._free):
            raise GenerationError(
                f"The cache is full: {count} blocks of {self.block_size} positions are needed and {len(self._free)} of "
                f"{self.num_blocks} are free. Use a smaller context, fewer requests at once, or a larger cache."
            )
        taken = [heapq.heappop(self._free) for _ in range(count)]
        if taken and taken[-1] >= self.num_backed and self._store is not None:
            try:
                self.num_backed = self._store.extend(taken[-1] + 1)
            except BaseException:
                for block in taken:
                    heapq.heappush(self._free, block)
                raise
        for block in taken:
            self._holders[block] = 1
        return taken

    def hold(self, blocks: Iterable[int]) -> None:
        """Hold blocks once more that somebody holds already (sequences with a common beginning)."""
        for block in blocks:
            if self._holders[block] < 1:
                raise KernelError(f"block {block} is held by nobody, so its contents cannot be shared.")
            self._holders[block] += 1

    def give_back(self, blocks: Iterable[int]) -> None:
        """Hold blocks once less; those that nobody holds any more are free."""
        for block in blocks:
            if self._holders[block] < 1:
                raise KernelError(f"block {block} is given back, but nobody holds it.")
            self._holders[block] -= 1
            if self._holders[block] == 0:
                heapq.heappush(self._free, block)


class PagedSequence:
    """Where the positions of one sequence lie.

    Args:
        pool: where its blocks come from.
        states: where its recurrent state comes from, if the model has any.

    Attributes:
        length: positions that it has.
        prompt_length: tokens of its prompt, whether they are here or not; 0: nobody has said. Where rotary angles
            change with the length, what is computed depends on it.
    """

    def __init__(self, pool: BlockPool, states: StatePool | None = None) -> None:
        self.pool, self._states = pool, states
        self.prompt_length = 0
        self._state_slot: int | None = None
        self.length = 0
        self._blocks: list[int] = []
        self._table = np.empty(16, np.int32)  # the same numbers, with room; copied into steps

    @property
    def blocks(self) -> tuple[int, ...]:
        """Numbers of its blocks, in the order of positions."""
        return tuple(self._blocks)

    @property
    def table(self) -> torch.Tensor:
        """The same as int32 `[blocks]`, a view that the next `append` may make stale."""
        return torch.from_numpy(self.table_array)

    @property
    def table_array(self) -> np.ndarray:
        """The same as an array."""
        return self._table[: len(self._blocks)]

    @property
    def state_slot(self) -> int:
        """The slot of its recurrent state; -1 if it has none, or no positions yet."""
        return -1 if self._state_slot is None else self._state_slot

    @property
    def is_recurrent(self) -> bool:
        """Whether it has a recurrent state, so that it can only be forgotten as a whole."""
        return self._states is not None

    def adopt(self, blocks: Sequence[int]) -> None:
        """Begin with whole blocks that are full already, and held for this sequence.

        Raises:
            KernelError: the sequence has positions, or a recurrent state, which no block holds.
        """
        if self.length or self.is_recurrent:
            what = "a recurrent state" if self.is_recurrent else f"{self.length} positions"
            raise KernelError(f"adopt() of {len(blocks)} blocks by a sequence with {what}: expected an empty one.")
        self._extend(list(blocks))
        self.length = len(blocks) * self.pool.block_size

    def append(self, num_tokens: int) -> torch.Tensor:
        """Make room for `num_tokens` more positions, which are then part of the sequence.

        Returns:
            Where each of them lies: int64 `[num_tokens]`, `block * block_size + offset`.

        Raises:
            GenerationError: too few blocks, or no state, are free; the sequence is as before.
        """
        if num_tokens < 0:
            raise KernelError(f"append({num_tokens}): expected a number of tokens.")
        start, end = self.length, self.length + num_tokens
        self._make_room(end)
        return self.slots(start, end)

    def slots(self, first: int, end: int) -> torch.Tensor:
        """Where positions lie that the sequence has: int64 `[end - first]`, as `append` says.

        Raises:
            KernelError: it does not have them.
        """
        if not 0 <= first <= end <= self.length:
            raise KernelError(f"positions {first} to {end} of a sequence of {self.length}.")
        size, positions = self.pool.block_size, np.arange(first, end)
        return torch.from_numpy(self._table[positions // size].astype(np.int64) * size + positions % size)

    def append_one(self) -> int:
        """As `append(1)`: where the position lies."""
        position = self.length
        self._make_room(position + 1)
        return self._blocks[position // self.pool.block_size] * self.pool.block_size + position % self.pool.block_size

    def _make_room(self, end: int) -> None:
        """Take blocks, and a state, for positions up to `end`, or nothing of them."""
        blocks = self.pool.take(max(0, self.pool.blocks_for(end) - len(self._blocks)))
        if self._states is not None and self._state_slot is None and end > self.length:
            try:
                self._state_slot = self._states.take()
            except GenerationError:
                self.pool.give_back(blocks)
                raise
        self._extend(blocks)
        self.length = end

    def _extend(self, blocks: list[int]) -> None:
        if not blocks:
            return
        first, self._blocks = len(self._blocks), self._blocks + blocks
        if len(self._blocks) > len(self._table):
            table = np.empty(2 * len(self._blocks), np.int32)
            table[:first] = self._table[:first]
            self._table = table
        self._table[first : len(self._blocks)] = blocks

    def truncate(self, length: int) -> None:
        """Forget all positions from `length` on; blocks without positions go back to the pool, and so does the state.

        Raises:
            KernelError: the sequence is shorter than that, or has a recurrent state and would keep a part.
        """
        if not 0 <= length <= self.length:
            raise KernelError(f"truncate({length}) of a sequence of {self.length} positions.")
        if self.is_recurrent and 0 < length < self.length:
            raise KernelError(
                f"truncate({length}) of a sequence of {self.length} positions with a recurrent state, which cannot go "
                "back: forget all of it and begin anew."
            )
        self.undo(length)

    def undo(self, length: int) -> None:
        """Take an `append` back that no step has computed: as `truncate`, but a recurrent state may stay as it is."""
        if length == 0 and self._states is not None and self._state_slot is not None:
            self._states.give_back(self._state_slot)
            self._state_slot = None
        kept = self.pool.blocks_for(length)
        self.pool.give_back(reversed(self._blocks[kept:]))
        del self._blocks[kept:]
        self.length = length

    def free(self) -> None:
        """Forget everything; the sequence may be used again."""
        self.truncate(0)
