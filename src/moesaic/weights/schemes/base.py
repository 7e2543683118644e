"""What all schemes share: the description of a quantised weight, and checked access to its parts and to the config."""

from __future__ import annotations

import math
import reprlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from moesaic.errors import CheckpointError, UnsupportedFormatError
from moesaic.quant.formats import WeightFormat
from moesaic.weights.checkpoint import Rows, TensorInfo
from moesaic.weights.safetensors_file import StoredTensor

__all__ = ["Parts", "QuantizedTensor", "describe", "float_values", "row_chunks"]

_CHUNK_WEIGHTS = 1 << 20  # weights whose blocks are made together: their bytes stay in the cache


@dataclass(frozen=True, slots=True)
class QuantizedTensor:
    """A weight that a checkpoint stores in several tensors.

    Attributes:
        info: the weight as one tensor; its name is that of the weight in an unquantised checkpoint, its format that of
            the blocks that `read` gives.
        parts: the tensors that it is made of, and those that come with it and are not needed.
        read: the blocks of chosen rows (None: all), uint8 `[rows, row_bytes]` in memory of their own.
    """

    info: TensorInfo
    parts: tuple[StoredTensor, ...]
    read: Callable[[Rows | None], np.ndarray]


class Parts:
    """The stored tensors of a checkpoint and its `quantization_config`.

    Attributes:
        file: config.json.
        config: the value of `quantization_config`.
        tensors: the stored tensors.
    """

    def __init__(self, file: Path, config: Mapping[str, object], tensors: Mapping[str, StoredTensor]) -> None:
        self.file, self.config, self.tensors = file, config, tensors

    def ending(self, suffix: str) -> Iterator[tuple[str, StoredTensor]]:
        """The tensors whose names end like this: the name without the ending, and the tensor."""
        for name, tensor in self.tensors.items():
            if name.endswith(suffix):
                yield name.removesuffix(suffix), tensor

    def present(self, *names: str) -> tuple[StoredTensor, ...]:
        """Those of the named tensors that are there."""
        return tuple(self.tensors[name] for name in names if name in self.tensors)

    def partner(self, of: StoredTensor, name: str) -> StoredTensor:
        """The tensor `name`, without which `of` cannot be understood; CheckpointError if it is not there."""
        found = self.tensors.get(name)
        if found is None:
            raise CheckpointError(
                of.file.path, f"has no partner '{name}': the checkpoint is incomplete; download it again.", of.name
            )
        return found

    def refuse(self, what: str, instead: str) -> UnsupportedFormatError:
        """The error for a kind of quantisation that is not known."""
        return UnsupportedFormatError(
            f"{self.file}: the weights are quantised as {what}: expected {instead}; use a checkpoint in one of these, "
            "in BF16, or a GGUF of this model."
        )

    def integer(self, *keys: str, default: int | None = None) -> int:
        """The integer under the first of the keys that is there; CheckpointError if there is none."""
        value = next((self.config[key] for key in keys if self.config.get(key) is not None), default)
        if type(value) is not int:
            raise CheckpointError(
                self.file, f"is {reprlib.repr(value)}: expected an integer.", f"quantization_config.{keys[0]}"
            )
        return value

    def flag(self, key: str, default: bool) -> bool:
        """The boolean under a key; CheckpointError if it is something else."""
        value = self.config.get(key, default)
        if type(value) is not bool:
            raise CheckpointError(
                self.file, f"is {reprlib.repr(value)}: expected true or false.", f"quantization_config.{key}"
            )
        return value


def describe(name: str, fmt: WeightFormat, shape: tuple[int, ...], file: Path) -> TensorInfo:
    """The description of a weight `[..., K]`; UnsupportedFormatError if the format cannot hold such rows."""
    return TensorInfo(name, fmt, shape, fmt.nbytes(math.prod(shape[:-1]), shape[-1]), file)


def float_values(stored: StoredTensor) -> np.ndarray:
    """A tensor of scales as float32, exactly: F32, F16, BF16 or F8_E8M0.

    Raises:
        UnsupportedFormatError: it has another dtype.
    """
    values = stored.array()
    if stored.dtype in ("F32", "F16"):
        return values.astype(np.float32)
    if stored.dtype == "BF16":
        return (values.astype(np.uint32) << 16).view(np.float32)
    if stored.dtype == "F8_E8M0":
        return np.ldexp(np.float32(1), values.astype(np.int32) - 127).astype(np.float32)
    raise UnsupportedFormatError(
        f"{stored.file.path}: '{stored.name}': has the dtype {stored.dtype}: expected F32, F16, BF16 or F8_E8M0."
    )


def row_chunks(num_rows: int, cols: int, rows: Rows | None) -> tuple[int, Iterator[tuple[slice, np.ndarray]]]:
    """Chosen rows of a matrix, a few at a time.

    Returns:
        How many rows are chosen, and pairs of where a piece of them goes and their indices in the matrix, int64.
    """
    chosen = np.arange(num_rows, dtype=np.int64)
    chosen = chosen if rows is None else chosen[rows]
    step = max(1, _CHUNK_WEIGHTS // cols)
    starts = range(0, len(chosen), step)
    return len(chosen), ((slice(start, start + step), chosen[start : start + step]) for start in starts)
