"""Random weights in any format: blocks that a quantiser made, or random bytes that stand for weights of a usual size.

Formats that can be read but not written have no quantiser here. For them blocks of random bytes are kept whose weights
are finite and about as large as those of a new model, so that activations neither overflow nor vanish. Formats that
this build does not know come from the `gguf` package, for the other programs.
"""

from __future__ import annotations

from collections.abc import Callable

import gguf
import numpy as np

from moesaic.quant import FORMATS, dequantize, quantize
from moesaic.quant.quantize import WRITABLE_FORMATS

__all__ = ["random_blocks", "random_rows"]

_STANDARD_DEVIATION = 0.02
_NUM_CANDIDATES = 1 << 14
_MAX_ROUNDS = 400


def random_blocks(name: str, num_blocks: int, seed: int = 0) -> np.ndarray:
    """Valid blocks of a ggml type, uint8 `[num_blocks, block_bytes]`.

    Raises:
        KeyError: there is no such type.
        ValueError: too few blocks of random bytes stand for weights of a usual size.
    """
    known = FORMATS.get(name)
    if known is None:
        number = gguf.GGMLQuantizationType[name]
        block_bytes = gguf.GGML_QUANT_SIZES[number][1]
        return _valid_bytes(name, block_bytes, lambda raw: gguf.quants.dequantize(raw, number), num_blocks, seed)
    if known in WRITABLE_FORMATS:
        values = np.random.default_rng(seed).standard_normal((num_blocks, known.block_size), np.float32)
        return quantize(values * np.float32(_STANDARD_DEVIATION), known)
    return _valid_bytes(name, known.block_bytes, lambda raw: dequantize(raw, known, known.block_size), num_blocks, seed)


def random_rows(name: str, rows: int, cols: int, seed: int = 0) -> np.ndarray:
    """A matrix of random blocks of one of our formats, uint8 `[rows, row_bytes]`; blocks repeat."""
    weight_format = FORMATS[name]
    pool = random_blocks(name, max(64, 4096 // weight_format.block_size), seed)
    per_row = weight_format.row_bytes(cols) // weight_format.block_bytes
    choice = np.random.default_rng(seed + 1).integers(0, len(pool), rows * per_row)
    return pool[choice].reshape(rows, -1)


def _valid_bytes(
    name: str, block_bytes: int, values_of: Callable[[np.ndarray], np.ndarray], num_blocks: int, seed: int
) -> np.ndarray:
    rng = np.random.default_rng(seed)
    kept: list[np.ndarray] = []
    for _ in range(_MAX_ROUNDS):
        blocks = rng.integers(0, 256, (_NUM_CANDIDATES, block_bytes), np.uint8)
        with np.errstate(all="ignore"):
            size = np.sqrt((values_of(blocks).astype(np.float64) ** 2).mean(axis=1))
        kept.append(blocks[(size > _STANDARD_DEVIATION / 4) & (size < _STANDARD_DEVIATION * 4)])
        if sum(map(len, kept)) >= num_blocks:
            return np.concatenate(kept)[:num_blocks]
    raise ValueError(f"{name}: hardly any block of random bytes stands for weights near {_STANDARD_DEVIATION}.")
