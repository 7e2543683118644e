"""How the memory of a cache on the CPU is divided: blocks of positions, and recurrent states where a model has them.

It allocates nothing, and knows no sequences.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from moesaic.errors import ConfigError, PlanDoesNotFitError, UnsupportedModelError
from moesaic.kvcache.paged import KvShape, pool_bytes
from moesaic.kvcache.states import StateShape
from moesaic.modules.paged_decoder import paged_cache_shapes
from moesaic.modules.rotary import longest_context
from moesaic.placement import DEFAULT_CONTEXT, detect_hardware

__all__ = ["BLOCK_SIZE", "CacheRoom", "default_cache_bytes", "position_bytes", "room_for_cache"]

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


def position_bytes(model: Any, kv_dtype: torch.dtype = torch.bfloat16) -> tuple[int, int] | None:
    """Bytes of a position in all layers, and of a sequence's recurrent states; None if the model cannot be paged."""
    try:
        shapes = paged_cache_shapes(model)
    except UnsupportedModelError:
        return None
    position = pool_bytes([shape for shape in shapes if isinstance(shape, KvShape)], 1, 1, kv_dtype)
    return position, sum(shape.nbytes for shape in shapes if isinstance(shape, StateShape))


def default_cache_bytes(
    model: Any, position: int, state: int, *, share: int, context: int | None = None, max_batch: int = 1
) -> int:
    """Bytes of a cache on the CPU where nobody says how many.

    Args:
        model: a loaded causal language model.
        position: bytes of a position.
        state: bytes of a sequence's recurrent states.
        share: it gets one in so many bytes of the DRAM that is free.
        context: but at least room for so many positions; a usual one if None.
        max_batch: and no more than so many sequences can use.

    Raises:
        PlanDoesNotFitError: these positions do not fit.
    """
    free, context = detect_hardware().dram_available, context or DEFAULT_CONTEXT
    least = (-(-context // BLOCK_SIZE) + 1) * BLOCK_SIZE * position + state
    if least > free:
        raise PlanDoesNotFitError(
            f"a cache for {context} tokens takes {least / 2**30:.2f} GiB, but {free / 2**30:.2f} GiB of DRAM are free "
            "beside the weights: use a smaller --context."
        )
    longest = longest_context(model.config.get_text_config())
    most = free if longest is None else ((longest + BLOCK_SIZE) * position + state) * max_batch
    return max(least, min(free // share, most))


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
