"""VRAM that the cache of experts lends: to the cache of keys and values when it is full, to prefill while it streams.

All three have addresses for the most that they could ever have, and memory for what they need; it goes from one to the
other in lots, at the end of each. Experts that lose their slots are the least used ones, and slots that come back are
filled again. Activations of long chunks lie in memory of PyTorch's allocator, which may have more for as long as lots
are given back to the device. Memory is moved between steps only, when the GPU has nothing to do. This module decides
when, and knows neither what a block holds nor which expert deserves a slot.
"""

from __future__ import annotations

import logging
import time
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from moesaic.engine.gpu.expert_cache import ExpertCache
from moesaic.engine.gpu.virtual_memory import MemoryDriver, MemoryStock, VirtualBuffer
from moesaic.errors import GenerationError, KernelError
from moesaic.kvcache.paged import BlockPool, KvShape, PoolLayer, pool_bytes
from moesaic.kvcache.pool_memory import pool_layers
from moesaic.placement.lots import VramLots

__all__ = ["LendingFigures", "VramLending"]

_LOG = logging.getLogger("moesaic.gpu")

_STEPS = 16  # from one look at what could come back to the next
_IDLE_LOOKS = 6  # at prefill's buffers, before experts get their memory: until then to wait costs less than to move
_SECONDS = 2.0  # that blocks stay at least, before the experts get their memory back


@dataclass(frozen=True, slots=True)
class LendingFigures:
    """What was moved so far.

    Attributes:
        num_blocks: blocks of keys and values that have memory.
        num_slots: slots of experts that do.
        staging: whether prefill's buffers have theirs.
        moves: how often memory was moved.
        seconds: that it took, in all.
    """

    num_blocks: int
    num_slots: int
    staging: bool
    moves: int
    seconds: float


