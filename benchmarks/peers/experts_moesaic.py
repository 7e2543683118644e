"""Worker: the routed experts of Moesaic."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from random_blocks import random_rows
from worker import serve
from workload import Dims

from moesaic.kernels import (
    Activation,
    PackedExperts,
    PackedTensor,
    active_isa,
    moe_forward,
    set_num_threads,
)
from moesaic.quant import get_format

_NUM_PACKED = 4  # experts with weights of their own; the others hold copies of these, in memory of their own


class Moesaic:
    """Experts in our packed layout."""

    def __init__(self, request: dict[str, Any], dims: Dims) -> None:
        set_num_threads(request["threads"])
        weight_format = get_format(request["format"])
        num_experts = request["num_experts"]
        shapes = ((dims.intermediate, dims.hidden),) * 2 + ((dims.hidden, dims.intermediate),)
        self.expert_bytes = sum(weight_format.nbytes(rows, cols) for rows, cols in shapes)
        self.detail = active_isa()
        packed = [_packed(request["format"], *shape, num_experts) for shape in shapes]
        self._layers = [PackedExperts(*packed, activation=Activation("silu"))]
        for _ in range(request["num_layers"] - 1):
            copies = [_copy(part) for part in packed]
            self._layers.append(PackedExperts(*copies, activation=Activation("silu")))

    def prepare(self, layer: int, x: torch.Tensor, index: torch.Tensor, weights: torch.Tensor) -> Callable[[], object]:
        """See `worker.Program`."""
        experts = self._layers[layer]
        return lambda: moe_forward(x, index, weights, experts)


def _packed(name: str, rows: int, cols: int, num_experts: int) -> PackedTensor:
    weight_format = get_format(name)
    packed = PackedTensor.empty(weight_format, rows, cols, num_experts)
    for expert in range(min(_NUM_PACKED, num_experts)):
        packed.pack_(expert, random_rows(name, rows, cols, seed=expert))
    block = packed.data[: _NUM_PACKED * packed.matrix_bytes]
    for start in range(block.numel(), packed.nbytes, block.numel()):
        part = packed.data[start : start + block.numel()]
        part.copy_(block[: part.numel()])
    return packed


def _copy(packed: PackedTensor) -> PackedTensor:
    copy = PackedTensor.empty(packed.format, packed.rows, packed.cols, packed.num_matrices)
    copy.data.copy_(packed.data)
    return copy


if __name__ == "__main__":
    serve(Moesaic)
