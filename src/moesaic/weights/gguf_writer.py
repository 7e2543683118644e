"""Writes a GGUF file as a stream: metadata and tensor descriptions first, then the data tensor by tensor.

The header is written by the `gguf` package. The file grows beside its target under another name and takes its place
only when it is complete, so a crash leaves no half model. It does not know what keys and tensors mean.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import IO, Self

import gguf
import numpy as np

from moesaic.errors import CheckpointError
from moesaic.quant.formats import WeightFormat

__all__ = ["GgufWriter"]

_ARRAY_TYPES: dict[str, gguf.GGUFValueType] = {
    "bool": gguf.GGUFValueType.BOOL,
    "uint8": gguf.GGUFValueType.UINT8,
    "int8": gguf.GGUFValueType.INT8,
    "uint16": gguf.GGUFValueType.UINT16,
    "int16": gguf.GGUFValueType.INT16,
    "uint32": gguf.GGUFValueType.UINT32,
    "int32": gguf.GGUFValueType.INT32,
    "uint64": gguf.GGUFValueType.UINT64,
    "int64": gguf.GGUFValueType.INT64,
    "float32": gguf.GGUFValueType.FLOAT32,
    "float64": gguf.GGUFValueType.FLOAT64,
}


class GgufWriter:
    """A GGUF file being written; use it as a context manager.

        with GgufWriter(path, "qwen3moe") as writer:
            writer.add_metadata({"qwen3moe.block_count": 48})
            writer.declare("blk.0.ffn_up_exps.weight", get_format("Q4_K"), (128, 768, 2048))
            writer.write("blk.0.ffn_up_exps.weight", rows)     # as often as needed, until the tensor is whole

    Args:
        path: the file to make; its folder must exist. An existing file is replaced when the new one is complete.
        architecture: `general.architecture`.
    """

    def __init__(self, path: Path, architecture: str) -> None:
        self.path = path
        self._partial = path.with_name(f"{path.name}.part")
        self._writer = gguf.GGUFWriter(None, architecture)
        self._declared: dict[str, int] = {}
        self._order: list[str] = []
        self._file: IO[bytes] | None = None
        self._position = 0
        self._written = 0

    def add_metadata(self, values: Mapping[str, object]) -> None:
        """Add key-values: int, float, bool, str, a sequence of one of these, or a NumPy array (which keeps its type).

        Integers become 32 bits where they fit, reals float32, as readers expect. An empty sequence is left out: it
        has no element type.
        """
        for key, value in values.items():
            if isinstance(value, np.ndarray):
                if value.size:
                    kind = _ARRAY_TYPES[value.dtype.name]
                    self._writer.add_key_value(key, value.tolist(), gguf.GGUFValueType.ARRAY, sub_type=kind)
            elif isinstance(value, list | tuple):
                if value:
                    sub_type = max((_scalar_type(item) for item in value), key=_width)
                    self._writer.add_key_value(key, list(value), gguf.GGUFValueType.ARRAY, sub_type=sub_type)
            else:
                self._writer.add_key_value(key, value, _scalar_type(value))

    def declare(self, name: str, weight_format: WeightFormat, shape: tuple[int, ...]) -> None:
        """Announce a tensor of `shape` (K last); all are declared before the first is written, in the same order."""
        assert self._file is None and name not in self._declared
        nbytes = weight_format.nbytes(math.prod(shape[:-1]), shape[-1])
        kind = gguf.GGMLQuantizationType(weight_format.ggml_type)
        self._writer.add_tensor_info(name, shape, np.dtype(np.float32), nbytes, raw_dtype=kind)
        self._declared[name] = nbytes
        self._order.append(name)

    def write(self, name: str, raw: np.ndarray) -> None:
        """Append uint8 rows to the tensor `name`, which must be the next one that is not complete."""
        if self._file is None:
            self._write_header()
        assert self._file is not None and self._order[self._position] == name
        assert self._written + raw.nbytes <= self._declared[name]
        self._file.write(np.ascontiguousarray(raw).data)
        self._written += raw.nbytes
        if self._written == self._declared[name]:
            self._writer.write_padding(self._file, self._written)
            self._position, self._written = self._position + 1, 0

    def _write_header(self) -> None:
        self._writer.write_header_to_file(self._partial)
        self._writer.write_kv_data_to_file()
        self._writer.write_ti_data_to_file()
        assert self._writer.fout is not None
        self._file = self._writer.fout[0]
        self._writer.write_padding(self._file, self._file.tell())

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Put the complete file in place, or remove what was written if there was an error."""
        if kind is None and self._file is None:
            self._write_header()
        if self._file is not None:
            self._file.flush()
            if kind is None:
                os.fsync(self._file.fileno())
            self._writer.close()
        if kind is not None:
            self._partial.unlink(missing_ok=True)
            return
        if self._position != len(self._order):
            self._partial.unlink(missing_ok=True)
            raise CheckpointError(self.path, "was not written to its end.", tensor=self._order[self._position])
        os.replace(self._partial, self.path)


def _scalar_type(value: object) -> gguf.GGUFValueType:
    if isinstance(value, bool | np.bool_):
        return gguf.GGUFValueType.BOOL
    if isinstance(value, float):
        return gguf.GGUFValueType.FLOAT32
    if isinstance(value, int):
        if 0 <= value < 1 << 32:
            return gguf.GGUFValueType.UINT32
        if -(1 << 31) <= value < 0:
            return gguf.GGUFValueType.INT32
        return gguf.GGUFValueType.INT64 if value < 1 << 63 else gguf.GGUFValueType.UINT64
    if isinstance(value, str):
        return gguf.GGUFValueType.STRING
    raise TypeError(f"a GGUF key cannot hold a {type(value).__name__}")


def _width(kind: gguf.GGUFValueType) -> int:
    """Which of the types of an array's elements holds them all."""
    order = (
        gguf.GGUFValueType.UINT32,
        gguf.GGUFValueType.INT32,
        gguf.GGUFValueType.INT64,
        gguf.GGUFValueType.UINT64,
    )
    return order.index(kind) if kind in order else len(order)
