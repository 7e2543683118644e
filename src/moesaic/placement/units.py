"""Sizes as people write and read them: "24GiB" -> bytes, bytes -> "17.3 GiB". It knows nothing else."""

from __future__ import annotations

import re
from types import MappingProxyType

__all__ = ["format_bytes", "format_gib", "parse_bandwidth", "parse_size"]

_BINARY = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}
_DECIMAL = {"K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}
_UNITS = MappingProxyType(
    {f"{letter}{ending}": size for letter, size in _BINARY.items() for ending in ("", "IB")}
    | {f"{letter}B": size for letter, size in _DECIMAL.items()}
)
_NUMBER = r"(\d+(?:\.\d+)?|\.\d+)"


def parse_size(text: str) -> int:
    """Bytes of a size such as "24GiB" (2**30 each), "8GB" (10**9 each) or "7.5G" (short for GiB).

    Raises:
        ValueError: it is not such a size, or less than one byte; the message says what is expected.
    """
    found = re.fullmatch(_NUMBER + r"\s*([A-Za-z]*)", text.strip())
    if found is None:
        raise ValueError(f"'{text}' is not a size: expected a number and a unit, such as 24GiB, 8GB or 7.5G")
    if not found[2]:
        raise ValueError(f"'{text}' has no unit: did you mean {found[1]}GiB?")
    unit = _UNITS.get(found[2].upper())
    if unit is None:
        raise ValueError(
            f"'{text}': unknown unit '{found[2]}': expected KiB, MiB, GiB, TiB (also K, M, G, T) or KB to TB"
        )
    size = int(float(found[1]) * unit)
    if size < 1:
        raise ValueError(f"'{text}' is nothing: expected a size above 0")
    return size


def parse_bandwidth(text: str) -> float:
    """GB/s (10**9 bytes per second) of a bandwidth such as "97GB/s", "3.35TB/s" or "90GiB/s".

    Raises:
        ValueError: it is not such a bandwidth; the message says what is expected.
    """
    if not text.strip().lower().endswith("/s"):
        raise ValueError(f"'{text}' is not a bandwidth: expected a size per second, such as 97GB/s")
    return parse_size(text.strip()[:-2]) / 1e9


def format_bytes(count: int) -> str:
    """A number of bytes for people, with binary units: "17.3 GiB"."""
    size = float(count)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024:
            return f"{size:.0f} B" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.2f} TiB"


def format_gib(count: int) -> str:
    """A number of bytes in GiB with two digits, for messages that compare: "0.50 GiB"."""
    return f"{count / 1024**3:.2f} GiB"
