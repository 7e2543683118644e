"""References from what a module wants to the bytes in a checkpoint that hold it.

A reference says which tensor, which matrix of a stack, which rows in which order, and, for float formats, which
rearrangement. Choosing matrices and rows never touches a block, so quantised weights keep their bits. A reference does
not read anything until it is asked, and it does not know what the module computes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from moesaic.errors import CheckpointError
from moesaic.quant.formats import WeightFormat, get_format
from moesaic.quant.quantize import dequantize
from moesaic.weights import Checkpoint, Rows, TensorInfo

__all__ = ["ExpertRefs", "JoinedRef", "MlaRefs", "Rows", "TensorRef", "Transform", "whole"]

Transform = Callable[[torch.Tensor], torch.Tensor]
"""A rearrangement of float values, e.g. a transpose; it gets the stored shape."""

_TORCH_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def _encode(values: torch.Tensor, weight_format: WeightFormat) -> np.ndarray:
    """Float32 values as the bytes of a float format, uint8 `[rows, row_bytes]`."""
    stored = values.to(_TORCH_DTYPES[weight_format.name]).contiguous()
    rows = math.prod(values.shape[:-1])
    return stored.reshape(-1).view(torch.uint8).numpy().reshape(rows, -1)


def _rows_of_matrix(index: int, num_rows: int, rows: Rows | None) -> Rows:
    """Rows of one matrix of a stack as rows of the whole stack."""
    if isinstance(rows, np.ndarray):
        return rows + index * num_rows
    first, stop, step = (slice(None) if rows is None else rows).indices(num_rows)
    assert step > 0
    return slice(first + index * num_rows, stop + index * num_rows, step)


def _derived(ref: TensorRef, rows: Rows, then: Transform | None, keeps: bool) -> dict[str, Any]:
    """Format and shape of a selection; values that are rearranged cannot stay quantised."""
    num_rows = len(range(ref.shape[0])[rows]) if isinstance(rows, slice) else len(rows)
    shape = (num_rows, *ref.shape[1:])
    if then is not None:
        shape = tuple(then(torch.empty(shape, device="meta")).shape)
    return {"shape": shape, "format": ref.format if keeps or not ref.format.is_quantized else get_format("F32")}


@dataclass(frozen=True, slots=True, eq=False)
class TensorRef:
    """A piece of one checkpoint tensor, as a parameter wants it; two references are equal if they are the same object.

    Attributes:
        name: the tensor's name in the checkpoint.
        format: weight format of what `read_raw` returns.
        shape: shape of the parameter, K last.
        index: which matrix of a stack `[n, rows, K]`; None takes the tensor as it is.
        rows: which rows of it, in which order; None takes all.
        transform: applied to float values after that; only for float formats.
    """

    name: str
    format: WeightFormat
    shape: tuple[int, ...]
    index: int | None = None
    rows: Rows | None = None
    transform: Transform | None = None

    @property
    def sources(self) -> tuple[str, ...]:
        """Names of the checkpoint tensors that are read."""
        return (self.name,)

    @property
    def nbytes(self) -> int:
        """Bytes that `read_raw` returns."""
        return self.format.nbytes(math.prod(self.shape[:-1]), self.shape[-1] if self.shape else 1)

    def read_raw(self, checkpoint: Checkpoint) -> np.ndarray:
        """Bytes in `format`, uint8 `[rows, row_bytes]`; a view of the file where nothing is rearranged."""
        if self.transform is not None:
            return _encode(self.read_float(checkpoint), self.format)
        return self._stored(checkpoint)[0].reshape(math.prod(self.shape[:-1]), -1)

    def read_float(self, checkpoint: Checkpoint) -> torch.Tensor:
        """Values as float32 in `shape`, in memory of their own."""
        raw, shape = self._stored(checkpoint)
        info = checkpoint.tensors[self.name]
        cols = info.shape[-1] if info.shape else 1
        values = torch.from_numpy(np.array(dequantize(np.ascontiguousarray(raw), info.format, cols))).reshape(shape)
        if self.transform is not None:
            values = self.transform(values).contiguous()
        elif values.numel() == math.prod(self.shape):
            values = values.reshape(self.shape)  # containers differ in dimensions of size 1
        if tuple(values.shape) != self.shape:
            raise CheckpointError(
                checkpoint.path, f"gives the shape {list(values.shape)}: expected {list(self.shape)}.", tensor=self.name
            )
        return values

    def select(self, rows: Rows, then: Transform | None = None) -> TensorRef:
        """A reference to chosen rows of this one, rearranged by `then`; without it quantised rows keep their bits."""
        before = self.transform
        if before is None and len(self.shape) > 1 and (self.rows is None or isinstance(self.rows, np.ndarray)):
            chosen = rows if self.rows is None else self.rows[rows]
            return replace(self, **_derived(self, rows, then, keeps=then is None), rows=chosen, transform=then)

        def transform(values: torch.Tensor) -> torch.Tensor:
            picked = (values if before is None else before(values))[rows]
            return picked if then is None else then(picked)

        return replace(self, **_derived(self, rows, then, keeps=False), transform=transform)

    def _stored(self, checkpoint: Checkpoint) -> tuple[np.ndarray, tuple[int, ...]]:
        """The chosen rows as stored, and the shape that they have there."""
        shape = checkpoint.tensors[self.name].shape
        if self.index is None:
            raw = checkpoint.raw(self.name, self.rows)
        else:
            num_rows = math.prod(shape[1:-1])
            shape = shape[1:]
            raw = checkpoint.raw(self.name, _rows_of_matrix(self.index, num_rows, self.rows))
        return raw, shape if self.rows is None else (len(raw), shape[-1])


@dataclass(frozen=True, slots=True, eq=False)
class JoinedRef(TensorRef):
    """A parameter that is made of several references.

    Attributes:
        parts: what is read.
        join: makes the parameter from the parts' float values; None stacks their rows, which keeps quantised bits
            when all parts have one format.
    """

    parts: tuple[TensorRef, ...] = ()
    join: Callable[[Sequence[torch.Tensor]], torch.Tensor] | None = None

    @staticmethod
    def of(
        parts: Sequence[TensorRef],
        shape: tuple[int, ...],
        join: Callable[[Sequence[torch.Tensor]], torch.Tensor] | None = None,
    ) -> JoinedRef:
        """Join `parts` into a parameter of `shape`; values that cannot stay in their format become F32."""
        formats = {part.format.name for part in parts}
        one_format = parts[0].format if len(formats) == 1 else get_format("F32")
        keeps = join is None or not one_format.is_quantized
        name = " + ".join(dict.fromkeys(part.name for part in parts))
        return JoinedRef(name, one_format if keeps else get_format("F32"), shape, parts=tuple(parts), join=join)

    @property
    def sources(self) -> tuple[str, ...]:
        """Names of the checkpoint tensors that are read."""
        return tuple(dict.fromkeys(name for part in self.parts for name in part.sources))

    def read_raw(self, checkpoint: Checkpoint) -> np.ndarray:
        """Bytes in `format`, uint8 `[rows, row_bytes]`."""
        same = all(part.format == self.format for part in self.parts)
        if self.join is None and self.transform is None and same:
            raw = np.concatenate([part.read_raw(checkpoint) for part in self.parts])
            return raw if self.rows is None else raw[self.rows]
        return _encode(self.read_float(checkpoint), self.format)

    def read_float(self, checkpoint: Checkpoint) -> torch.Tensor:
        """Values as float32 in `shape`."""
        values = [part.read_float(checkpoint) for part in self.parts]
        joined = torch.cat(values) if self.join is None else self.join(values)
        if self.rows is not None:
            joined = joined[self.rows]
        if self.transform is not None:
            joined = self.transform(joined)
        joined = joined.contiguous()
        if tuple(joined.shape) != self.shape:
            raise CheckpointError(
                checkpoint.path, f"give the shape {list(joined.shape)}: expected {list(self.shape)}.", tensor=self.name
            )
        return joined


@dataclass(frozen=True, slots=True)
class ExpertRefs:
    """The weights of a stack of routed experts, one reference per expert, each `[rows, K]` with `y = W x`.

    Attributes:
        gate: `[intermediate, hidden]` each; None for experts without a gate.
        up: `[intermediate, hidden]` each.
        down: `[hidden, intermediate]` each.
        gate_bias, up_bias, down_bias: `[rows]` each, or None.
    """

    gate: tuple[TensorRef, ...] | None
    up: tuple[TensorRef, ...]
    down: tuple[TensorRef, ...]
    gate_bias: tuple[TensorRef, ...] | None = None
    up_bias: tuple[TensorRef, ...] | None = None
    down_bias: tuple[TensorRef, ...] | None = None

    @property
    def num_experts(self) -> int:
        """Experts in the stack."""
        return len(self.up)

    def named(self) -> dict[str, tuple[TensorRef, ...]]:
        """The parts that exist, by field name."""
        fields = ("gate", "up", "down", "gate_bias", "up_bias", "down_bias")
        return {field: refs for field in fields if (refs := getattr(self, field)) is not None}


@dataclass(frozen=True, slots=True)
class MlaRefs:
    """The two halves of MLA's `kv_b_proj`, where the file stores them apart (GGUF since 2025).

    Attributes:
        k_b: one `[kv_lora_rank, qk_nope_head_dim]` per head: the query is absorbed by `k_b @ q_nope`.
        v_b: one `[v_head_dim, kv_lora_rank]` per head.
    """

    k_b: tuple[TensorRef, ...]
    v_b: tuple[TensorRef, ...]


def whole(info: TensorInfo, transform: Transform | None = None, shape: tuple[int, ...] | None = None) -> TensorRef:
    """Reference to a whole tensor; with a `transform`, `shape` is what that gives and quantised values become F32."""
    keeps = transform is None or not info.format.is_quantized
    weight_format = info.format if keeps else get_format("F32")
    return TensorRef(info.name, weight_format, info.shape if shape is None else shape, transform=transform)
