"""The pools of all layers in one piece of memory, block after block. It does not know where the memory comes from."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from moesaic.errors import KernelError
from moesaic.kvcache.paged import KvShape, PoolLayer, check_dtype, pool_bytes

__all__ = ["pool_layers"]


def pool_layers(
    shapes: Sequence[KvShape], memory: torch.Tensor, num_blocks: int, block_size: int, dtype: torch.dtype
) -> list[PoolLayer]:
    """Layers whose pools lie in one piece of memory, block after block, each with its keys and values of all layers.

    So the first n blocks of all layers are the first bytes: memory that grows and shrinks at its end gives and takes
    whole blocks, and wastes nothing between layers.

    Args:
        shapes: of the layers.
        memory: uint8, at least `pool_bytes(shapes, num_blocks, block_size, dtype)`, on a multiple of 16.
        num_blocks: blocks of every layer.
        block_size: positions of a block.
        dtype: what is stored.

    Raises:
        KernelError: a pool cannot store the dtype, or the memory does not suffice.
    """
    check_dtype(dtype)
    needed = pool_bytes(shapes, num_blocks, block_size, dtype)
    if memory.numel() < needed:
        raise KernelError(f"{num_blocks} blocks take {needed} bytes: the memory has {memory.numel()}.")
    numbers = memory[:needed].view(dtype)
    apart, first = block_size * sum(shape.width for shape in shapes), numbers.storage_offset()
    layers: list[PoolLayer] = []
    for shape in shapes:
        parts: list[torch.Tensor | None] = []
        for dim in (shape.key_dim, shape.value_dim):
            heads = (num_blocks, block_size, shape.kv_heads, dim)
            strides = (apart, shape.kv_heads * dim, dim, 1)
            view = numbers.as_strided(heads, strides, first) if dim else None
            parts.append(view.squeeze(2) if view is not None and shape.value_dim == 0 else view)
            first += block_size * shape.kv_heads * dim
        keys, values = parts
        assert keys is not None
        layers.append(PoolLayer(keys, values))
    return layers
