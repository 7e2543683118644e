"""The tensors of a folder with safetensors, in one file or sharded by an index, as they are stored.

Source of the layout: https://github.com/huggingface/safetensors#format. Headers, the index and config.json are an
attacker's: everything is checked against the files before use. It does not know what the tensors mean.
"""

from __future__ import annotations

import json
import math
import reprlib
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from types import MappingProxyType
from typing import Any, TypeGuard

import numpy as np

from moesaic.errors import CheckpointError, UnsupportedFormatError
from moesaic.weights.mapped_file import MappedFile

__all__ = [
    "INDEX",
    "SINGLE",
    "SafetensorsFolder",
    "StoredTensor",
    "holds_safetensors",
    "read_json_object",
    "read_shard_names",
]

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
MAX_HEADER_BYTES = 100_000_000  # the limit of the reference implementation
MAX_JSON_BYTES = 1 << 26
MAX_DIMS = 8

# NumPy has neither bfloat16 nor 8-bit floats: their bits are given as unsigned integers.
_DTYPES = MappingProxyType(
    {
        "F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2", "F8_E4M3": "u1", "F8_E5M2": "u1", "F8_E8M0": "u1",
        "I64": "<i8", "I32": "<i4", "I16": "<i2", "I8": "i1", "U64": "<u8", "U32": "<u4", "U16": "<u2", "U8": "u1",
        "BOOL": "u1",
    }
)  # fmt: skip


def holds_safetensors(folder: Path) -> bool:
    """Whether the folder holds a model in safetensors (not whether it is sound)."""
    return any((folder / name).exists() for name in (INDEX, SINGLE)) or any(folder.glob("*.safetensors"))


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """A tensor of a safetensors file.

    Attributes:
        name: its name in the file.
        dtype: safetensors' name of its type, e.g. "F8_E4M3".
        shape: row-major; `()` is a scalar.
        nbytes: stored bytes.
        file: the file that holds them.
        offset: where they begin.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    nbytes: int
    file: MappedFile
    offset: int

    def raw(self) -> np.ndarray:
        """The stored bytes, a read-only view of the mapped file."""
        return self.file.view(self.offset, self.nbytes)

    def array(self) -> np.ndarray:
        """The values in `shape`, a read-only view; bfloat16 and 8-bit floats as the integers that have their bits."""
        return self.raw().view(_DTYPES[self.dtype]).reshape(self.shape)

    def release(self) -> None:
        """Let the kernel drop the tensor's pages."""
        self.file.release(self.offset, self.nbytes)


class SafetensorsFolder:
    """The files of a model, opened; `tensors` are in the order of the files.

    Raises:
        CheckpointError: a file is damaged, hostile or missing.
        UnsupportedFormatError: a tensor has a type that safetensors files did not have when this was written.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder
        self._files: dict[str, MappedFile] = {}
        self.tensors: dict[str, StoredTensor] = {}
        try:
            if (folder / INDEX).exists():
                self._open_sharded()
            else:
                self.tensors = self._open_file(_single_file(folder).name)
        except BaseException:
            self.close()
            raise

    def _open_sharded(self) -> None:
        shard_of = _read_index(self.path / INDEX)
        held = {shard: self._open_file(shard) for shard in sorted(set(shard_of.values()))}
        for name, shard in shard_of.items():
            if name not in held[shard]:
                raise CheckpointError(self.path / shard, f"is not in this file, though {INDEX} says so.", tensor=name)
            self.tensors[name] = held[shard][name]

    def _open_file(self, name: str) -> dict[str, StoredTensor]:
        file = MappedFile(self.path / name)
        self._files[name] = file
        return _read_tensors(file)

    def close(self) -> None:
        """Close every file; views handed out before stay valid."""
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


def _read_tensors(file: MappedFile) -> dict[str, StoredTensor]:
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
        if before.offset + before.nbytes > after.offset:
            raise CheckpointError(file.path, f"overlaps the tensor '{before.name}'.", after.name)
    return stored


def _is_size_list(value: object, max_length: int) -> TypeGuard[list[int]]:
    if not isinstance(value, list) or len(value) > max_length:
        return False
    return all(type(item) is int and 0 <= item < 1 << 63 for item in value)


def _stored_tensor(file: MappedFile, start: int, name: str, entry: object) -> StoredTensor:
    """Check one header entry `{"dtype", "shape", "data_offsets"}` against the file."""
    if not name or not name.isprintable():
        raise CheckpointError(file.path, f"has a tensor with the name {name!r}: expected printable characters.")
    if not isinstance(entry, dict):
        raise CheckpointError(file.path, f"is described by {type(entry).__name__}: expected an object.", name)
    dtype, shape, offsets = entry.get("dtype"), entry.get("shape"), entry.get("data_offsets")
    if not isinstance(dtype, str) or dtype not in _DTYPES:
        raise UnsupportedFormatError(
            f"{file.path}: '{name}': has the dtype {reprlib.repr(dtype)}: expected one of {', '.join(_DTYPES)}."
        )
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
    nbytes = math.prod(shape) * np.dtype(_DTYPES[dtype]).itemsize
    if nbytes != end - begin or nbytes == 0:
        raise CheckpointError(
            file.path, f"of shape {shape} in {dtype} needs {nbytes} bytes but has {end - begin} at {offsets}.", name
        )
    return StoredTensor(name, dtype, tuple(shape), nbytes, file, start + begin)
