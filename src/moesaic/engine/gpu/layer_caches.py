"""The cache of every layer on a GPU: blocks of keys and values, of its own memory or of lent memory, and states."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from moesaic.engine.gpu.lending import VramLending
from moesaic.kvcache.paged import BlockPool, KvShape, PoolLayer
from moesaic.kvcache.states import StateLayer, StateShape

__all__ = ["layer_caches"]


def layer_caches(
    shapes: Sequence[KvShape | StateShape],
    num_blocks: int,
    block_size: int,
    dtype: torch.dtype,
    num_states: int,
    device: torch.device,
    lending: VramLending | None,
) -> tuple[BlockPool, list[PoolLayer | StateLayer]]:
    """The pool, and the memory of each layer.

    Args:
        shapes: what each layer stores.
        num_blocks: blocks of the pool, without lending.
        block_size: positions of a block.
        dtype: of keys and values.
        num_states: sequences that have recurrent states at once.
        device: the GPU.
        lending: where memory of blocks comes from; its own if None.
    """
    with_keys = [shape for shape in shapes if isinstance(shape, KvShape)]
    if lending is not None:
        pool, pools = lending.pool(with_keys, block_size, dtype)
    else:
        pool = BlockPool(num_blocks, block_size)
        pools = [PoolLayer.empty(shape, num_blocks, block_size, dtype, device) for shape in with_keys]
    following = iter(pools)
    states = [
        StateLayer.empty(shape, num_states, device) if isinstance(shape, StateShape) else None for shape in shapes
    ]
    return pool, [next(following) if state is None else state for state in states]
