"""A folder with config.json and safetensors, in one file or sharded by an index, as a `Checkpoint`.

Source of the layout: https://github.com/huggingface/safetensors#format. Headers, the index and config.json are an
attacker's: everything is checked against the files before use. It does not know what the tensors are for.
"""

from __future__ import annotations

import json
import math
import reprlib
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal, TypeGuard

import numpy as np

from moesaic.errors import CheckpointError, UnsupportedFormatError
from moesaic.quant.formats import format_from_safetensors_dtype
from moesaic.weights.checkpoint import TensorInfo, find_tensor
from moesaic.weights.mapped_file import MappedFile

__all__ = ["INDEX", "SINGLE", "SafetensorsCheckpoint", "holds_safetensors", "read_json_object", "read_shard_names"]

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
MAX_HEADER_BYTES = 100_000_000  # the limit of the reference implementation
MAX_JSON_BYTES = 1 << 26
MAX_DIMS = 8


def holds_safetensors(folder: Path) -> bool:
    """Whether the folder holds a model in safetensors (not whether it is sound)."""
    return any((folder / name).exists() for name in (INDEX, SINGLE)) or any(folder.glob("*.safetensors"))


@dataclass(frozen=True, slots=True)
class _Stored:
    info: TensorInfo
    file: MappedFile
    offset: int


class SafetensorsCheckpoint:
    """A safetensors model opened for reading; see `Checkpoint`. `metadata` is the content of config.json.

    Raises:
        CheckpointError: a file is damaged, hostile or missing.
        UnsupportedFormatError: a tensor has a dtype other than F32, F16 and BF16.
    """

    kind: Literal["gguf", "safetensors", "synthetic"] = "safetensors"

    def __init__(self, folder: Path) -> None:
        self.path = folder
        self._files: dict[str, MappedFile] = {}
        self._stored: dict[str, _Stored] = {}
        self.metadata: Mapping[str, object] = read_json_object(folder / "config.json")
        try:
            if (folder / INDEX).exists():
                self._open_sharded()
            else:
                self._stored = self._open_file(_single_file(folder).name)
        except BaseException:
            self.close()
            raise
        self.tensors: Mapping[str, TensorInfo] = {name: stored.info for name, stored in self._stored.items()}

    def _open_sharded(self) -> None:
        shard_of = _read_index(self.path / INDEX)
        held = {shard: self._open_file(shard) for shard in sorted(set(shard_of.values()))}
        for name, shard in shard_of.items():
            if name not in held[shard]:
                raise CheckpointError(self.path / shard, f"is not in this file, though {INDEX} says so.", tensor=name)
            self._stored[name] = held[shard][name]

    def _open_file(self, name: str) -> dict[str, _Stored]:
        file = MappedFile(self.path / name)
        self._files[name] = file
        return _read_tensors(file)

    def raw(self, name: str) -> np.ndarray:
        """Stored bytes as uint8 `[prod(shape[:-1]), row_bytes]`, a view of the mapped file."""
        info = find_tensor(self, name)
        stored = self._stored[name]
        row_bytes = info.format.row_bytes(info.shape[-1] if info.shape else 1)
        return stored.file.view(stored.offset, info.nbytes).reshape(math.prod(info.shape[:-1]), row_bytes)

    def release(self, name: str) -> None:
        """Let the kernel drop the tensor's pages."""
        stored = self._stored[find_tensor(self, name).name]
        stored.file.release(stored.offset, stored.info.nbytes)

    def close(self) -> None:
        """Close every shard."""
        for file in self._files.values():
            file.close()


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise ValueError(f"the key '{twice}' appears twice")
    return result


def _parse_object(path: Path, text: bytes, what: str) -> dict[str, Any]:
    """Parse a JSON object from untrusted bytes; every way to fail is a CheckpointError."""
    try:
        value = json.loads(str(text, "utf-8"), object_pairs_hook=_unique_keys)
    except (ValueError, RecursionError) as error:  # ValueError covers bad UTF-8, bad JSON and huge integers
        raise CheckpointError(path, f"{what} is not valid JSON: {error}.") from error
    if not isinstance(value, dict):
        raise CheckpointError(path, f"{what} is a JSON {type(value).__name__}: expected an object.")
    return value


