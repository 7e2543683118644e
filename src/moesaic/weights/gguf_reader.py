"""A GGUF model, in one file or split over several, as a `Checkpoint`.

It checks every tensor against the file that holds it, and the parts of a split model against each other. It does not
know what the tensors are for.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Literal

import gguf
import numpy as np

from moesaic.errors import CheckpointError, UnsupportedFormatError
from moesaic.quant.formats import format_from_ggml
from moesaic.weights.checkpoint import Rows, TensorInfo, find_tensor
from moesaic.weights.gguf_header import GgufHeader, GgufTensor, read_header
from moesaic.weights.mapped_file import MappedFile

__all__ = ["GgufCheckpoint", "split_part_name"]

_SPLIT_NAME = re.compile(r"(?P<stem>.*)-(?P<index>\d{5})-of-(?P<count>\d{5})\.gguf", re.DOTALL)


def split_part_name(stem: str, index: int, count: int) -> str:
    """File name of part `index` (from 1) of a model split into `count` files."""
    return f"{stem}-{index:05d}-of-{count:05d}.gguf"


@dataclass(frozen=True, slots=True)
class _Stored:
    info: TensorInfo
    file: MappedFile
    offset: int


class GgufCheckpoint:
    """A GGUF model opened for reading; see `Checkpoint`.

    Args:
        path: the file, or the first part (`...-00001-of-000NN.gguf`) of a split model.

    Raises:
        CheckpointError: a file is damaged, hostile or missing.
        UnsupportedFormatError: a tensor has a quantisation type that this version cannot read.
    """

    kind: Literal["gguf", "safetensors", "synthetic"] = "gguf"

    def __init__(self, path: Path) -> None:
        self.path = path
        self._files: list[MappedFile] = []
        self._stored: dict[str, _Stored] = {}
        self.metadata: Mapping[str, object] = {}
        try:
            for index, part in enumerate(_parts(path)):
                header = self._add_file(part)
                if index == 0:
                    self.metadata = header.metadata
                _check_split_keys(part, header.metadata)
            self._check_total()
        except BaseException:
            self.close()
            raise
        self.tensors: Mapping[str, TensorInfo] = {name: stored.info for name, stored in self._stored.items()}

    def _add_file(self, path: Path) -> GgufHeader:
        file = MappedFile(path)
        self._files.append(file)
        header = read_header(file)
        for stored in _place_tensors(file, header):
            if stored.info.name in self._stored:
                raise CheckpointError(path, "is described in two parts of this model.", tensor=stored.info.name)
            self._stored[stored.info.name] = stored
        return header

    def _check_total(self) -> None:
        expected = self.metadata.get("split.tensors.count")
        if len(self._files) > 1 and expected is not None and expected != len(self._stored):
            raise CheckpointError(
                self.path,
                f"is {expected!r} but the {len(self._files)} parts hold {len(self._stored)}: one is of another model.",
                tensor="split.tensors.count",
            )

    def raw(self, name: str, rows: Rows | None = None) -> np.ndarray:
        """Stored bytes as uint8 `[prod(shape[:-1]), row_bytes]`, or some of the rows: views of the mapped file."""
        info = find_tensor(self, name)
        stored = self._stored[name]
        num_rows = math.prod(info.shape[:-1])
        raw = stored.file.view(stored.offset, info.nbytes).reshape(num_rows, info.nbytes // num_rows)
        return raw if rows is None else raw[rows]

    def release(self, name: str) -> None:
        """Let the kernel drop the tensor's pages."""
        stored = self._stored[find_tensor(self, name).name]
        stored.file.release(stored.offset, stored.info.nbytes)

    def close(self) -> None:
        """Close every part."""
        for file in self._files:
            file.close()


def _parts(path: Path) -> Iterator[Path]:
    """The files of a model, in order; a part given alone must be the first."""
    match = _SPLIT_NAME.fullmatch(path.name)
    count = int(match["count"]) if match else 1
    if match is None or count <= 1:
        yield path
        return
    first = split_part_name(match["stem"], 1, count)
    if int(match["index"]) != 1:
        raise CheckpointError(path, f"is part {int(match['index'])} of a split model: open the first part, {first}.")
    for index in range(1, count + 1):
        part = path.with_name(split_part_name(match["stem"], index, count))
        if not part.exists():
            raise CheckpointError(
                part, f"is missing: {first} says that the model has {count} parts; download them all."
            )
        yield part


def _check_split_keys(path: Path, metadata: Mapping[str, object]) -> None:
    """`split.no` and `split.count` must say what the file name says."""
    match = _SPLIT_NAME.fullmatch(path.name)
    named_index, named_count = (int(match["index"]) - 1, int(match["count"])) if match else (0, 1)
    count = metadata.get("split.count", 1 if match is None or named_count <= 1 else None)
    number = metadata.get("split.no", named_index if count == 1 else None)
    # llama.cpp writes 0 for a model that is not split.
    if (count or 1, number) != (named_count, named_index):
        raise CheckpointError(
            path,
            f"says part {number!r} of {count!r} (split.no, split.count): expected part {named_index} of {named_count} "
            "by its file name; keep the names that the parts were published under.",
        )


def _place_tensors(file: MappedFile, header: GgufHeader) -> list[_Stored]:
    """Check that every tensor lies in the file, aligned, and apart from the others."""
    room = max(file.size - header.data_offset, 0)
    placed = []
    for tensor in header.tensors:
        info = _tensor_info(file.path, tensor)
        if tensor.offset % header.alignment:
            raise CheckpointError(
                file.path, f"lies at offset {tensor.offset}: expected a multiple of {header.alignment}.", tensor.name
            )
        if info.nbytes > room or tensor.offset > room - info.nbytes:
            raise CheckpointError(
                file.path,
                f"occupies {info.nbytes} bytes at offset {tensor.offset} of a data section of {room} bytes: the file "
                "is truncated or damaged; download it again.",
                tensor.name,
            )
        placed.append(_Stored(info, file, header.data_offset + tensor.offset))
    by_offset = sorted(placed, key=lambda stored: stored.offset)
    for before, after in pairwise(by_offset):
        if before.offset + before.info.nbytes > after.offset:
            raise CheckpointError(file.path, f"overlaps the tensor '{before.info.name}'.", after.info.name)
    return placed


def _tensor_info(path: Path, tensor: GgufTensor) -> TensorInfo:
    try:
        weight_format = format_from_ggml(tensor.ggml_type)
    except UnsupportedFormatError as error:
        known = {int(kind): kind.name for kind in gguf.GGMLQuantizationType}
        name = known.get(tensor.ggml_type, "of an unknown type")
        raise UnsupportedFormatError(f"{path}: '{tensor.name}' is {name}: {error}") from error
    cols = tensor.dims[0]
    if cols % weight_format.block_size:
        raise CheckpointError(
            path,
            f"has rows of {cols} weights: {weight_format.name} needs a multiple of {weight_format.block_size}.",
            tensor.name,
        )
    shape = tuple(reversed(tensor.dims))
    nbytes = math.prod(shape[:-1]) * (cols // weight_format.block_size) * weight_format.block_bytes
    return TensorInfo(tensor.name, weight_format, shape, nbytes, path)
