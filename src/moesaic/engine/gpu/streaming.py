"""Routed experts of long chunks: the GPU computes some that are streamed to it while the CPU computes the others.

A layer's experts come in groups: while some are multiplied, others are on their way. All of the GPU's share is queued
before the CPU begins with its own, so both work at the same time. Then the first experts of the next layer set out, so
that the link does not wait for attention and the router: a guess, which costs time if it is wrong and nothing else,
because an expert that comes for nothing is not multiplied, and one that does not come is the CPU's.
"""

from __future__ import annotations

import time

import numpy as np
import torch

from moesaic.engine.gpu.prefill import ChunkBuffers, ChunkPath
from moesaic.engine.gpu.shares import ExpertShares
from moesaic.engine.gpu.slots import ExpertSlots
from moesaic.engine.gpu.staging import StagedGroup, StagingBuffers
from moesaic.engine.gpu.streams import Mark
from moesaic.kernels.experts import PackedExperts
from moesaic.kernels.triton.few_experts import MAX_DECODE_TOKENS
from moesaic.kernels.triton.grouped_experts import ExpertBlocks, ExpertPairs
from moesaic.kernels.triton.handoff import Exchange
from moesaic.kernels.triton.loading import num_loaded
from moesaic.modules.gpu.step import Routed

__all__ = ["StreamingPath"]

_LAUNCH_SECONDS = 8e-6  # what it takes to begin a copy