def read_json_object(path: Path) -> dict[str, Any]:
    """The object in a small JSON file of a model folder.

    Raises:
        CheckpointError: the file is missing, larger than 64 MiB or not a JSON object.
    """
    file = MappedFile(path)
    if file.size > MAX_JSON_BYTES:
        raise CheckpointError(path, f"has {file.size} bytes: expected at most {MAX_JSON_BYTES}.")
    return _parse_object(path, file.view(0, file.size).tobytes(), "this file")


def _single_file(folder: Path) -> Path:
    files = sorted(folder.glob("*.safetensors"))
    if (folder / SINGLE).exists():
        return folder / SINGLE
    if len(files) == 1:
        return files[0]
    raise CheckpointError(
        folder, f"holds {len(files)} .safetensors files but no {INDEX} that says which tensor is where."
    )


def _read_index(path: Path) -> dict[str, str]:
    """Tensor name -> shard file name; a shard must be a plain name beside the index."""
    shard_of = read_json_object(path).get("weight_map")
    if not isinstance(shard_of, dict) or not shard_of:
        raise CheckpointError(path, "has no 'weight_map' object.")
    for name, shard in shard_of.items():
        plain = isinstance(shard, str) and shard.endswith(".safetensors") and not set(shard) & set("/\\:\0")
        if not plain:
            raise CheckpointError(
                path, f"names the shard {reprlib.repr(shard)}: expected a plain *.safetensors name.", tensor=name
            )
    return shard_of


def read_shard_names(path: Path) -> list[str]:
    """The shard files that an index names, sorted; CheckpointError if it is damaged or hostile."""
    return sorted(set(_read_index(path).values()))


def _read_tensors(file: MappedFile) -> dict[str, _Stored]:
    header_bytes = int.from_bytes(file.view(0, 8).tobytes(), "little") if file.size >= 8 else -1
    if not 2 <= header_bytes <= min(file.size - 8, MAX_HEADER_BYTES):
        raise CheckpointError(
            file.path,
            f"declares a header of {header_bytes} bytes in a file of {file.size}: it is truncated or not safetensors.",
        )
    header = _parse_object(file.path, file.view(8, header_bytes).tobytes(), "the header")
    header.pop("__metadata__", None)
    start = 8 + header_bytes
    stored = {name: _stored_tensor(file, start, name, entry) for name, entry in header.items()}
    by_offset = sorted(stored.values(), key=lambda item: item.offset)
    for before, after in pairwise(by_offset):
        if before.offset + before.info.nbytes > after.offset:
            raise CheckpointError(file.path, f"overlaps the tensor '{before.info.name}'.", after.info.name)
    return stored


def _is_size_list(value: object, max_length: int) -> TypeGuard[list[int]]:
    if not isinstance(value, list) or len(value) > max_length:
        return False
    return all(type(item) is int and 0 <= item < 1 << 63 for item in value)


def _stored_tensor(file: MappedFile, start: int, name: str, entry: object) -> _Stored:
    """Check one header entry `{"dtype", "shape", "data_offsets"}` against the file."""
    if not name or not name.isprintable():
        raise CheckpointError(file.path, f"has a tensor with the name {name!r}: expected printable characters.")
    if not isinstance(entry, dict):
        raise CheckpointError(file.path, f"is described by {type(entry).__name__}: expected an object.", name)
    dtype, shape, offsets = entry.get("dtype"), entry.get("shape"), entry.get("data_offsets")
    try:
        weight_format = format_from_safetensors_dtype(dtype if isinstance(dtype, str) else reprlib.repr(dtype))
    except UnsupportedFormatError as error:
        advice = "use a BF16 checkpoint or a GGUF of this model"
        raise UnsupportedFormatError(f"{file.path}: '{name}': {error} ({advice})") from error
    if not _is_size_list(shape, MAX_DIMS) or not _is_size_list(offsets, 2) or len(offsets) != 2:
        raise CheckpointError(
            file.path,
            f"has the shape {reprlib.repr(shape)} and the offsets {reprlib.repr(offsets)}: expected sizes.",
            name,
        )
    begin, end = offsets
    if not begin <= end <= file.size - start:
        raise CheckpointError(
            file.path, f"lies at {offsets} of a data section of {file.size - start} bytes: the file is truncated.", name
        )
    nbytes = math.prod(shape) * weight_format.block_bytes
    if nbytes != end - begin or nbytes == 0:
        raise CheckpointError(
            file.path, f"of shape {shape} in {dtype} needs {nbytes} bytes but has {end - begin} at {offsets}.", name
        )
    return _Stored(TensorInfo(name, weight_format, tuple(shape), nbytes, file.path), file, start + begin)
