"""Some or all layers of a decoder as one native call, on a paged cache: tokens of many sequences at once.

A range of layers may run at a time, so that a long prompt can go through some of them between the steps of others. It
knows no model, and no cache but its tensors.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from moesaic import _native
from moesaic.errors import KernelError
from moesaic.kernels._checks import check_shape, describe, vector_address
from moesaic.kernels.attention import cache_type
from moesaic.kernels.attention_blocks import AttentionBlock, LatentAttentionBlock
from moesaic.kernels.paged_attention import check_block_size, pool_strides, step_arguments
from moesaic.kernels.stack import DecoderStack

__all__ = ["PagedStack"]


class PagedStack:
    """A stack with its caches.

    Args:
        stack: blocks of the layers.
        caches: keys and values of each layer, float32, bfloat16 or float16
            `[num_blocks, block_size, kv_heads, head_dim]`; of latent attention `[num_blocks, block_size, latent_dim +
            rope_dim]` and None.
        windows: of each layer, how many of the last positions a token sees; None: all.

    Raises:
        KernelError: a cache does not go with its layer, or caches differ in blocks or type.
    """

    def __init__(
        self,
        stack: DecoderStack,
        caches: Sequence[tuple[torch.Tensor, torch.Tensor | None]],
        windows: Sequence[int | None],
    ) -> None:
        if not len(stack.layers) == len(caches) == len(windows):
            raise KernelError(f"{len(caches)} caches and {len(windows)} windows for {len(stack.layers)} layers.")
        self.num_layers, self.hidden = len(caches), stack.layers[0][0].hidden
        self.num_pairs = stack.layers[0][0].num_pairs
        self._owners = stack, list(caches)  # the native stack holds addresses into these
        blocks, block_size = caches[0][0].shape[:2]
        check_block_size(block_size)
        dtype = caches[0][0].dtype
        kind, native = 0, []
        for (attention, _), (keys, values), window in zip(stack.layers, caches, windows, strict=True):
            kind, pair = _pool_of(attention, keys, values, (blocks, block_size), dtype)
            strides = [(part.data_ptr(), pool_strides(part)) for part in pair]
            native.append((*strides[0], *strides[1], window or 0))
        self.native: Any = _native.PagedStack(stack.native, native, kind, block_size, blocks)

    def __call__(
        self,
        x: torch.Tensor,
        cos: torch.Tensor,
        sin: torch.Tensor,
        slot_mapping: torch.Tensor,
        block_tables: torch.Tensor,
        seq_lens: torch.Tensor,
        query_start: torch.Tensor,
        first: int = 0,
        count: int | None = None,
    ) -> None:
        """Run layers `first` to `first + count - 1` in place; keys and values go into the caches.

        Args:
            x: float32 `[tokens, hidden]`, contiguous; see `kvcache.StepInput` for all that follows but angles.
            cos: float32 `[tokens, num_pairs]`, contiguous.
            sin: like cos.
            slot_mapping: int64 `[tokens]`.
            block_tables: int32 `[seqs, max_blocks]`.
            seq_lens: int32 `[seqs]`.
            query_start: int32 `[seqs + 1]`.
            first: layer to begin with.
            count: so many layers; all that are left if None.

        Raises:
            KernelError: a tensor has another shape, type or layout than said here, or tables lead out of the pool.
        """
        count = self.num_layers - first if count is None else count
        if first < 0 or count < 0 or first + count > self.num_layers:
            raise KernelError(f"layers {first} to {first + count} of {self.num_layers}.")
        tokens, tables = self._tokens(x, cos, sin), self._tables(x, slot_mapping, block_tables, seq_lens, query_start)
        try:
            self.native(*tokens[:2], first, count, *tokens[2:], *tables)
        except ValueError as error:
            raise KernelError(f"The tables of a step do not go together: {error}.") from error

    def finish(
        self,
        x: torch.Tensor,
        cos: torch.Tensor,
        sin: torch.Tensor,
        slot_mapping: torch.Tensor,
        block_tables: torch.Tensor,
        seq_lens: torch.Tensor,
        query_start: torch.Tensor,
    ) -> torch.Tensor:
        """Run the last layer for the last token of each sequence; the others only leave keys and values in the caches.

        Args: as those of a call. Each sequence has a token.

        Returns:
            float32 `[seqs, hidden]`; x stays as it is.

        Raises:
            KernelError: as for a call, or a sequence has no token.
        """
        tokens, tables = self._tokens(x, cos, sin), self._tables(x, slot_mapping, block_tables, seq_lens, query_start)
        out = torch.empty(len(seq_lens), self.hidden)
        try:
            self.native.finish(*tokens, *tables, out.data_ptr())
        except ValueError as error:
            raise KernelError(f"The tables of a step do not go together: {error}.") from error
        return out

    def _tokens(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> tuple[int, int, int, int, int]:
        """Checked: address and number of tokens, addresses and number of angles."""
        if x.dtype != torch.float32 or x.ndim != 2 or x.shape[1] != self.hidden:
            raise KernelError(f"x is {describe(x)}: expected float32 [tokens, {self.hidden}].")
        for name, part in (("cos", cos), ("sin", sin)):
            check_shape(name, part, (len(x), self.num_pairs))
        cos_address, sin_address = vector_address("cos", cos, cos.numel()), vector_address("sin", sin, sin.numel())
        return vector_address("x", x, x.numel()), len(x), cos_address, sin_address, self.num_pairs

    @staticmethod
    def _tables(x: torch.Tensor, slot_mapping: torch.Tensor, *where: torch.Tensor) -> tuple[int, ...]:
        """Checked: what the native calls take of a step."""
        return vector_address("slot_mapping", slot_mapping, len(x), torch.int64), *step_arguments(*where)


def _pool_of(
    attention: AttentionBlock | LatentAttentionBlock,
    keys: torch.Tensor,
    values: torch.Tensor | None,
    blocks: tuple[int, int],
    dtype: torch.dtype,
) -> tuple[int, tuple[torch.Tensor, torch.Tensor]]:
    """The number of the cache's type, and what the layer takes as keys and as values."""
    (key_heads, key_dim), (value_heads, value_dim) = attention.cache_shapes
    if isinstance(attention, LatentAttentionBlock):
        kind = cache_type("a cache of latents", keys, (*blocks, key_dim + value_dim), dtype)
        return kind, (keys[..., :key_dim], keys[..., key_dim:])
    if values is None:
        raise KernelError("a layer of grouped-query attention got no cache for values.")
    cache_type("a cache of values", values, (*blocks, value_heads, value_dim), dtype)
    return cache_type("a cache of keys", keys, (*blocks, key_heads, key_dim), dtype), (keys, values)