class StreamingPath(ChunkPath):
    """As `ChunkPath`, with a share of the experts computed by the GPU.

    Args:
        exchange, routed, slots, buffers: as for `ChunkPath`.
        staging: where streamed experts go.
        shares: who computes what.
        num_rows: tokens of the chunk.
        of_some: the layer with routed experts that only some of these tokens go through, if there is one: its experts
            are the CPU's, and do not set out before it.
    """

    def __init__(
        self,
        exchange: Exchange,
        routed: list[PackedExperts | None],
        slots: ExpertSlots,
        buffers: ChunkBuffers,
        staging: StagingBuffers,
        shares: ExpertShares,
        num_rows: int,
        of_some: int | None = None,
    ) -> None:
        super().__init__(exchange, routed, slots, buffers)
        self._staging, self._shares, self._of_some = staging, shares, of_some
        self._ahead: list[StagedGroup] = []  # of the next layer
        self._pending: tuple[int, Mark, Mark] | None = None
        self._chose: tuple[int, int, float] | None = (
            None  # the layer before, kernels compiled, when its choice was known
        )
        if num_rows > MAX_DECODE_TOKENS:
            self._set_out(0, num_rows)

    def _asks_cpu(self, routed: Routed) -> bool:
        """Otherwise hidden states need not be copied."""
        return self._is_for_cpu(routed) or self._shares.asks_cpu(len(routed.hidden))

    def _is_for_cpu(self, routed: Routed) -> bool:
        """Whether the CPU gets all that does not lie on the GPU."""
        return len(routed.hidden) <= MAX_DECODE_TOKENS or routed.layer == self._of_some

    def interrupted(self) -> None:
        """As `ChunkPath`."""
        self._chose = None

    def _compute(self, routed: Routed) -> torch.Tensor:
        """The cached, the streamed, the CPU's."""
        if self._is_for_cpu(routed):
            if routed.layer == self._of_some:
                self._buffers.wait_routing()
                self._observe_last(routed.layer)
            return super()._compute(routed)
        staging, layer = self._staging, routed.layer
        pairs = staging.layouts[layer].pairs(routed.hidden, routed.chosen, routed.weights)
        cached = self._slots.multiply(layer, pairs)
        self._buffers.wait_routing()
        self._observe_last(layer)
        misses = self._buffers.misses
        tokens = np.bincount(misses.flatten().numpy() + 1, minlength=pairs.num_experts + 1)[1:]  # -1: none
        streamed, table = self._stream(routed, tokens, pairs)
        total: torch.Tensor | None = None
        if table is not None or cached is not None:
            all_there = cached if table is None else table if cached is None else torch.maximum(cached, table)
            assert all_there is not None
            total = pairs.sum(all_there)
        del pairs
        kept = tokens * ~streamed
        if not kept.any():
            return torch.zeros_like(routed.hidden) if total is None else total
        self._buffers.fetch_rest(routed.hidden, routed.weights)
        self._buffers.wait_hidden()
        if streamed.any():
            # Index -1 (no expert) is the last element.
            misses = misses.masked_fill(torch.from_numpy(np.append(streamed, False))[misses], -1)
        started = time.perf_counter()
        back = self._on_cpu(routed, misses)
        self._shares.observe_cpu(int(np.count_nonzero(kept)), int(kept.sum()), time.perf_counter() - started)
        return back if total is None else total.add_(back)

    def _stream(self, routed: Routed, tokens: np.ndarray, pairs: ExpertPairs) -> tuple[np.ndarray, torch.Tensor | None]:
        """Queue copies and products.

        Returns:
            Which experts the GPU gets, and their table on it, or None.
        """
        staging, layer = self._staging, routed.layer
        ahead, self._ahead = self._ahead, []
        present = np.zeros(len(tokens), bool)
        for group in ahead:
            present[group.experts] = True
        under_way = sum(len(group.experts) for group in ahead if not staging.is_there(group))
        present &= tokens > 0
        streamed = self._shares.choose(layer, tokens, len(routed.hidden), present, under_way)
        wanted = np.flatnonzero(streamed & ~present)
        groups = [*ahead, *staging.plan(wanted, self._max_gap(layer))]
        table = self._multiply(layer, groups, len(ahead), np.where(streamed, tokens, 0), pairs) if groups else None
        self._set_out(layer + 1, len(routed.hidden))
        return streamed, table

    def _multiply(
        self, layer: int, groups: list[StagedGroup], num_ahead: int, num_pairs: np.ndarray, pairs: ExpertPairs
    ) -> torch.Tensor:
        """Products with groups as they come, the first `num_ahead` of which set out before; the table of all."""
        staging, kernel = self._staging, self._staging.layouts[layer].kernel
        tables = np.full((len(groups) + 1, len(num_pairs)), -1, np.int32)
        counts = np.zeros((len(groups), len(num_pairs)), np.int64)
        for index, group in enumerate(groups):
            counts[index, group.experts] = num_pairs[group.experts]
            tables[index, group.experts] = np.where(num_pairs[group.experts] > 0, group.slots, -1)
        tables[-1] = tables[:-1].max(axis=0)
        first = ExpertBlocks.counts(counts, pairs.block_size)
        on_device, first_on_device = staging.tables.upload(tables, first)
        begun, done = Mark(staging.device, timed=True), Mark(staging.device, timed=True)
        filled = num_ahead
        for index, group in enumerate(groups):
            while filled < min(len(groups), index + staging.num_groups):
                staging.fill(layer, groups[filled], begun if filled == num_ahead else None)
                filled += 1
            staging.use(group)
            blocks = ExpertBlocks(on_device[index], first_on_device[index], int(first[index, -1]))
            pairs.multiply(staging.arenas[group.place], kernel, staging.group, blocks)
            staging.leave(group)
        if len(groups) > num_ahead:
            with staging.copies.use():
                done.set()
            self._pending = (sum(len(group.experts) for group in groups[num_ahead:]), begun, done)
        return on_device[-1]

    def _set_out(self, layer: int, num_rows: int) -> None:
        """Begin to copy experts of the next layer, if there is one and most of them will be streamed anyway."""
        staging = self._staging
        if layer >= len(self._routed) or layer == self._of_some:
            return
        held = self._slots.held(layer)
        outside = np.ones(self._experts(layer).num_experts, bool) if held is None else ~held
        likely = self._shares.likely(layer, num_rows, outside, staging.num_slots)
        self._ahead = staging.plan(likely, 0)
        for group in self._ahead:
            staging.fill(layer, group)

    def _max_gap(self, layer: int) -> int:
        """Experts that are copied in less time than another copy takes to begin."""
        kernel = self._staging.layouts[layer].kernel
        return int((2 if kernel.gate is None else 3) * _LAUNCH_SECONDS / max(self._shares.costs.per_upload, 1e-9))

    def _observe_last(self, layer: int) -> None:
        """Take the times of the layer before, as far as they are known by now."""
        last, self._chose = self._chose, (layer, num_loaded(), time.perf_counter())
        if last is not None and (last[0] + 1, last[1]) == self._chose[:2]:
            self._shares.observe_layer(self._chose[2] - last[2])
        if self._pending is not None and self._pending[2].is_passed():
            count, begun, done = self._pending
            self._shares.observe_uploads(count, done.seconds_since(begun))
            self._pending = None
