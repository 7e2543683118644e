"""Parses the header of one GGUF file: key-values and tensor descriptions. The bytes are an attacker's.

Source of the layout: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md (versions 2 and 3, little-endian).
Every count, size and offset is compared with the bytes that are left before it is used, so no declared size alone
allocates memory or makes a loop long. It does not know what the keys mean, nor which weight formats we can read.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

import numpy as np

from moesaic.errors import CheckpointError
from moesaic.weights.mapped_file import MappedFile

__all__ = ["GgufHeader", "GgufTensor", "read_header"]

MAGIC = b"GGUF"
VERSIONS = (2, 3)
DEFAULT_ALIGNMENT = 32
MAX_ALIGNMENT = 1 << 20
MAX_DIMS = 4  # GGML_MAX_DIMS
# Far above real files (a few hundred keys, 100,000 tensors, vocabularies of 300,000), far below what would hurt.
MAX_KEYS = 1 << 16
MAX_TENSORS = 1 << 20
MAX_NAME_BYTES = 1 << 12
MAX_STRING_BYTES = 1 << 26
MAX_ARRAY_STRINGS = 1 << 23
MAX_ARRAY_DEPTH = 3

_STRING, _ARRAY, _BOOL = 8, 9, 7
_SCALARS: dict[int, np.dtype] = {
    0: np.dtype("<u1"),
    1: np.dtype("<i1"),
    2: np.dtype("<u2"),
    3: np.dtype("<i2"),
    4: np.dtype("<u4"),
    5: np.dtype("<i4"),
    6: np.dtype("<f4"),
    _BOOL: np.dtype("<u1"),
    10: np.dtype("<u8"),
    11: np.dtype("<i8"),
    12: np.dtype("<f8"),
}


@dataclass(frozen=True, slots=True)
class GgufTensor:
    """A tensor description: `dims` in ggml's order (contiguous dimension first), `offset` from the data section."""

    name: str
    ggml_type: int
    dims: tuple[int, ...]
    offset: int


@dataclass(frozen=True, slots=True)
class GgufHeader:
    """What stands before the data section of a GGUF file."""

    version: int
    metadata: dict[str, object]
    tensors: tuple[GgufTensor, ...]
    alignment: int
    data_offset: int


class _Cursor:
    """Reads forward through a file and refuses to pass its end."""

    def __init__(self, file: MappedFile) -> None:
        self.path = file.path
        self.end = file.size
        self.pos = 0
        self.strings_left = MAX_ARRAY_STRINGS
        self._bytes = file.view(0, file.size)
        self._buffer = self._bytes.data

    def fail(self, message: str, what: str) -> CheckpointError:
        return CheckpointError(self.path, message, tensor=what)

    def take(self, nbytes: int, what: str) -> int:
        """Advance by `nbytes`; the position before."""
        if nbytes > self.end - self.pos:
            raise self.fail(
                f"needs {nbytes} bytes at offset {self.pos} but the file ends at {self.end}: it is truncated.",
                what,
            )
        start = self.pos
        self.pos += nbytes
        return start

    def u32(self, what: str) -> int:
        return int(struct.unpack_from("<I", self._buffer, self.take(4, what))[0])

    def u64(self, what: str) -> int:
        return int(struct.unpack_from("<Q", self._buffer, self.take(8, what))[0])

    def string(self, what: str, limit: int = MAX_STRING_BYTES) -> str:
        nbytes = self.u64(what)
        if nbytes > limit:
            raise self.fail(f"holds a string of {nbytes} bytes: expected at most {limit}.", what)
        start = self.take(nbytes, what)
        try:
            return str(self._buffer[start : start + nbytes], "utf-8")
        except UnicodeDecodeError as error:
            raise self.fail(f"holds a string that is not UTF-8 at offset {start + error.start}.", what) from error

    def value(self, kind: int, what: str) -> object:
        """One metadata value of GGUF type `kind`."""
        if kind == _STRING:
            return self.string(what)
        if kind == _ARRAY:
            return self.array(what, depth=1)
        dtype = self.scalar_dtype(kind, what)
        start = self.take(dtype.itemsize, what)
        number = self._bytes[start : self.pos].view(dtype)[0].item()
        return self.boolean(number, what) if kind == _BOOL else number

    def array(self, what: str, depth: int) -> object:
        """Numbers become a NumPy array over the mapping, strings and nested arrays a tuple."""
        if depth > MAX_ARRAY_DEPTH:
            raise self.fail(f"nests arrays more than {MAX_ARRAY_DEPTH} deep.", what)
        kind = self.u32(what)
        count = self.u64(what)
        if kind in (_STRING, _ARRAY):
            smallest = 8 if kind == _STRING else 12
            if count > self.strings_left or count > (self.end - self.pos) // smallest:
                raise self.fail(f"declares {count} elements, more than the file or the limit of strings allows.", what)
            self.strings_left -= count
            if kind == _STRING:
                return tuple(self.string(what) for _ in range(count))
            return tuple(self.array(what, depth + 1) for _ in range(count))
        dtype = self.scalar_dtype(kind, what)
        start = self.take(count * dtype.itemsize, what)
        numbers = self._bytes[start : self.pos].view(dtype)
        if kind != _BOOL:
            return numbers
        if count and int(numbers.max()) > 1:
            raise self.fail("holds a boolean that is neither 0 nor 1.", what)
        return numbers.view(np.bool_)

    def scalar_dtype(self, kind: int, what: str) -> np.dtype:
        dtype = _SCALARS.get(kind)
        if dtype is None:
            raise self.fail(f"has the unknown value type {kind}: expected 0 to 12.", what)
        return dtype

    def boolean(self, number: int, what: str) -> bool:
        if number > 1:
            raise self.fail(f"is the boolean {number}: expected 0 or 1.", what)
        return bool(number)


