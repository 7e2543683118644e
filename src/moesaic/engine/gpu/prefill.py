"""Routed experts of long chunks, layer by layer without a graph: the CPU computes what does not lie on the GPU."""

from __future__ import annotations

import torch

from moesaic.engine.gpu.slots import ExpertSlots
from moesaic.kernels import moe_forward
from moesaic.kernels.experts import PackedExperts
from moesaic.kernels.triton.handoff import Exchange
from moesaic.modules.gpu.step import Routed

__all__ = ["ChunkPath"]


class ChunkPath:
    """Copies hidden states to the CPU and the answer back.

    Args:
        exchange: adds up.
        routed: the routed experts of each layer, on the CPU.
        slots: experts on the GPU.
    """

    def __init__(self, exchange: Exchange, routed: list[PackedExperts | None], slots: ExpertSlots) -> None:
        self._exchange, self._routed, self._slots = exchange, routed, slots
        self._inputs: tuple[torch.Tensor, ...] = ()
        self._ready: torch.cuda.Event | None = None

    def table(self, layer: int) -> torch.Tensor | None:
        """As `ExpertPath`."""
        return self._slots.table(layer)

    def start(self, routed: Routed) -> None:
        """Begin to copy the inputs."""
        if self._slots.is_complete(routed.layer):
            return
        self._inputs = tuple(_to_host(x) for x in (routed.hidden, routed.misses, routed.weights))
        if routed.hidden.is_cuda:
            self._ready = torch.cuda.Event()
            self._ready.record()

    def finish(
        self,
        routed: Routed,
        residual: torch.Tensor,
        shared: torch.Tensor | None,
        shared_gate: torch.Tensor | None,
        scale: float,
    ) -> None:
        """Compute and add."""
        total = self._slots.compute(routed)
        if not self._slots.is_complete(routed.layer):
            if self._ready is not None:
                self._ready.synchronize()
            total = self._on_cpu(routed, total)
        self._exchange.take_back(None, residual, shared=shared, shared_gate=shared_gate, cached=total, scale=scale)

    def _experts(self, layer: int) -> PackedExperts:
        experts = self._routed[layer]
        assert experts is not None, "experts that are all on the GPU are not asked for"
        return experts

    def _on_cpu(self, routed: Routed, total: torch.Tensor | None) -> torch.Tensor:
        """What does not lie on the GPU, added to what does."""
        hidden, misses, weights = self._inputs
        answer = moe_forward(hidden, misses, weights, self._experts(routed.layer))
        back = answer.to(routed.hidden.device, non_blocking=True)
        return back if total is None else total.add_(back)


def _to_host(x: torch.Tensor) -> torch.Tensor:
    if not x.is_cuda:
        return x
    return torch.empty(x.shape, dtype=x.dtype, pin_memory=True).copy_(x, non_blocking=True)
