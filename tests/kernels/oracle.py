"""What the packed kernels must compute, in float64 on values that `gguf.quants` dequantised."""

from __future__ import annotations

from functools import lru_cache

import gguf
import numpy as np
import torch
from gguf import quants
from tests.quant.own_formats import own_values, random_own_blocks

from moesaic import _native
from moesaic.kernels import PackedTensor
from moesaic.quant import FORMATS, WeightFormat

# Offsets of the half-precision scales in a block; every other byte may have any value.
HALF_OFFSETS = {
    "Q4_0": (0,), "Q4_1": (0, 2), "Q5_0": (0,), "Q5_1": (0, 2), "Q8_0": (0,),
    "Q2_K": (80, 82), "Q3_K": (108,), "Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,),
    "IQ4_NL": (0,), "IQ4_XS": (0,), "MXFP4": (), "NVFP4": (), "TQ1_0": (52,), "TQ2_0": (64,),
    "IQ1_S": (0,), "IQ1_M": (), "IQ2_XXS": (0,), "IQ2_XS": (0,), "IQ2_S": (0,), "IQ3_XXS": (0,), "IQ3_S": (0,),
}  # fmt: skip

# Where a block has nothing but weights; formats that are not here begin with nibbles.
WEIGHT_BYTES = {
    "Q4_0": (2, 18), "Q4_1": (4, 20), "Q5_0": (2, 22), "Q5_1": (4, 24), "Q8_0": (2, 34),
    "Q2_K": (16, 80), "Q3_K": (0, 96), "Q4_K": (16, 144), "Q5_K": (16, 176), "Q6_K": (0, 192),
    "IQ4_NL": (2, 18), "IQ4_XS": (8, 136), "MXFP4": (1, 17), "NVFP4": (4, 36), "TQ1_0": (0, 52), "TQ2_0": (0, 64),
    "IQ1_S": (2, 34), "IQ1_M": (0, 32), "IQ2_XXS": (2, 66), "IQ2_XS": (2, 66), "IQ2_S": (2, 66),
    "IQ3_XXS": (2, 66), "IQ3_S": (2, 66), "IQ1_S_TERNARY": (0, 52), "IQ1_M_TERNARY": (0, 52),
}  # fmt: skip


def random_raw(fmt: WeightFormat, rows: int, cols: int, seed: int = 0) -> np.ndarray:
    """Rows of blocks of random bytes with finite scales: of both signs, zero and subnormal ones included."""
    rng = np.random.default_rng(seed)
    if not fmt.is_quantized:
        values = rng.standard_normal((rows, cols)).astype(np.float32)
        if fmt.name == "BF16":
            return np.ascontiguousarray(values.view(np.uint16)[:, 1::2]).view(np.uint8)
        return values.astype(np.float16 if fmt.name == "F16" else np.float32).view(np.uint8)
    num_blocks = cols // fmt.block_size
    if not fmt.in_gguf:
        return random_own_blocks(fmt, (rows, num_blocks), rng).reshape(rows, -1)
    blocks = rng.integers(0, 256, (rows, num_blocks, fmt.block_bytes), dtype=np.uint8)

    def scales() -> np.ndarray:
        halves = (rng.standard_normal((rows, num_blocks)) * 0.01).astype(np.float16)
        halves[rng.random(halves.shape) < 0.05] = 0
        halves[rng.random(halves.shape) < 0.05] = np.float16(3e-6)
        return halves[..., None]

    for offset in HALF_OFFSETS[fmt.name]:
        blocks[..., offset : offset + 2] = scales().view(np.uint8)
    if fmt.name == "IQ1_M":  # four bits of the scale on top of each of the last four half-words
        nibbles = scales().view(np.uint16) >> np.array([0, 4, 8, 12], np.uint16) & 15
        blocks[..., 49::2] = blocks[..., 49::2] & 15 | (nibbles << 4).astype(np.uint8)
    if fmt.name == "MXFP4":
        blocks[..., 0] = rng.integers(112, 124, (rows, num_blocks))  # exponents of scales from 2^-16 to 2^-5
    return blocks.reshape(rows, -1)


def weights_of(raw: np.ndarray, fmt: WeightFormat, cols: int) -> np.ndarray:
    """The float32 values of rows of blocks by `gguf`; of formats that it does not know, by their definition."""
    if not fmt.in_gguf:
        return own_values(raw, fmt)
    values = quants.dequantize(np.ascontiguousarray(raw), gguf.GGMLQuantizationType(fmt.ggml_type))
    return np.asarray(values, np.float32).reshape(raw.shape[0], cols)


