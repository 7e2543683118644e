"""Routed experts of long chunks: the GPU computes some that are streamed to it while the CPU computes the others.

A layer's experts come in groups into two buffers: while one is multiplied, the other is filled by a copy stream. All
of the GPU's share is queued before the CPU begins with its own, so both work at the same time.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

import numpy as np
import torch

from moesaic.engine.gpu.prefill import ChunkPath
from moesaic.engine.gpu.shares import ExpertShares
from moesaic.engine.gpu.slots import ExpertSlots
from moesaic.kernels import moe_forward
from moesaic.kernels.experts import PackedExperts
from moesaic.kernels.triton.handoff import Exchange
from moesaic.modules.gpu.experts import copy_expert, slot_layout
from moesaic.modules.gpu.step import Routed

__all__ = ["StagingBuffers", "StreamingPath"]


class StagingBuffers:
    """Two buffers of equal slots in VRAM.

    Args:
        routed: the routed experts of every layer.
        group: experts in a buffer.
        device: the GPU.
    """

    def __init__(self, routed: Sequence[PackedExperts], group: int, device: torch.device) -> None:
        self.layouts = [slot_layout(experts, device) for experts in routed]
        self.slot_bytes = max(layout.nbytes for layout in self.layouts)
        self.group, self.device = group, device
        self.buffers = [torch.empty(group * self.slot_bytes, dtype=torch.uint8, device=device) for _ in range(2)]
        self.stream = torch.cuda.Stream(device)
        self.free = [torch.cuda.Event() for _ in range(2)]


class StreamingPath(ChunkPath):
    """As `ChunkPath`, with a share of the experts computed by the GPU.

    Args:
        exchange, routed, slots: as for `ChunkPath`.
        staging: where streamed experts go.
        shares: who computes what.
    """

    def __init__(
        self,
        exchange: Exchange,
        routed: list[PackedExperts | None],
        slots: ExpertSlots,
        staging: StagingBuffers,
        shares: ExpertShares,
    ) -> None:
        super().__init__(exchange, routed, slots)
        self._staging, self._shares = staging, shares
        self._pending: tuple[int, torch.cuda.Event, torch.cuda.Event] | None = None

    def _on_cpu(self, routed: Routed, total: torch.Tensor | None) -> torch.Tensor:
        """What does not lie on the GPU, added to what does."""
        self._observe_uploads()
        hidden, misses, weights = self._inputs
        experts = self._experts(routed.layer)
        flat = misses.flatten().numpy()
        tokens = np.bincount(flat[flat >= 0], minlength=experts.num_experts)
        streamed = self._shares.choose(tokens)
        if streamed.any():
            total = self._stream(routed, np.flatnonzero(streamed), total)
            # Index -1 (no expert) is the last element.
            is_streamed = torch.from_numpy(np.append(streamed, False))
            misses = misses.masked_fill(is_streamed[misses], -1)
        kept = tokens * ~streamed
        if not kept.any():
            assert total is not None or not tokens.any()
            return torch.zeros_like(routed.hidden) if total is None else total
        started = time.perf_counter()
        answer = moe_forward(hidden, misses, weights, experts)
        self._shares.observe_cpu(int(np.count_nonzero(kept)), int(kept.sum()), time.perf_counter() - started)
        back = answer.pin_memory().to(routed.hidden.device, non_blocking=True)
        return back if total is None else total.add_(back)

    def _stream(self, routed: Routed, chosen: np.ndarray, total: torch.Tensor | None) -> torch.Tensor:
        """Queue copies of these experts and products with them; returns the sum with `total`."""
        staging, experts = self._staging, self._experts(routed.layer)
        layout = staging.layouts[routed.layer]
        main = torch.cuda.current_stream(staging.device)
        total = torch.zeros_like(routed.hidden) if total is None else total
        tables = np.full((-(-len(chosen) // staging.group), experts.num_experts + 1), -1, np.int32)
        for position, expert in enumerate(chosen):
            tables[position // staging.group, expert] = position % staging.group
        on_device = torch.from_numpy(tables).pin_memory().to(staging.device, non_blocking=True)
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        staging.stream.wait_stream(main)
        for index, table in enumerate(on_device):
            which = index % 2
            buffer = staging.buffers[which]
            with torch.cuda.stream(staging.stream):
                staging.stream.wait_event(staging.free[which])
                if index == 0:
                    begin.record()
                for slot, expert in enumerate(chosen[index * staging.group : (index + 1) * staging.group]):
                    copy_expert(experts, int(expert), layout, buffer[slot * staging.slot_bytes :])
                filled = torch.cuda.Event()
                filled.record()
            main.wait_event(filled)
            slots = table[routed.misses]
            layout.accumulate(
                routed.hidden, slots, routed.misses, routed.weights, buffer, staging.slot_bytes, staging.group, total
            )
            staging.free[which].record(main)
        end.record(main)  # behind the last product: copies alone would hide a GPU that is slower than its link
        self._pending = (len(chosen), begin, end)
        return total

    def _observe_uploads(self) -> None:
        """Take the time of the layer before: by now it is complete."""
        if self._pending is not None and self._pending[2].query():
            count, begin, end = self._pending
            self._shares.observe_uploads(count, begin.elapsed_time(end) / 1e3)
