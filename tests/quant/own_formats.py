"""Values and random blocks of the formats that no GGUF file has, written from their definitions in NumPy and torch."""

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


def own_values(raw: np.ndarray, fmt: WeightFormat) -> np.ndarray:
    """Float32 values of rows of blocks, uint8 `[rows, row_bytes]`."""
    blocks = np.ascontiguousarray(raw).reshape(len(raw), -1, fmt.block_bytes)
    if fmt.name.startswith("FP8"):
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
