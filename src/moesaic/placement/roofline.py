"""The decode speed that bandwidths allow: bytes that a token reads over how fast they can be read.

An upper bound of a step at a short context: nothing is computed, and CPU and GPU hand over to each other as quickly as
they should. It knows no kernels; `engine.estimate` measures them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from moesaic.placement.roles import layer_of

if TYPE_CHECKING:
    from moesaic.placement.plan import Plan

__all__ = ["HANDOFF_SECONDS", "Bandwidths", "Roofline", "decode_roofline"]

HANDOFF_SECONDS = 10e-6
"""Of a layer that asks the CPU for experts, there and back."""

_GIGA = 1e9


@dataclass(frozen=True, slots=True)
class Bandwidths:
    """GB/s (10**9 bytes) at which memory is read; None if unknown."""

    dram: float | None = None
    vram: float | None = None


@dataclass(frozen=True, slots=True)
class Roofline:
    """Times of a token.

    Attributes:
        dram_seconds: to read what lies in DRAM.
        vram_seconds: to read what lies in VRAM; None if its bandwidth is not known.
        overlap_seconds: of these, when both are read: shared and cached experts while the CPU has the others.
        handoff_seconds: of all layers that ask the CPU for experts.
    """

    dram_seconds: float
    vram_seconds: float | None
    overlap_seconds: float
    handoff_seconds: float = 0.0

    @property
    def tokens_per_second(self) -> float:
        """At most; without the VRAM's part where that is unknown."""
        read = self.dram_seconds + (self.vram_seconds or 0.0) - self.overlap_seconds
        return 1.0 / (read + self.handoff_seconds)


def decode_roofline(plan: Plan, bandwidths: Bandwidths, hit_rate: float = 0.0) -> Roofline | None:
    """The bound of a plan, or None without the bandwidth of DRAM, or of VRAM where all is read from there.

    A layer's attention and router have to be done before the CPU knows its experts, so only other experts overlap.

    Args:
        plan: what is read where.
        bandwidths: how fast.
        hit_rate: share of the experts in DRAM that a token finds in a cache in VRAM.
    """
    if bandwidths.dram is None or (bandwidths.vram is None and not plan.bytes_per_token_on("cpu")):
        return None
    routed, shared = _bytes_by_layer(plan, "experts", "cpu"), _bytes_by_layer(plan, "shared_experts", "gpu")
    found: dict[int | None, float] = {
        layer: hit_rate * size for layer, size in routed.items() if layer in plan.gpu_layers
    }
    hits, handoff = sum(found.values()), HANDOFF_SECONDS * len(found)
    dram = (plan.bytes_per_token_on("cpu") - hits) / (bandwidths.dram * _GIGA)
    if not plan.uses_gpu or bandwidths.vram is None:
        return Roofline(dram, None if plan.uses_gpu else 0.0, 0.0, handoff)
    vram = (plan.bytes_per_token_on("gpu") + hits) / (bandwidths.vram * _GIGA)
    overlap = sum(
        min(
            (size - found.get(layer, 0.0)) / (bandwidths.dram * _GIGA),
            (shared.get(layer, 0) + found.get(layer, 0.0)) / (bandwidths.vram * _GIGA),
        )
        for layer, size in routed.items()
    )
    return Roofline(dram, vram, overlap, handoff)


def _bytes_by_layer(plan: Plan, role: str, device: str) -> dict[int | None, int]:
    found: dict[int | None, int] = {}
    for entry in plan.entries:
        if entry.role == role and entry.device == device:
            layer = layer_of(entry.module)
            found[layer] = found.get(layer, 0) + entry.bytes_per_token
    return found
