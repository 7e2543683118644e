"""Equal tensors of one module as a checkpoint holds them, and what they take; see `planner`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from moesaic.placement.measures import FLOAT_BYTES, packed_bytes
from moesaic.quant import WeightFormat

if TYPE_CHECKING:
    from moesaic.models import TensorRef

__all__ = ["Stack", "is_kv_b", "projection_of", "stack_bytes"]


@dataclass(frozen=True, slots=True)
class Stack:
    """Equal tensors of one module, one for most, one per expert for experts.

    Attributes:
        key: the tensors' name in the module.
        refs: where they are in the checkpoint.
        packed: a matrix that a Moesaic implementation holds packed; anything else becomes float32.
    """

    key: str
    refs: Sequence[TensorRef]
    packed: bool

    @property
    def shape(self) -> tuple[int, ...]:
        """Of each."""
        return self.refs[0].shape

    @property
    def projection(self) -> str:
        """The key without "_proj"."""
        return self.key.removesuffix("_proj")


def is_kv_b(name: str, key: str) -> bool:
    """Whether this is MLA's `kv_b_proj` or a half of it, which the GPU holds as bfloat16 matrices per head."""
    return key in ("k_b", "v_b") or (key == "weight" and name.endswith(".kv_b_proj"))


def projection_of(name: str) -> str:
    """The last word of a name without "_proj": "gate" of "model.layers.0.mlp.gate_proj"."""
    return name.rpartition(".")[2].removesuffix("_proj")


def stack_bytes(fmt: WeightFormat, stack: Stack) -> int:
    """Bytes of one of the tensors in memory."""
    return packed_bytes(fmt, stack.shape) if stack.packed else math.prod(stack.shape) * FLOAT_BYTES
