"""Random blocks of any format, for checkpoints that lie in no file. It does not know what the weights are for."""

from __future__ import annotations

import numpy as np

from moesaic.quant.formats import WeightFormat, format_from_ggml
from moesaic.quant.quantize import WRITABLE_FORMATS, dequantize, quantize
from moesaic.quant.recode import recode

__all__ = ["random_blocks"]

_NUM_CHOSEN = 64  # different blocks where they must be found among random bytes


def random_blocks(fmt: WeightFormat, count: int, deviation: float, rng: np.random.Generator) -> np.ndarray:
    """Valid blocks of weights with mean 0 and this standard deviation, uint8 `[count, block_bytes]`.

    Normal weights, quantised. Without a quantiser: for the formats of safetensors, codes at random under one scale; for
    those of GGUF files (codebooks), a few blocks of random bytes whose weights happen to be of this size, repeated;
    for other forms of such, these recoded.
    """
    if fmt.recodes is not None:
        source = format_from_ggml(fmt.recodes)
        return recode(random_blocks(source, count, deviation, rng), source, fmt, source.block_size)
    if fmt.in_gguf and fmt not in WRITABLE_FORMATS:
        return _chosen_blocks(fmt, count, deviation, rng)
    if fmt.in_gguf:
        values = rng.standard_normal((count, fmt.block_size), np.float32) * np.float32(deviation)
        return quantize(values, fmt)
    blocks = rng.integers(0, 256, (count, fmt.block_bytes), dtype=np.uint8)
    if fmt.name.startswith("FP8"):
        codes = blocks[:, : fmt.block_size]
        codes &= 0x87
        codes |= 0x38  # the exponent of 1
    else:
        blocks[:, fmt.block_size // 2 + 2 :] = 8  # the zero point, if there is one
    _set_scales(blocks, fmt, 1.0)
    _set_scales(blocks, fmt, deviation / float(dequantize(blocks, fmt, fmt.block_size).std()))
    return blocks


def _chosen_blocks(fmt: WeightFormat, count: int, deviation: float, rng: np.random.Generator) -> np.ndarray:
    """Blocks of random bytes whose deviation lies within a factor of 2."""
    found = np.empty((0, fmt.block_bytes), np.uint8)
    while len(found) < _NUM_CHOSEN:
        blocks = rng.integers(0, 256, (1 << 15, fmt.block_bytes), dtype=np.uint8)
        deviations = np.sqrt(np.square(dequantize(blocks, fmt, fmt.block_size)).mean(-1))
        found = np.concatenate([found, blocks[(deviations > deviation / 2) & (deviations < 2 * deviation)]])
    return found[rng.integers(0, len(found), count)]


def _set_scales(blocks: np.ndarray, fmt: WeightFormat, scale: float) -> None:
    """Give all blocks of a format of safetensors one scale."""
    value = np.float32(scale)
    if fmt.name.startswith("FP8"):
        blocks[:, fmt.block_size :] = np.frombuffer(value.tobytes(), np.uint8)
        return
    half = fmt.block_size // 2
    bits = value.tobytes()[2:] if fmt.name.endswith("_BF16") else np.float16(value).tobytes()
    blocks[:, half : half + 2] = np.frombuffer(bits, np.uint8)
