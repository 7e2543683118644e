"""Writes GGUF files byte by byte, sound or broken on purpose; independent of the package's own writer."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass

U8, I8, U16, I16, U32, I32, F32, BOOL, STRING, ARRAY, U64, I64, F64 = range(13)
_CODES = {U8: "B", I8: "b", U16: "H", I16: "h", U32: "I", I32: "i", F32: "f", BOOL: "B", U64: "Q", I64: "q", F64: "d"}


def string(text: str | bytes) -> bytes:
    """Length and bytes."""
    content = text.encode() if isinstance(text, str) else text
    return struct.pack("<Q", len(content)) + content


def scalar(kind: int, value: float) -> bytes:
    """A number of a GGUF type."""
    return struct.pack(f"<{_CODES[kind]}", value)


def key(name: str | bytes, kind: int, payload: bytes) -> bytes:
    """One key-value."""
    return string(name) + struct.pack("<I", kind) + payload


def array(kind: int, items: Sequence[bytes], count: int | None = None) -> bytes:
    """An array, with a false count if one is given."""
    return struct.pack("<IQ", kind, len(items) if count is None else count) + b"".join(items)


@dataclass(frozen=True)
class Tensor:
    """A tensor description as it shall stand in the file; `dims` in ggml's order."""

    name: str | bytes
    dims: tuple[int, ...]
    kind: int
    offset: int
    num_dims: int | None = None

    def pack(self) -> bytes:
        """Its bytes."""
        num_dims = len(self.dims) if self.num_dims is None else self.num_dims
        return (
            string(self.name)
            + struct.pack("<I", num_dims)
            + b"".join(struct.pack("<Q", dim) for dim in self.dims)
            + struct.pack("<IQ", self.kind, self.offset)
        )


def gguf(
    keys: Sequence[bytes] = (),
    tensors: Sequence[Tensor] = (),
    data: bytes = b"",
    *,
    version: int = 3,
    magic: bytes = b"GGUF",
    num_tensors: int | None = None,
    num_keys: int | None = None,
    alignment: int = 32,
) -> bytes:
    """A whole file; counts may be given falsely."""
    header = magic + struct.pack(
        "<IQQ",
        version,
        len(tensors) if num_tensors is None else num_tensors,
        len(keys) if num_keys is None else num_keys,
    )
    header += b"".join(keys) + b"".join(tensor.pack() for tensor in tensors)
    return header + bytes(-len(header) % alignment) + data
