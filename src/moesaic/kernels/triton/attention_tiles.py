"""How the work of attention on a GPU is cut up: a choice of speed, not of results. It knows shapes and card limits."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
import triton

__all__ = ["MAX_SPLITS", "LatentTiles", "Tiles", "choose_latent_tiles", "choose_tiles", "padded"]

MAX_SPLITS = 64
_FEW_TILES = 6  # of keys, one after the other: so many are sooner done for few rows in more programs
_LARGE_SHARED = 160 * 1024  # bytes; data centre cards have that, others about 99 KiB


@dataclass(frozen=True, slots=True)
class Tiles:
    """How the work of one call is cut up: a choice of speed, not of results.

    Attributes:
        rows: rows (query token and head) of a program, at least 16.
        keys: positions that it takes at once, at least 16.
        warps: its threads, in 32s.
        stages: tiles of keys in flight.
        splits: shares that the keys of a sequence are cut into.
    """

    rows: int
    keys: int
    warps: int
    stages: int
    splits: int


@dataclass(frozen=True, slots=True)
class LatentTiles(Tiles):
    """The same for latent attention of few tokens: splits are a multiple of `rows / few_rows`.

    Attributes:
        few_rows: rows of a program where a sequence is short; there are fewer shares then.
        few: keys of a short sequence, at most.
    """

    few_rows: int
    few: int


def choose_tiles(
    rows: int,
    columns: int,
    longest: int,
    dims: tuple[int, ...],
    dtype: torch.dtype,
    device: torch.device,
    latent: bool = False,
) -> Tiles:
    """How to cut up a call.

    Args:
        rows: query tokens of a sequence times query heads of a keys' head.
        columns: sequences times keys' heads.
        longest: positions that a sequence can have, or that a window leaves.
        dims: of a key, of its second part (0: none) and of a value, padded.
        dtype: of the cache.
        device: where it runs; any but a CUDA device counts as a small one (Triton's interpreter).
        latent: whether a key's first part is the value.
    """
    processors, shared = _device_limits(device)
    is_large = shared >= _LARGE_SHARED
    key_bytes = (sum(dims[:2]) + (0 if latent else dims[2])) * dtype.itemsize
    if dtype == torch.float32:  # products on the vector units: a small path for exactness
        tile_rows, tile_keys, warps = 16, 16 if latent else 32, 4
    elif latent:
        tile_rows, tile_keys, warps = (64, 64, 8) if is_large and rows > 16 else (16, 32, 4)
    elif rows <= 16:
        tile_rows, tile_keys, warps = 16, 32 if dims[0] >= 128 else 64, 4
    else:
        tile_rows = min(triton.next_power_of_2(rows), 64 if max(dims) > 128 or not is_large else 128)
        tile_keys, warps = 64, 8 if tile_rows == 128 else 4
    # Registers take one tile of keys from shared memory at a time, unless the tensor cores read it there.
    in_registers = 0 if is_large and tile_rows >= 64 else 1
    query_bytes = tile_rows * (sum(dims[:2]) + tile_keys) * dtype.itemsize
    stages = 3 if tile_rows == 16 and tile_keys == 32 and not latent else 4
    while (stages - in_registers) * tile_keys * key_bytes + query_bytes > shared and (stages > 2 or tile_keys > 16):
        if stages > 2:
            stages -= 1
        else:
            tile_keys //= 2
    used = (stages - in_registers) * tile_keys * key_bytes + query_bytes
    programs = triton.cdiv(rows, tile_rows) * columns
    wanted = max(1, min(2, shared // used) * processors // programs)
    return Tiles(tile_rows, tile_keys, warps, stages, min(MAX_SPLITS, triton.cdiv(longest, 2 * tile_keys), wanted))


def choose_latent_tiles(
    heads: int, rows: int, columns: int, longest: int, dims: tuple[int, int], dtype: torch.dtype, device: torch.device
) -> LatentTiles | None:
    """How to cut up latent attention of few tokens, whose sequences may be short or long; None: as any attention.

    Measured on an H200: a program's first 64 keys for 16 rows take 6 us and the next 2.7, those for 64 rows 15 and 7.

    Args:
        heads: queries of a token.
        rows: see `choose_tiles`, like what follows.
        columns: sequences.
        longest: positions that a sequence can have.
        dims: of a latent and of the rotary part, padded.
        dtype: of the cache.
        device: where it runs.
    """
    processors, shared = _device_limits(device)
    tile_rows, few_rows, keys, stages = 64, 16, 64, 2
    used = (stages * keys + tile_rows) * sum(dims) * dtype.itemsize
    if dtype == torch.float32 or heads < tile_rows or used > shared:
        return None
    cuts = tile_rows // few_rows
    wanted = min(MAX_SPLITS, processors // (triton.cdiv(rows, tile_rows) * columns), cuts * triton.cdiv(longest, keys))
    splits = max(1, wanted // cuts) * cuts
    return LatentTiles(tile_rows, keys, 8, stages, splits, few_rows, _FEW_TILES * keys * splits // cuts)


@lru_cache
def _device_limits(device: torch.device) -> tuple[int, int]:
    """Multiprocessors, and bytes of shared memory that a program may have."""
    if device.type != "cuda":
        return 4, 99 * 1024
    properties: Any = torch.cuda.get_device_properties(device)
    shared = getattr(properties, "shared_memory_per_block_optin", 99 * 1024)
    return properties.multi_processor_count, shared


def padded(dim: int) -> int:
    """Width of the tile for so many columns: a power of two, at least the 16 that products take."""
    return max(16, 1 << (dim - 1).bit_length())
