"""The decode speed that bandwidths allow: bytes that a token reads over how fast they can be read.

An upper bound of a step at a short context: nothing is computed, handed over or found in the expert cache. It knows no
kernels; `engine.estimate` measures them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from moesaic.placement.roles import layer_of

if TYPE_CHECKING:
    from moesaic.placement.plan import Plan

__all__ = ["Bandwidths", "Roofline", "decode_roofline"]

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
        overlap_seconds: of these, when both are read: shared experts while the CPU has the routed ones.
    """

    dram_seconds: float
    vram_seconds: float | None
    overlap_seconds: float

    @property
    def tokens_per_second(self) -> float:
        """At most; without the VRAM's part where that is unknown."""
        return 1.0 / (self.dram_seconds + (self.vram_seconds or 0.0) - self.overlap_seconds)


def decode_roofline(plan: Plan, bandwidths: Bandwidths) -> Roofline | None:
    """The bound of a plan, or None without the bandwidth of DRAM, or of VRAM where all is read from there.

    A layer's attention and router have to be done before the CPU knows its experts, so only shared experts overlap.
    """
    if bandwidths.dram is None or (bandwidths.vram is None and not plan.bytes_per_token_on("cpu")):
        return None
    dram = plan.bytes_per_token_on("cpu") / (bandwidths.dram * _GIGA)
    if not plan.uses_gpu or bandwidths.vram is None:
        return Roofline(dram, None if plan.uses_gpu else 0.0, 0.0)
    vram = plan.bytes_per_token_on("gpu") / (bandwidths.vram * _GIGA)
    routed, shared = _bytes_by_layer(plan, "experts", "cpu"), _bytes_by_layer(plan, "shared_experts", "gpu")
    overlap = sum(
        min(size / (bandwidths.dram * _GIGA), shared.get(layer, 0) / (bandwidths.vram * _GIGA))
        for layer, size in routed.items()
    )
    return Roofline(dram, vram, overlap)


def _bytes_by_layer(plan: Plan, role: str, device: str) -> dict[int | None, int]:
    found: dict[int | None, int] = {}
    for entry in plan.entries:
        if entry.role == role and entry.device == device:
            layer = layer_of(entry.module)
            found[layer] = found.get(layer, 0) + entry.bytes_per_token
    return found
