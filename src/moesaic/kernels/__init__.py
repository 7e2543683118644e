"""Kernels on the CPU: packed weights, products with them, and the other steps of a layer. It knows no model."""

from __future__ import annotations

from moesaic.kernels import ops
from moesaic.kernels.cpu import (
    gather_rows,
    linear,
    linear_heads,
    linear_multi,
    linear_transposed,
    linear_transposed_heads,
    moe_forward,
)
from moesaic.kernels.experts import Activation, PackedExperts
from moesaic.kernels.native import (
    active_isa,
    binds_memory,
    independent_rows,
    isas,
    native_seconds,
    num_nodes,
    num_threads,
    set_isa,
    set_num_nodes,
    set_num_threads,
    set_pinning,
)
from moesaic.kernels.ops import rms_norm
from moesaic.kernels.packed import PackedTensor
from moesaic.kernels.probe import Rates, peak_ops, read_bandwidth, tiles_from
from moesaic.kernels.sliced import SlicedTensor, cut_intermediate, empty_stack

__all__ = [
    "Activation",
    "PackedExperts",
    "PackedTensor",
    "Rates",
    "SlicedTensor",
    "active_isa",
    "binds_memory",
    "cut_intermediate",
    "empty_stack",
    "gather_rows",
    "independent_rows",
    "isas",
    "linear",
    "linear_heads",
    "linear_multi",
    "linear_transposed",
    "linear_transposed_heads",
    "moe_forward",
    "native_seconds",
    "num_nodes",
    "num_threads",
    "ops",
    "peak_ops",
    "read_bandwidth",
    "rms_norm",
    "set_isa",
    "set_num_nodes",
    "set_num_threads",
    "set_pinning",
    "tiles_from",
]
