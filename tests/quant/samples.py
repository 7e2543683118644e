"""Weights to quantise, and the simplest quantiser of the K-formats that ours must beat."""

from __future__ import annotations

import numpy as np

SHAPE = (64, 2048)


def gaussian() -> np.ndarray:
    return (np.random.default_rng(11).standard_normal(SHAPE) * 0.02).astype(np.float32)


def heavy_tailed() -> np.ndarray:
    """Like trained projections: Student-t values, columns of unequal size, a few outliers of ten times their size."""
    rng = np.random.default_rng(12)
    values = rng.standard_t(4, SHAPE) * np.exp(0.5 * rng.standard_normal(SHAPE[1])) * 0.01
    values[rng.random(SHAPE) < 1e-3] *= 10
    return values.astype(np.float32)


def normalised_rmse(values: np.ndarray, target: np.ndarray) -> float:
    difference = values.astype(np.float64) - target
    return float(np.sqrt((difference**2).sum() / (target.astype(np.float64) ** 2).sum()))


def _half(values: np.ndarray) -> np.ndarray:
    return values.astype(np.float16).astype(np.float32)


def _divide(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return np.divide(a, b, out=np.zeros(np.broadcast(a, b).shape, np.float32), where=b != 0)


def naive_affine(x: np.ndarray, sub_block: int, max_q: int, max_scale: int) -> np.ndarray:
    """Round to the nearest level between each sub-block's extremes, scales and minima to the nearest integer."""
    blocks = x.reshape(-1, 256 // sub_block, sub_block)
    low = np.minimum(blocks.min(-1), 0)
    scale, minimum = (blocks.max(-1) - low) / max_q, -low
    d = _half(scale.max(-1, keepdims=True) / max_scale)
    dmin = _half(minimum.max(-1, keepdims=True) / max_scale)
    scale = (d * np.rint(_divide(scale, d)).clip(0, max_scale))[..., None]
    minimum = (dmin * np.rint(_divide(minimum, dmin)).clip(0, max_scale))[..., None]
    levels = np.rint(_divide(blocks + minimum, scale)).clip(0, max_q)
    return (scale * levels - minimum).reshape(x.shape)


def naive_symmetric(x: np.ndarray, levels: int, max_scale: int) -> np.ndarray:
    """The same for sub-blocks of 16 without minima; each sub-block's largest weight takes level `-levels`."""
    blocks = x.reshape(-1, 16, 16)
    largest = np.take_along_axis(blocks, np.abs(blocks).argmax(-1)[..., None], -1)[..., 0]
    scale = largest / -levels
    extreme = np.take_along_axis(scale, np.abs(scale).argmax(-1)[..., None], -1)
    d = _half(extreme / -max_scale)
    scale = (d * np.rint(_divide(scale, d)).clip(-max_scale, max_scale - 1))[..., None]
    return (scale * np.rint(_divide(blocks, scale)).clip(-levels, levels - 1)).reshape(x.shape)


NAIVE = {
    "Q2_K": lambda x: naive_affine(x, 16, 3, 15),
    "Q3_K": lambda x: naive_symmetric(x, 4, 32),
    "Q4_K": lambda x: naive_affine(x, 32, 15, 63),
    "Q5_K": lambda x: naive_affine(x, 32, 31, 63),
    "Q6_K": lambda x: naive_symmetric(x, 32, 128),
}
