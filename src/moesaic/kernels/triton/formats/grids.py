"""Codebooks of IQ1, IQ2 and IQ3 as tables for a GPU, read off the values of blocks that have every index once.

So the published grids are written down in one place, `csrc/formats/grids.cpp`. Tables are by the numbers that packed
matrices have for entries.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import numpy as np
import torch

from moesaic import _native
from moesaic.quant import FORMATS, dequantize

__all__ = ["grid_maker"]


def _set_half(blocks: np.ndarray, offset: int, value: float) -> None:
    blocks[:, offset : offset + 2] = np.array([value], np.float16).view(np.uint8)


def _blocks_of(name: str) -> tuple[np.ndarray, int]:
    """Blocks with the indices 0, 1, 2, ... whose weights are the entries, and the weights of an entry."""
    width = 4 if name.startswith("IQ3") else 8
    size = {"IQ1_S": 2048, "IQ1_M": 2048, "IQ2_XXS": 256, "IQ2_XS": 512, "IQ2_S": 1024, "IQ3_XXS": 256, "IQ3_S": 512}
    per_block = 256 // width
    index = np.arange(size[name]).reshape(-1, per_block)
    low = (index & 255).astype(np.uint8)
    high = index >> 8
    blocks = np.zeros((len(index), FORMATS[name].block_bytes), np.uint8)
    if name in ("IQ1_S", "IQ1_M"):  # the same codebook
        blocks = np.zeros((len(index), FORMATS["IQ1_S"].block_bytes), np.uint8)
        _set_half(blocks, 0, 8)
        blocks[:, 2:34] = low
        shifts = np.array([0, 3, 6, 9])
        quads = (high.reshape(-1, 8, 4) << shifts).sum(-1).astype(np.uint16)
        blocks[:, 34:50] = quads.view(np.uint8).reshape(-1, 16)
    elif name == "IQ2_XXS":
        _set_half(blocks, 0, 8)
        blocks[:, 2:66].reshape(-1, 8, 8)[:, :, :4] = low.reshape(-1, 8, 4)
    elif name == "IQ2_XS":
        _set_half(blocks, 0, 8)
        blocks[:, 2:66] = index.astype(np.uint16).view(np.uint8).reshape(-1, 64)
    elif name == "IQ2_S":
        _set_half(blocks, 0, 8)
        blocks[:, 2:34] = low
        blocks[:, 66:74] = (high.reshape(-1, 8, 4) << np.array([0, 2, 4, 6])).sum(-1)
    elif name == "IQ3_XXS":
        _set_half(blocks, 0, 4)
        blocks[:, 2:66] = low
    else:
        _set_half(blocks, 0, 1)
        blocks[:, 2:66] = low
        blocks[:, 66:74] = (high.reshape(-1, 8, 8) << np.arange(8)).sum(-1)
    return blocks, width


def _make(name: str) -> torch.Tensor:
    blocks, width = _blocks_of(name)
    is_ternary = name.startswith("IQ1")
    values = dequantize(blocks, FORMATS["IQ1_S" if is_ternary else name], 256).reshape(-1, width)
    if is_ternary:  # 8 times an entry and an eighth
        codes = np.rint((values - 1) / 8).astype(np.int64) + 1
        words = (codes << (2 * np.arange(8))).sum(-1)
    else:
        words = (np.rint(values).astype(np.int64).reshape(-1, 4) << (8 * np.arange(4))).sum(-1)
    places = _native.grid_places(FORMATS[name].ggml_type)
    if places:
        words = words.reshape(len(places), -1)[places].reshape(-1)
    return torch.from_numpy(words.astype(np.int32))


def grid_maker(name: str) -> Callable[[], torch.Tensor]:
    """Makes a format's table: int32, a word for 4 weights (bytes), or for 8 (2 bits each, plus one) in IQ1."""
    return functools.partial(_make, name)
