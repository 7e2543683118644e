"""How the memory of a cache on the CPU is divided: blocks of positions, and recurrent states where a model has them.

It allocates nothing, and knows no sequences.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from moesaic.errors import ConfigError, UnsupportedModelError
from moesaic.kvcache.paged import KvShape, pool_bytes
from moesaic.kvcache.states import StateShape
from moesaic.modules.paged_decoder import paged_cache_shapes

__all__ = ["BLOCK_SIZE", "CacheRoom", "room_for_cache"]

BLOCK_SIZE = 64
_STATES_SHARE = 2
"""States get at most one in so many bytes."""


@dataclass(frozen=True, slots=True)
class CacheRoom:
    """What fits.

    Attributes:
        num_blocks: of all layers that keep positions.
        num_states: sequences that can be there at once; None: the model has no recurrent states.
    """

    num_blocks: int
    num_states: int | None = None


def room_for_cache(
    model: Any,
    kv_cache_bytes: int,
    *,
    max_batch: int = 64,
    context: int = 0,
    block_size: int = BLOCK_SIZE,
    kv_dtype: torch.dtype = torch.bfloat16,
) -> CacheRoom | None:
    """What fits into so many bytes; None if the model cannot be paged.

    Args:
        model: a loaded causal language model on the CPU.
        kv_cache_bytes: for everything.
        max_batch: there is use for so many states.
        context: positions that are to fit before there is a second state.
        block_size: positions of a block.
        kv_dtype: what blocks store.

    Raises:
        ConfigError: not even one block and one state do.
    """
    try:
        shapes = paged_cache_shapes(model)
    except UnsupportedModelError:
        return None
    block = pool_bytes([shape for shape in shapes if isinstance(shape, KvShape)], 1, block_size, kv_dtype)
    state = sum(shape.nbytes for shape in shapes if isinstance(shape, StateShape))
    if kv_cache_bytes < block + state:
        with_state = f" and the recurrent state of a sequence {state}" if state else ""
        raise ConfigError(
            f"{kv_cache_bytes} bytes for the cache: one block of {block_size} positions takes {block}{with_state}. "
            "Give the cache more memory."
        )
    if state == 0:
        return CacheRoom(kv_cache_bytes // block)
    for_states = min(kv_cache_bytes // _STATES_SHARE, kv_cache_bytes - -(-context // block_size) * block)
    num_states = max(1, min(max_batch, for_states // state))
    return CacheRoom(max(1, (kv_cache_bytes - num_states * state) // max(1, block)), num_states)