@lru_cache(maxsize=256)
def random_matrix(fmt_name: str, rows: int, cols: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """A random matrix's rows of blocks and its float32 values, which are slow to make; neither may be written to."""
    fmt = FORMATS[fmt_name]
    raw = random_raw(fmt, rows, cols, seed)
    values = weights_of(raw, fmt, cols)
    raw.flags.writeable = values.flags.writeable = False
    return raw, values


def packed(
    fmt_name: str, rows: int, cols: int, num_matrices: int = 1, seed: int = 0
) -> tuple[PackedTensor, np.ndarray]:
    """A stack of random matrices, packed, and its values as float64 `[num_matrices, rows, cols]`."""
    fmt = FORMATS[fmt_name]
    tensor = PackedTensor.empty(fmt, rows, cols, num_matrices)
    values = np.empty((num_matrices, rows, cols))
    for index in range(num_matrices):
        raw, values[index] = random_matrix(fmt_name, rows, cols, seed + index)
        tensor.pack_(index, raw)
    return tensor, values


def packed_extremes(fmt_name: str, rows: int, cols: int) -> tuple[PackedTensor, np.ndarray]:
    """A matrix whose row r has all bits of its weights in the pattern of byte `17 (r % 16)`, and its float64 values."""
    fmt = FORMATS[fmt_name]
    raw = random_raw(fmt, rows, cols)
    blocks = raw.reshape(rows, -1, fmt.block_bytes)
    first, last = WEIGHT_BYTES.get(fmt_name, (0, fmt.block_size // 2))
    blocks[..., first:last] = (17 * (np.arange(rows) % 16)).astype(np.uint8)[:, None, None]
    tensor = PackedTensor.empty(fmt, rows, cols)
    tensor.pack_(0, raw)
    return tensor, weights_of(raw, fmt, cols).astype(np.float64)


def rounded(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Activations after rounding to int8 in groups of 32, and half the step of each, as float64.

    The same float32 operations as csrc/kernels/activations.isa.cpp, so that every rounding falls the same way.
    """
    groups = np.asarray(x, np.float32).reshape(-1, 32)
    largest = np.abs(groups).max(-1, keepdims=True)
    inverse = np.divide(np.float32(127), largest, out=np.zeros_like(largest), where=largest > 1e-36)
    scale = (largest / np.float32(127)).astype(np.float64)
    values = np.rint(groups * inverse).astype(np.float64) * scale
    return values.reshape(x.shape), np.broadcast_to(scale / 2, groups.shape).reshape(x.shape)


def multiplies_bfloat16(fmt_name: str, cols: int, num_tokens: int) -> bool:
    """Whether the active instruction set rounds activations, and perhaps weights, of such a product to bfloat16."""
    bf16_from = _native.bf16_from(FORMATS[fmt_name].ggml_type)
    return 0 < bf16_from <= num_tokens and cols % 32 == 0 and fmt_name != "BF16"


def to_bfloat16(x: np.ndarray) -> np.ndarray:
    """Rounded to nearest even, as float64."""
    return torch.from_numpy(np.ascontiguousarray(x, np.float32)).bfloat16().double().numpy()


def seen_by(fmt_name: str, x: np.ndarray, num_tokens: int = 1) -> np.ndarray:
    """The activations that a format's kernel multiplies if there are so many tokens, as float64."""
    if multiplies_bfloat16(fmt_name, x.shape[-1], num_tokens):
        return to_bfloat16(x)
    return rounded(x)[0] if FORMATS[fmt_name].rounds_activations else x.astype(np.float64)


def tokens(*shape: int, seed: int = 1) -> torch.Tensor:
    """Activations with outliers, and one row of zeros if there are several."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal(shape).astype(np.float32)
    x[rng.random(shape) < 0.01] *= 20
    if shape[0] > 2:
        x[1] = 0
    return torch.from_numpy(x)


def relative_error(actual: torch.Tensor, expected: np.ndarray) -> float:
    """Largest error, in units of the largest value expected."""
    assert actual.dtype == torch.float32
    assert tuple(actual.shape) == expected.shape
    return float(np.abs(actual.numpy() - expected).max() / max(np.abs(expected).max(), 1e-30))
