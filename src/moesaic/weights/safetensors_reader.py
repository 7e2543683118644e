"""A folder with config.json and safetensors as a `Checkpoint`; its quantised layers appear as one tensor each.

The files are read by `safetensors_file.py`; `schemes` says which of their tensors together are a quantised weight, and
gives its rows as blocks of a weight format. It does not know what the tensors are for.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

import numpy as np

from moesaic.errors import UnsupportedFormatError
from moesaic.quant.formats import format_from_safetensors_dtype
from moesaic.weights.checkpoint import Rows, TensorInfo, find_tensor
from moesaic.weights.safetensors_file import SafetensorsFolder, StoredTensor, read_json_object
from moesaic.weights.schemes import QuantizedTensor, find_quantized

__all__ = ["SafetensorsCheckpoint"]


class SafetensorsCheckpoint:
    """A safetensors model opened for reading; see `Checkpoint`. `metadata` is the content of config.json.

    Raises:
        CheckpointError: a file is damaged, hostile or missing, or the parts of a quantised weight do not fit together.
        UnsupportedFormatError: the weights are quantised in a way that is not known, or a tensor outside quantised
            layers has a dtype other than F32, F16 and BF16.
    """

    kind: Literal["gguf", "safetensors", "synthetic"] = "safetensors"

    def __init__(self, folder: Path) -> None:
        self.path = folder
        self.metadata: Mapping[str, object] = read_json_object(folder / "config.json")
        self._folder = SafetensorsFolder(folder)
        self._quantized: dict[str, QuantizedTensor] = {}
        try:
            self.tensors: Mapping[str, TensorInfo] = self._describe()
        except BaseException:
            self.close()
            raise

    def _describe(self) -> dict[str, TensorInfo]:
        """Every tensor; a quantised one stands where the first of its parts does."""
        stored = self._folder.tensors
        found = find_quantized(self.metadata, stored, self.path)
        self._quantized = {tensor.info.name: tensor for tensor in found}
        owner = {part.name: tensor for tensor in found for part in tensor.parts}
        infos: dict[str, TensorInfo] = {}
        for name, tensor in stored.items():
            info = owner[name].info if name in owner else _plain(tensor)
            infos.setdefault(info.name, info)
        return infos

    def raw(self, name: str, rows: Rows | None = None) -> np.ndarray:
        """Stored bytes as uint8 `[rows, row_bytes]`: a view of the mapped file, or blocks made of a weight's parts."""
        info = find_tensor(self, name)
        if name in self._quantized:
            return self._quantized[name].read(rows)
        row_bytes = info.format.row_bytes(info.shape[-1] if info.shape else 1)
        raw = self._folder.tensors[name].raw().reshape(math.prod(info.shape[:-1]), row_bytes)
        return raw if rows is None else raw[rows]

    def release(self, name: str) -> None:
        """Let the kernel drop the pages of the tensor, or of its parts."""
        find_tensor(self, name)
        for part in self._quantized[name].parts if name in self._quantized else (self._folder.tensors[name],):
            part.release()

    def close(self) -> None:
        """Close every shard."""
        self._folder.close()


def _plain(stored: StoredTensor) -> TensorInfo:
    """The description of a tensor that stands for itself."""
    try:
        weight_format = format_from_safetensors_dtype(stored.dtype)
    except UnsupportedFormatError as error:
        advice = "its config.json does not say how it is quantised; use a BF16 checkpoint or a GGUF of this model"
        raise UnsupportedFormatError(f"{stored.file.path}: '{stored.name}': {error} ({advice})") from error
    return TensorInfo(stored.name, weight_format, stored.shape, stored.nbytes, stored.file.path)