def _read_metadata(cursor: _Cursor, count: int) -> dict[str, object]:
    metadata: dict[str, object] = {}
    for index in range(count):
        key = cursor.string(f"key {index} of {count}", MAX_NAME_BYTES)
        if not key or key in metadata:
            raise cursor.fail("is empty." if not key else "appears twice in the metadata.", key or f"key {index}")
        kind = cursor.u32(key)
        metadata[key] = cursor.value(kind, key)
    return metadata


def _read_tensor(cursor: _Cursor, place: str) -> GgufTensor:
    name = cursor.string(place, MAX_NAME_BYTES)
    if not name:
        raise cursor.fail("has no name.", place)
    num_dims = cursor.u32(name)
    if not 1 <= num_dims <= MAX_DIMS:
        raise cursor.fail(f"has {num_dims} dimensions: expected 1 to {MAX_DIMS}.", name)
    dims = tuple(cursor.u64(name) for _ in range(num_dims))
    if 0 in dims:
        raise cursor.fail(f"has the dimensions {list(dims)}: none may be 0.", name)
    return GgufTensor(name, cursor.u32(name), dims, cursor.u64(name))


def _read_tensors(cursor: _Cursor, count: int) -> tuple[GgufTensor, ...]:
    tensors: dict[str, GgufTensor] = {}
    for index in range(count):
        tensor = _read_tensor(cursor, f"tensor {index} of {count}")
        if tensor.name in tensors:
            raise cursor.fail("is described twice.", tensor.name)
        tensors[tensor.name] = tensor
    return tuple(tensors.values())


def _read_version(cursor: _Cursor) -> int:
    start = cursor.take(4, "magic")
    magic = bytes(cursor._buffer[start : start + 4])
    if magic != MAGIC:
        raise CheckpointError(cursor.path, f"starts with {magic!r}: expected {MAGIC!r}; this is not a GGUF file.")
    version = cursor.u32("version")
    if version not in VERSIONS:
        swapped = int.from_bytes(version.to_bytes(4, "little"), "big") in VERSIONS
        hint = "it was written for a big-endian machine" if swapped else "convert it with a current tool"
        raise CheckpointError(cursor.path, f"is GGUF version {version}: expected 2 or 3, little-endian; {hint}.")
    return version


def _read_alignment(cursor: _Cursor, metadata: dict[str, object]) -> int:
    alignment = metadata.get("general.alignment", DEFAULT_ALIGNMENT)
    good = type(alignment) is int and 0 < alignment <= MAX_ALIGNMENT and alignment & (alignment - 1) == 0
    if not good:
        raise cursor.fail(f"is {alignment!r}: expected a power of two of at most {MAX_ALIGNMENT}.", "general.alignment")
    assert isinstance(alignment, int)
    return alignment


def read_header(file: MappedFile) -> GgufHeader:
    """Parse and check the header; tensor sizes are checked by the caller, who knows the formats.

    Raises:
        CheckpointError: the header is damaged, hostile, of another version or byte order.
    """
    cursor = _Cursor(file)
    version = _read_version(cursor)
    num_tensors, num_keys = cursor.u64("tensor count"), cursor.u64("key count")
    if num_tensors > MAX_TENSORS or num_keys > MAX_KEYS:
        raise CheckpointError(
            file.path,
            f"declares {num_tensors} tensors and {num_keys} keys: expected at most {MAX_TENSORS} and {MAX_KEYS}.",
        )
    metadata = _read_metadata(cursor, num_keys)
    tensors = _read_tensors(cursor, num_tensors)
    alignment = _read_alignment(cursor, metadata)
    data_offset = -(-cursor.pos // alignment) * alignment
    return GgufHeader(version, metadata, tensors, alignment, data_offset)
