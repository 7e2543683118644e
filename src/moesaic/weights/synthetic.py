"""A checkpoint of random weights that lies in no file, for benches of models that nobody wants to download.

Every tensor is a window into a small pool of valid random blocks of its format, so even a model of hundreds of
gigabytes costs megabytes here; packing copies each tensor into memory of its own. It does not know what they are for.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.lib.stride_tricks import as_strided

from moesaic.quant.formats import WeightFormat
from moesaic.quant.quantize import quantize
from moesaic.weights.checkpoint import Rows, TensorInfo, find_tensor
from moesaic.weights.random_blocks import random_blocks

__all__ = ["SyntheticCheckpoint"]

_STANDARD_DEVIATION = 0.02  # as models are initialised, so that activations stay finite
_NUM_RANDOM = 1 << 12
_NUM_STARTS = 1021  # a prime: tensors start at different blocks of the pool


class SyntheticCheckpoint:
    """Random weights of given formats and shapes; see `Checkpoint`.

    Vectors (norms, biases) are near 1. Reading the same name gives the same bytes; two tensors seldom share theirs.

    Args:
        name: what to call it in messages.
        metadata: as in config.json.
        tensors: format and shape (K last) by name.
        seed: seed of the pool.
    """

    kind: Literal["gguf", "safetensors", "synthetic"] = "synthetic"

    def __init__(
        self,
        name: str,
        metadata: Mapping[str, object],
        tensors: Mapping[str, tuple[WeightFormat, tuple[int, ...]]],
        seed: int = 0,
    ) -> None:
        self.path = Path(name)
        self.metadata = metadata
        self.tensors: Mapping[str, TensorInfo] = {
            key: TensorInfo(
                key, weight_format, shape, weight_format.nbytes(math.prod(shape[:-1]), shape[-1]), self.path
            )
            for key, (weight_format, shape) in tensors.items()
        }
        self._seed = seed
        self._pools: dict[str, np.ndarray] = {}

    def raw(self, name: str, rows: Rows | None = None) -> np.ndarray:
        """Random blocks as uint8 `[prod(shape[:-1]), row_bytes]`; rows overlap in memory, one block apart."""
        info = find_tensor(self, name)
        row_bytes, block_bytes = info.format.row_bytes(info.shape[-1]), info.format.block_bytes
        if len(info.shape) < 2:
            return quantize(np.ones((1, info.shape[-1]), np.float32), info.format)
        num_rows = math.prod(info.shape[:-1])
        start = zlib.crc32(name.encode()) % _NUM_STARTS
        pool = self._pool(info.format, start + num_rows + row_bytes // block_bytes)
        raw = as_strided(pool[start:], (num_rows, row_bytes), (block_bytes, 1), writeable=False)
        return raw if rows is None else raw[rows]

    def release(self, name: str) -> None:
        """Nothing to give back: a window costs nothing."""
        find_tensor(self, name)

    def close(self) -> None:
        """Drop the pools."""
        self._pools.clear()

    def _pool(self, weight_format: WeightFormat, num_blocks: int) -> np.ndarray:
        """At least `num_blocks` random blocks, uint8 `[num_blocks, block_bytes]`; they repeat after `_NUM_RANDOM`."""
        pool = self._pools.get(weight_format.name)
        if pool is None:
            rng = np.random.default_rng(self._seed)
            pool = random_blocks(weight_format, _NUM_RANDOM, _STANDARD_DEVIATION, rng)
        if len(pool) < num_blocks:
            pool = np.tile(pool[:_NUM_RANDOM], (-(-num_blocks // _NUM_RANDOM), 1))
        self._pools[weight_format.name] = pool
        return pool
