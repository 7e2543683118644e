"""What every program of the comparison is asked to compute, and what it costs in bytes. It knows no program's calls.

Only the standard library and (in `routings`) torch are needed: workers run in the environments of other programs.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

__all__ = ["GGUF_TYPES", "MODELS", "PAIRINGS", "Dims", "Pairing", "Size", "choose_size", "routings"]

WORKING_SET = 8  # times the last-level cache
MAX_LAYERS = 64


@dataclass(frozen=True)
class Dims:
    """The routed experts of one layer of a published model."""

    hidden: int
    intermediate: int
    num_experts: int
    top_k: int

    @property
    def weights(self) -> int:
        """Weights of one expert."""
        return 3 * self.hidden * self.intermediate


MODELS = {
    "qwen3-30b-a3b": Dims(2048, 768, 128, 8),
    "deepseek-v3": Dims(7168, 2048, 256, 8),
}

# ggml's number, weights per block, bytes per block
GGUF_TYPES = {"Q4_K": (12, 256, 144), "Q2_K": (10, 256, 84), "Q8_0": (8, 32, 34), "IQ1_S": (19, 256, 50)}


@dataclass(frozen=True)
class Pairing:
    """A format of kt-kernel and the one of ours that stands nearest to it.

    Attributes:
        backend: kt-kernel's method.
        bytes_per_weight: of kt-kernel's format as published, scales included, but not one float per row.
        loading: bytes per weight that kt-kernel holds at once while it loads (sources and copies).
        ours: our formats, the first that this build has is taken.
    """

    backend: str
    bytes_per_weight: float
    loading: float
    ours: tuple[str, ...]
    scale_per_row: bool = False

    def expert_bytes(self, dims: Dims) -> int:
        """Bytes of one expert in kt-kernel's format."""
        per_row = 4 * (2 * dims.intermediate + dims.hidden) if self.scale_per_row else 0
        return math.ceil(dims.weights * self.bytes_per_weight) + per_row


def _gguf(name: str, *held: str) -> Pairing:
    """A type of GGUF; `held`: what it is held as by plan `auto`, if not as it is."""
    _, block_size, block_bytes = GGUF_TYPES[name]
    return Pairing("LLAMAFILE", block_bytes / block_size, 2 * block_bytes / block_size, (*held, name))


PAIRINGS = {
    "Q4_K": _gguf("Q4_K"),
    "AMXINT4": Pairing("AMXINT4", 0.5, 4.5, ("Q4_0",), scale_per_row=True),
    "Q2_K": _gguf("Q2_K"),
    "IQ1_S": _gguf("IQ1_S", "IQ1_S_TERNARY"),
    "Q8_0": _gguf("Q8_0"),
    "AMXINT8": Pairing("AMXINT8", 1.0, 5.0, ("Q8_0",), scale_per_row=True),
    "BF16": Pairing("BF16", 2.0, 4.0, ("BF16",)),
    "RAWINT4": Pairing("RAWINT4", 0.5 + 2 / 32, 1.6875, ("INT4_32_BF16", "INT4_32_F16", "Q4_0")),
    "FP8": Pairing("FP8", 1.0 + 4 / 128**2, 2.01, ("FP8", "Q8_0")),
}


@dataclass(frozen=True)
class Size:
    """How much of a model both programs hold: so many layers of so many experts each, `note` says what is cut."""

    num_experts: int
    num_layers: int
    note: str = ""


def choose_size(
    dims: Dims, pairing: Pairing, cache_bytes: int, memory_bytes: int, programs: int, most: int
) -> Size | None:
    """The largest part of a model (at most `most` experts) that fits once per program, in layers to outgrow the cache.

    Returns:
        None where not even twice the experts of one token fit.
    """
    held = 1.1 * programs * pairing.expert_bytes(dims)  # our format may be a little larger
    loading = dims.weights * pairing.loading
    num_experts = min(dims.num_experts, most, int(memory_bytes // max(held, loading)))
    if num_experts < 2 * dims.top_k:
        return None
    wanted = math.ceil(WORKING_SET * cache_bytes / (num_experts * pairing.expert_bytes(dims)))
    while_loading = 1 + (memory_bytes - loading * num_experts) // (num_experts * pairing.expert_bytes(dims))
    fitting = int(min(memory_bytes // (held * num_experts), while_loading))
    num_layers = max(1, min(wanted, fitting, MAX_LAYERS))
    notes = []
    if num_experts < dims.num_experts:
        why = "as asked" if num_experts == most else "memory"
        notes.append(f"{num_experts} of {dims.num_experts} experts ({why})")
    if num_layers < wanted:
        times = num_layers * num_experts * pairing.expert_bytes(dims) / cache_bytes
        notes.append(f"weights only {times:.1f} times the last-level cache")
    return Size(num_experts, num_layers, "; ".join(notes))


def routings(dims: Dims, num_experts: int, num_tokens: int, seed: int) -> Iterator[torch.Tensor]:
    """Endless uniform choices of experts, int64 `[num_tokens, top_k]`, different each time, the same for each seed."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    while True:
        yield torch.rand(num_tokens, num_experts, generator=generator).topk(dims.top_k, dim=1).indices.contiguous()
