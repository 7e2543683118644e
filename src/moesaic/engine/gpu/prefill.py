"""Routed experts of long chunks, layer by layer without a graph: the CPU computes what does not lie on the GPU."""

from __future__ import annotations

import torch

from moesaic.engine.gpu.slots import ExpertSlots
from moesaic.engine.gpu.streams import Mark, SideStream
from moesaic.kernels import moe_forward
from moesaic.kernels.experts import PackedExperts
from moesaic.kernels.triton.activations import Lanes
from moesaic.kernels.triton.combine_norm import NormBefore
from moesaic.kernels.triton.handoff import Exchange
from moesaic.kernels.triton.route import Request
from moesaic.modules.gpu.step import Forecast, Routed

__all__ = ["ChunkBuffers", "ChunkPath"]


class ChunkBuffers:
    """Page-locked memory through which a layer's inputs come to the CPU and its answer goes back.

    One layer of a chunk has it at a time; it grows to the largest chunk that there was.

    Args:
        device: the GPU.

    Attributes:
        hidden: float32 `[tokens, hidden_size]`, valid after `wait_hidden`.
        misses: int64 `[tokens, top_k]`, valid after `wait_routing`.
        weights: float32 `[tokens, top_k]`, valid after `wait_hidden`.
        answer: float32 `[tokens, hidden_size]`, for the CPU to write to.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._down = SideStream(device)
        self._has_routing, self._has_hidden = Mark(device), Mark(device)
        self.hidden = self.answer = self.weights = torch.empty(0, 0)
        self.misses = torch.empty(0, 0, dtype=torch.int64)
        self._has_rest = False
        self._room: dict[str, torch.Tensor] = {}

    def fetch_routing(self, misses: torch.Tensor) -> None:
        """Begin to copy misses from the GPU; what comes next there does not wait for it."""
        self.misses = self._at("misses", misses)
        self._down.follow()
        with self._down.use():
            self.misses.copy_(misses, non_blocking=True)
            self._has_routing.set()
        self._has_rest = False

    def fetch_rest(self, hidden: torch.Tensor, weights: torch.Tensor) -> None:
        """Begin to copy the rest of what the CPU needs; nothing if that was asked for before."""
        if self._has_rest:
            return
        self._has_rest = True
        self.hidden, self.answer = self._at("hidden", hidden), self._at("answer", hidden)
        self.weights = self._at("weights", weights)
        self._down.follow()
        with self._down.use():
            self.weights.copy_(weights, non_blocking=True)
            self.hidden.copy_(hidden, non_blocking=True)
            self._has_hidden.set()

    def wait_routing(self) -> None:
        """Let the calling thread wait for misses."""
        self._has_routing.synchronize()

    def wait_hidden(self) -> None:
        """Let the calling thread wait for the rest."""
        self._has_hidden.synchronize()

    def release(self) -> None:
        """Let the GPU not overwrite the inputs before they are copied."""
        (self._has_hidden if self._has_rest else self._has_routing).wait()

    def _at(self, name: str, like: torch.Tensor) -> torch.Tensor:
        room = self._room.get(name)
        if room is None or room.numel() < like.numel():
            self._room.pop(name, None)
            room = torch.empty(like.numel(), dtype=like.dtype, pin_memory=self._device.type == "cuda")
            self._room[name] = room
        return room[: like.numel()].view(like.shape)


class ChunkPath:
    """Copies hidden states to the CPU and the answer back.

    Args:
        exchange: adds up.
        routed: the routed experts of each layer, on the CPU.
        slots: experts on the GPU.
        buffers: for inputs and answers.
    """

    def __init__(
        self, exchange: Exchange, routed: list[PackedExperts | None], slots: ExpertSlots, buffers: ChunkBuffers
    ) -> None:
        self._exchange, self._routed, self._slots, self._buffers = exchange, routed, slots, buffers

    def table(self, layer: int) -> torch.Tensor | None:
        """As `ExpertPath`."""
        return self._slots.table(layer)

    def request(self, layer: int) -> Request | None:
        """As `ExpertPath`: the CPU is asked otherwise."""
        return None

    def forecast(self, layer: int, num_tokens: int) -> Forecast | None:
        """As `ExpertPath`: nobody waits for it."""
        return None

    def start(self, routed: Routed) -> None:
        """Begin to copy the inputs."""
        if not self._slots.has_all(routed.layer):
            self._buffers.fetch_routing(routed.misses)
            if self._asks_cpu(routed):
                self._buffers.fetch_rest(routed.hidden, routed.weights)

    def finish(
        self,
        routed: Routed,
        residual: torch.Tensor,
        shared: torch.Tensor | None,
        shared_gate: torch.Tensor | None,
        scale: float,
        then: NormBefore | None = None,
    ) -> Lanes | None:
        """Compute and add."""
        if self._slots.has_all(routed.layer):
            total = self._slots.compute(routed)
        else:
            total = self._compute(routed)
            self._buffers.release()
        return self._exchange.take_back(
            None, residual, shared=shared, shared_gate=shared_gate, cached=total, scale=scale, then=then
        )

    def interrupted(self) -> None:
        """Something else was computed since the last layer: the time since then says nothing."""

    def _experts(self, layer: int) -> PackedExperts:
        experts = self._routed[layer]
        assert experts is not None, "experts that are all on the GPU are not asked for"
        return experts

    def _asks_cpu(self, routed: Routed) -> bool:
        """Whether the CPU probably gets some of these."""
        return True

    def _compute(self, routed: Routed) -> torch.Tensor:
        """What lies on the GPU and what does not."""
        total = self._slots.compute(routed)
        self._buffers.wait_hidden()
        back = self._on_cpu(routed, self._buffers.misses)
        return back if total is None else total.add_(back)

    def _on_cpu(self, routed: Routed, misses: torch.Tensor) -> torch.Tensor:
        """These experts, computed by the CPU; the inputs have arrived."""
        buffers = self._buffers
        moe_forward(buffers.hidden, misses, buffers.weights, self._experts(routed.layer), out=buffers.answer)
        return buffers.answer.to(routed.hidden.device, non_blocking=True, copy=True)
