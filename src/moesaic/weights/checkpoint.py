"""What a checkpoint is, whatever its container: named tensors of known format and shape, and metadata.

It does not know which model the tensors belong to.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol, runtime_checkable

import numpy as np

from moesaic.errors import CheckpointError, ModelNotFoundError
from moesaic.quant.formats import WeightFormat

__all__ = ["Checkpoint", "Rows", "TensorInfo", "find_tensor", "open_checkpoint"]

Rows = slice | np.ndarray
"""Rows of a matrix, in the order wanted: a slice or an int64 array of indices."""


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """One tensor as its file describes it.

    Attributes:
        name: name in the file.
        format: weight format of the stored bytes.
        shape: row-major, the contiguous dimension (K) last; `()` is a scalar.
        nbytes: stored bytes.
        file: the file that holds them.
    """

    name: str
    format: WeightFormat
    shape: tuple[int, ...]
    nbytes: int
    file: Path


@runtime_checkable
class Checkpoint(Protocol):
    """A model's tensors and metadata; reading a tensor costs no more memory than its own bytes.

    Attributes:
        path: what was opened (file or folder).
        kind: container.
        metadata: GGUF key-values (arrays of numbers are NumPy arrays, of strings tuples) or the content of config.json.
        tensors: every tensor by its name in the file.
    """

    path: Path
    kind: Literal["gguf", "safetensors", "synthetic"]
    metadata: Mapping[str, object]
    tensors: Mapping[str, TensorInfo]

    def raw(self, name: str, rows: Rows | None = None) -> np.ndarray:
        """Stored bytes as uint8 `[prod(shape[:-1]), row_bytes]`, a view that must not be written to where it can be.

        Args:
            name: the tensor.
            rows: which rows of those, in which order; None takes all.

        Raises:
            CheckpointError: there is no such tensor.
        """
        ...

    def release(self, name: str) -> None:
        """Say that the tensor's pages need not stay resident; it may be read again."""
        ...

    def close(self) -> None:
        """Give the files back; views handed out before stay valid."""
        ...


def find_tensor(checkpoint: Checkpoint, name: str) -> TensorInfo:
    """The tensor's description; CheckpointError names what is missing."""
    info = checkpoint.tensors.get(name)
    if info is None:
        raise CheckpointError(
            checkpoint.path, f"is not in this checkpoint of {len(checkpoint.tensors)} tensors.", tensor=name
        )
    return info


def open_checkpoint(path: Path) -> Checkpoint:
    """Open a `.gguf` (a split one by its first part) or a folder with safetensors or with one GGUF.

    Only headers are read. The caller closes the checkpoint.

    Raises:
        ModelNotFoundError: there is nothing to open at `path`.
        CheckpointError: a file is damaged, hostile or incomplete.
        UnsupportedFormatError: a tensor has a weight format that this version cannot read.
    """
    from moesaic.weights.gguf_reader import GgufCheckpoint
    from moesaic.weights.safetensors_file import holds_safetensors
    from moesaic.weights.safetensors_reader import SafetensorsCheckpoint

    if not path.exists():
        raise ModelNotFoundError(f"{path}: no such file or folder.")
    if not path.is_dir():
        if path.suffix == ".safetensors":
            raise ModelNotFoundError(f"{path}: name the folder that holds it and its config.json, not the file.")
        return GgufCheckpoint(path)
    if holds_safetensors(path):
        return SafetensorsCheckpoint(path)
    first_parts = [file for file in sorted(path.glob("*.gguf")) if "-of-" not in file.stem or "-00001-of-" in file.stem]
    if len(first_parts) == 1:
        return GgufCheckpoint(first_parts[0])
    if first_parts:
        choices = ", ".join(file.name for file in first_parts)
        raise ModelNotFoundError(f"{path}: holds several GGUF models; name one of {choices}.")
    raise ModelNotFoundError(f"{path}: holds neither safetensors (with config.json) nor a .gguf file.")
