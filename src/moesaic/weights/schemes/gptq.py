"""GPTQ checkpoints (AutoGPTQ, GPTQModel, transformers): 4 bits, groups along K, matrices stored transposed.

`<module>.qweight` I32 `[K / 8, N]`, eight weights a word along K; `scales` F16 or BF16 `[K / group, N]`; `qzeros`
I32 `[K / group, N / 8]`, packed along N; `g_idx` I32 `[K]`, the group of each column. A value is (q - z) * scale. The
checkpoint format "gptq" stores z - 1 modulo 16, "gptq_v2" z. Symmetric checkpoints have z = 8 throughout.

Source: the AutoGPTQ and GPTQModel packages (`QuantLinear.pack`, `checkpoint_format`).
"""

from __future__ import annotations

import reprlib
from collections.abc import Iterator

import numpy as np

from moesaic.errors import CheckpointError
from moesaic.weights.checkpoint import Rows
from moesaic.weights.safetensors_file import StoredTensor
from moesaic.weights.schemes.base import Parts, QuantizedTensor, describe, row_chunks
from moesaic.weights.schemes.nibbles import check_shape, grouped_blocks, grouped_format, unpacked

__all__ = ["find_gptq"]

_STORED_LESS = {"gptq": 1, "gptq_v2": 0}  # how much less than the zero point a checkpoint stores
_SYMMETRIC_ZERO = 8


def find_gptq(parts: Parts) -> Iterator[QuantizedTensor]:
    """The weights of a checkpoint with `quant_method: gptq`."""
    bits = parts.integer("bits")
    layout = parts.config.get("checkpoint_format") or "gptq"
    if bits != 4:
        raise parts.refuse(f"GPTQ with {bits} bits", "4 bits")
    if not isinstance(layout, str) or layout not in _STORED_LESS:
        raise parts.refuse(f"GPTQ with checkpoint_format {reprlib.repr(layout)}", " or ".join(_STORED_LESS))
    symmetric, in_order = parts.flag("sym", True), not parts.flag("desc_act", False)
    for module, qweight in parts.ending(".qweight"):
        tensor = _Tensor(parts, module, qweight, _STORED_LESS[layout], symmetric)
        if not in_order:
            tensor.check_order()
        yield tensor.quantized()


class _Tensor:
    """One weight and its parts, checked."""

    def __init__(self, parts: Parts, module: str, qweight: StoredTensor, stored_less: int, symmetric: bool) -> None:
        if qweight.dtype != "I32" or len(qweight.shape) != 2:
            raise CheckpointError(
                qweight.file.path, f"is {qweight.dtype} {list(qweight.shape)}: expected I32 [K / 8, N].", qweight.name
            )
        self._module, self._qweight, self._stored_less, self._symmetric = module, qweight, stored_less, symmetric
        self._cols, self._num_rows = 8 * qweight.shape[0], qweight.shape[1]
        self._scales = parts.partner(qweight, f"{module}.scales")
        self._num_groups = self._scales.shape[0] if len(self._scales.shape) == 2 else 0
        check_shape(self._scales, ("F16", "BF16"), (self._num_groups, self._num_rows), qweight)
        self._zeros = parts.partner(qweight, f"{module}.qzeros")
        check_shape(self._zeros, ("I32",), (self._num_groups, -(-self._num_rows // 8)), qweight)
        self._order = parts.tensors.get(f"{module}.g_idx")
        if self._order is not None:
            check_shape(self._order, ("I32", "I64"), (self._cols,), qweight)
        self._format = grouped_format(self._scales, self._cols, self._num_groups, not symmetric)

    def quantized(self) -> QuantizedTensor:
        shape = (self._num_rows, self._cols)
        parts = (self._qweight, self._scales, self._zeros)
        return QuantizedTensor(
            describe(f"{self._module}.weight", self._format, shape, self._qweight.file.path),
            parts if self._order is None else (*parts, self._order),
            self._read,
        )

    def check_order(self) -> None:
        """Refuse groups of columns that are not consecutive (act-order)."""
        if self._order is None:
            return
        if not np.array_equal(self._order.array(), np.arange(self._cols) // (self._cols // self._num_groups)):
            raise CheckpointError(
                self._order.file.path,
                "assigns columns to groups out of order (desc_act), which cannot be run: use a checkpoint that was "
                "quantised with desc_act: false, or a GGUF of this model.",
                self._order.name,
            )

    def _read(self, rows: Rows | None) -> np.ndarray:
        self.check_order()
        words, scales = self._qweight.array(), self._scales.array()
        zeros = self._zero_points()
        count, chunks = row_chunks(self._num_rows, self._cols, None)
        result = np.empty((count, self._format.row_bytes(self._cols)), np.uint8)
        for where, _ in chunks:
            nibbles = np.ascontiguousarray(words[:, where].T).view(np.uint8)
            points = None if zeros is None else zeros[:, where].T
            result[where] = grouped_blocks(self._format, nibbles, scales[:, where].T, points)
        return result if rows is None else result[rows]

    def _zero_points(self) -> np.ndarray | None:
        """Uint8 `[num_groups, num_rows]`; None if the format has none because all are 8."""
        stored = unpacked(self._zeros.array()).reshape(self._num_groups, -1)[:, : self._num_rows]
        zeros = (stored + np.uint8(self._stored_less)) & np.uint8(15)
        if not self._symmetric:
            return zeros
        if bool((zeros != _SYMMETRIC_ZERO).any()):
            raise CheckpointError(
                self._zeros.file.path,
                f"holds zero points other than {_SYMMETRIC_ZERO} though quantization_config says sym: true: if this "
                "checkpoint is asymmetric, correct its config.json.",
                self._zeros.name,
            )
        return None
