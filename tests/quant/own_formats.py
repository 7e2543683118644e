"""Values and random blocks of the formats that no GGUF file has, written from their definitions in NumPy and torch.

Those are the formats of published safetensors, and other forms of GGUF's (`csrc/formats/ternary.h`).
"""

from __future__ import annotations

import numpy as np
import torch

from moesaic.quant import WeightFormat

__all__ = ["own_values", "random_own_blocks"]


def half_scales(bits: np.ndarray, fmt: WeightFormat) -> np.ndarray:
    """16-bit scales as float32."""
    if fmt.name.endswith("_BF16"):
        return (bits.astype(np.uint32) << 16).view(np.float32)
    return bits.view(np.float16).astype(np.float32)


def ternary_codes(bytes_: np.ndarray) -> np.ndarray:
    """The five weights -1, 0, 1 of each byte, `[..., 5]`, by what `csrc/formats/ternary.h` says of bits h, m, x."""
    h, m, x = bytes_ >> 6, bytes_ >> 3 & 7, bytes_ & 7
    first = np.where((h == 0) & (m < 5), 8, x)
    second = np.where((h == 0) & ((m == 0) | (m > 3)), 8, x ^ m)
    of_eights = np.where(m == 0, 1, 2 + (x >> 2))
    fifth = np.where(h != 0, h, np.where(m % 4 == 0, of_eights, m % 4))
    return np.stack([first % 3, first // 3, second % 3, second // 3, fifth - 1], -1).astype(np.int32) - 1


def ternary_weights(blocks: np.ndarray) -> np.ndarray:
    """The weights -1, 0, 1 of blocks `[..., block_bytes]`, `[..., 256]`.

    The first seven vectors of four bytes have quads 0 to 6 of groups 0 to 3, the others quads 0 to 5 of groups 4 to 7.
    """
    codes = ternary_codes(blocks[..., :52].reshape(*blocks.shape[:-1], 13, 4))
    out = np.empty((*blocks.shape[:-1], 8, 8, 4), np.int32)
    for group in range(4):
        out[..., group, :7, :] = codes[..., :7, :, group]
        out[..., group + 4, :6, :] = codes[..., 7:, :, group]
    fifths = [(0, 7), (1, 7), (2, 7), (3, 7), (4, 7), (5, 7), (6, 7), (4, 6), (5, 6), (6, 6), (7, 6), (7, 7)]
    for vector, (group, quad) in enumerate(fifths):
        out[..., group, quad, :] = codes[..., vector, :, 4]
    return out.reshape(*blocks.shape[:-1], 256)


def ternary_values(blocks: np.ndarray, fmt: WeightFormat) -> np.ndarray:
    """Float32 values of blocks of IQ1_S_TERNARY or IQ1_M_TERNARY, `[..., 256]`."""
    if fmt.name == "IQ1_S_TERNARY":
        nibbles = np.stack([blocks[..., 52:56] & 15, blocks[..., 52:56] >> 4], axis=-1).reshape(*blocks.shape[:-1], 8)
        d = np.ascontiguousarray(blocks[..., 56:58]).view(np.float16)
        odd, negative = np.repeat(nibbles | 1, 32, axis=-1), np.repeat(nibbles & 1, 32, axis=-1)
    else:
        bits = np.unpackbits(blocks[..., 52:56], axis=-1, bitorder="little")
        halves = np.ascontiguousarray(blocks[..., 56:]).view(np.uint16)
        pieces = (halves >> 12) << np.array([0, 4, 8, 12], np.uint16)
        d = pieces.sum(-1, keepdims=True, dtype=np.uint16).view(np.float16)
        scales = halves[..., None] >> np.array([0, 3, 6, 9], np.uint16) & 7
        odd = np.repeat(2 * scales.reshape(*blocks.shape[:-1], 16) + 1, 16, axis=-1)
        negative = np.repeat(bits, 8, axis=-1)
    step = d.astype(np.float32) * odd.astype(np.float32)
    delta = np.where(negative == 0, np.float32(0.125), np.float32(-0.125))
    return np.asarray(step * (ternary_weights(blocks).astype(np.float32) + delta), np.float32)


def own_values(raw: np.ndarray, fmt: WeightFormat) -> np.ndarray:
    """Float32 values of rows of blocks, uint8 `[rows, row_bytes]`."""
    blocks = np.ascontiguousarray(raw).reshape(len(raw), -1, fmt.block_bytes)
    if fmt.recodes is not None:
        values = ternary_values(blocks, fmt)
    elif fmt.name.startswith("FP8"):
        codes = torch.from_numpy(blocks[..., : fmt.block_size].copy()).view(torch.float8_e4m3fn)
        scales = np.ascontiguousarray(blocks[..., fmt.block_size :]).view(np.float32)
        values = codes.float().numpy() * scales
    else:
        half = fmt.block_size // 2
        pairs = blocks[..., :half]
        quants = np.stack([pairs & 15, pairs >> 4], axis=-1).reshape(*blocks.shape[:2], -1).astype(np.int32)
        bits = np.ascontiguousarray(blocks[..., half : half + 2]).view(np.uint16)
        zeros = blocks[..., half + 2 :].astype(np.int32) if fmt.name.startswith("UINT4") else np.int32(8)
        values = (quants - zeros).astype(np.float32) * half_scales(bits, fmt)
    return values.reshape(len(raw), -1).astype(np.float32)


def random_own_blocks(fmt: WeightFormat, shape: tuple[int, int], rng: np.random.Generator) -> np.ndarray:
    """Blocks `[*shape, block_bytes]` of random codes without NaN; scales are of both signs, zero and tiny ones too."""
    blocks = rng.integers(0, 256, (*shape, fmt.block_bytes), dtype=np.uint8)
    scales = (rng.standard_normal(shape) * 0.01).astype(np.float32)
    scales[rng.random(shape) < 0.05] = 0
    scales[rng.random(shape) < 0.05] = 3e-6
    if fmt.name == "IQ1_S_TERNARY":
        blocks[..., 56:] = scales.astype(np.float16)[..., None].view(np.uint8)
        return blocks
    if fmt.name == "IQ1_M_TERNARY":
        pieces = scales.astype(np.float16)[..., None].view(np.uint16) >> np.array([0, 4, 8, 12], np.uint16) & 15
        blocks[..., 57::2] = blocks[..., 57::2] & 15 | (pieces << 4).astype(np.uint8)
        return blocks
    if fmt.name.startswith("FP8"):
        codes = blocks[..., : fmt.block_size]
        codes[(codes & 0x7F) == 0x7F] = 0x7E
        blocks[..., fmt.block_size :] = scales[..., None].view(np.uint8)
        return blocks
    half = fmt.block_size // 2
    bits = scales.view(np.uint32) >> 16 if fmt.name.endswith("_BF16") else scales.astype(np.float16).view(np.uint16)
    blocks[..., half : half + 2] = bits.astype(np.uint16)[..., None].view(np.uint8)
    blocks[..., half + 2 :] &= 15
    return blocks