class VramLending:
    """The memory of three, of which the experts are the lender; a `BlockStore` for the pool.

    Args:
        driver: of the device.
        lots: how they begin, and how far they can go.
        clock: seconds from any start.
        allow: lets activations have so many bytes beside what was set aside for them; False if they hold more.

    Attributes:
        experts: uint8, addresses of slots; the first `lots.slots(...)` have memory.
        staging: uint8, addresses of prefill's buffers, or None; they have memory at first.

    Raises:
        KernelError: the device has less memory than `lots` say.
    """

    def __init__(
        self,
        driver: MemoryDriver,
        lots: VramLots,
        clock: Callable[[], float] = time.monotonic,
        allow: Callable[[int], bool] = lambda nbytes: True,
    ) -> None:
        self.lots, self._driver, self._clock, self._allow = lots, driver, clock, allow
        self._stock = MemoryStock(driver, lots.lot_bytes, lots.total)
        self._keys = VirtualBuffer(self._stock, lots.most_keys, lots.keys)
        self._staging = VirtualBuffer(self._stock, lots.staging, lots.staging) if lots.staging else None
        most = min(lots.most_experts, 2 * lots.total)  # `take_over` may bring some
        self._experts = VirtualBuffer(self._stock, most, min(most, self._stock.num_free))
        self._cache: ExpertCache | None = None
        # Weakly, since the pool has this: VRAM of a model that nobody has any more is free at once.
        self._pool: weakref.ref[BlockPool] | None = None
        self._streams = self._steps = self._looks = self._moves = self._lent_out = 0
        self._last_chunk = 0  # its tokens
        self._seconds, self._extended, self._is_refused = 0.0, clock(), False

    @property
    def experts(self) -> torch.Tensor:
        """Where slots are."""
        return self._experts.data

    @property
    def staging(self) -> torch.Tensor | None:
        """Where prefill's buffers are."""
        return None if self._staging is None else self._staging.data

    @property
    def num_slots(self) -> int:
        """Slots that have memory now."""
        return self.lots.slots(self._experts.num_mapped)

    @property
    def nbytes(self) -> int:
        """Bytes of VRAM that the three have together; PyTorch's allocator does not know of them."""
        return self._stock.nbytes

    def take_over(self, nbytes: int) -> int:
        """Have as many whole lots as that memory makes, which somebody else was to have; bytes of all lots then.

        Raises:
            KernelError: the device has less memory.
        """
        num_lots = nbytes // self.lots.lot_bytes
        self._stock.num_lots += num_lots
        self._experts.resize(min(self._experts.num_lots, self._experts.num_mapped + num_lots))
        return self._stock.num_lots * self.lots.lot_bytes

    def lend_from(self, cache: ExpertCache) -> None:
        """The lender; without one nothing can be lent."""
        self._cache = cache

    def pool(self, shapes: Sequence[KvShape], block_size: int, dtype: torch.dtype) -> tuple[BlockPool, list[PoolLayer]]:
        """The pool, and the layers of these shapes.

        Raises:
            KernelError: a block of these layers has other bytes than `lots` say.
        """
        lots, found = self.lots, pool_bytes(shapes, 1, block_size, dtype)
        if found != lots.block_bytes:
            raise KernelError(f"a block takes {found} bytes, but the plan says {lots.block_bytes}.")
        layers = pool_layers(shapes, self._keys.data, lots.num_blocks, block_size, dtype)
        pool = BlockPool(lots.num_blocks, block_size, self, self._num_backed())
        self._pool = weakref.ref(pool)
        return pool, layers

    def extend(self, num_blocks: int) -> int:
        """As `BlockStore`: memory for blocks, which unused lots, idle buffers of prefill and experts give, in turn."""
        wanted = self.lots.lots_for(num_blocks)
        if wanted > self._keys.num_mapped:
            try:
                self._move(self._keys, wanted)
            except KernelError as error:
                raise GenerationError(
                    f"The cache cannot grow to {num_blocks} blocks: {error} Use a smaller context, fewer requests at "
                    "once, or more --vram."
                ) from error
            self._extended = self._clock()
        return self._num_backed()

    def begin_streaming(self, num_tokens: int) -> None:
        """A chunk of so many tokens is about to use prefill's buffers; KernelError if there is no memory for it.

        It has allocated nothing yet.
        """
        self._streams += 1
        try:
            if self._staging is not None and not self._staging.num_mapped:
                self._move(self._staging, self._staging.num_lots)
            if num_tokens > self.lots.chunk and not self._lent_out:
                self._lend_out(self.lots.long)
            elif num_tokens > self.lots.chunk and num_tokens != self._last_chunk:  # whose tensors would be in the way
                self._allow_out(self._lent_out)
        except BaseException:
            self._streams -= 1
            raise
        self._last_chunk = num_tokens

    def end_streaming(self) -> None:
        """A prefill that had begun needs its buffers no more."""
        self._streams -= 1
        self._steps = self._looks = 0

    def after_step(self) -> None:
        """Let the experts have what nobody has used for a while; after a decode step, when the GPU has nothing to do.

        If the device refuses, they go on with what they have: the step is computed, and nobody else is concerned.
        """
        self._steps += 1
        if self._steps < _STEPS:
            return
        self._steps, self._looks = 0, self._looks + 1
        is_idle = not self._streams and self._looks >= _IDLE_LOOKS
        staging = self._staging if self._staging is not None and is_idle else None
        if not self._streams:
            self._take_back()
        idle = 0 if staging is None else staging.num_mapped
        kept = self._kept_keys()
        wanted = min(self._experts.num_lots, self._experts.num_mapped + self._stock.num_free + idle + kept.spare)
        if self._cache is None or wanted == self._experts.num_mapped:
            return
        began = time.perf_counter()
        self._driver.synchronize()
        if staging is not None:
            staging.resize(0)
        pool = None if self._pool is None else self._pool()
        if kept.spare and pool is not None:
            self._keys.resize(kept.lots)
            pool.num_backed = self._num_backed()
        try:
            self._experts.resize(wanted)
        except KernelError as error:
            if not self._is_refused:
                _LOG.warning("fewer experts are cached than there is VRAM for: %s", error)
            self._is_refused = True
        self._cache.resize(self.num_slots)
        self._count(began)

    def figures(self) -> LendingFigures:
        """What was moved so far."""
        staged = self._staging is not None and self._staging.num_mapped > 0
        return LendingFigures(self._num_backed(), self.num_slots, staged, self._moves, self._seconds)

    def _move(self, buffer: VirtualBuffer, num_lots: int) -> None:
        """Have so many lots in a buffer, at others' cost."""
        began = time.perf_counter()
        self._make_free(num_lots - buffer.num_mapped, buffer)
        buffer.resize(num_lots)
        self._count(began)

    def _lend_out(self, num_lots: int) -> None:
        """Let PyTorch's allocator have so many lots."""
        began = time.perf_counter()
        self._make_free(num_lots)
        self._allow_out(num_lots)
        self._stock.shrink(num_lots)
        self._lent_out = num_lots
        self._count(began)

    def _allow_out(self, num_lots: int) -> None:
        """Let PyTorch's allocator begin anew, with so many lots beside its part."""
        if not self._allow(num_lots * self.lots.lot_bytes):
            raise KernelError("activations hold more memory than the plan set aside for them and experts could lend.")

    def _take_back(self) -> None:
        """Have lots again that PyTorch's allocator needs no more, unless other programs took their memory meanwhile."""
        if not self._lent_out or not self._allow(0):
            return
        lost, self._lent_out = self._lent_out - self._stock.grow(self._lent_out), 0
        if lost:
            size = lost * self.lots.lot_bytes >> 20
            _LOG.warning(
                "%d MiB of VRAM that a long prompt had are another program's now: fewer experts are cached.", size
            )

    def _make_free(self, more: int, buffer: VirtualBuffer | None = None) -> None:
        """Let so many lots be free, at the cost of others than a buffer."""
        self._driver.synchronize()
        if more > self._stock.num_free and not self._streams:
            self._take_back()
        short = more - self._stock.num_free
        if short > 0 and self._staging is not None and self._staging is not buffer and not self._streams:
            self._staging.resize(0)
            short = more - self._stock.num_free
        if short > 0:
            left = self._experts.num_mapped - short
            if left < self.lots.least or self._cache is None:
                raise KernelError(f"{short} lots of {self.lots.lot_bytes >> 20} MiB are missing.")
            self._cache.resize(self.lots.slots(left))
            self._driver.synchronize()  # what was copied to slots that stay has come from those that go
            self._experts.resize(left)

    def _kept_keys(self) -> _Kept:
        """What the pool keeps: what it began with, what is held, and all of it while it was extended a moment ago."""
        mapped, pool = self._keys.num_mapped, None if self._pool is None else self._pool()
        if pool is None or mapped <= self.lots.keys or self._clock() - self._extended < _SECONDS:
            return _Kept(mapped, 0)
        kept = max(self.lots.keys, self.lots.lots_for(pool.end))
        return _Kept(kept, mapped - kept)

    def _num_backed(self) -> int:
        return min(self.lots.num_blocks, self._keys.nbytes // self.lots.block_bytes)

    def _count(self, began: float) -> None:
        self._moves += 1
        self._seconds += time.perf_counter() - began


@dataclass(frozen=True, slots=True)
class _Kept:
    """Lots that the pool keeps, and those that it can give back."""

    lots: int
    spare: int
