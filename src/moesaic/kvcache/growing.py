"""The default cache of `generate()`: preallocated buffers that grow by doubling.

The dynamic cache of transformers concatenates, so that every token copies the whole past: quadratic in the length. Here
a token is written into room that is already there, and the room doubles when it runs out, so a copy is paid once per
doubling. Sliding layers write into a buffer of twice their window and move the window to the front when they reach its
end. An MLA layer is a `GrowingLayer` whose "keys" are latents and whose "values" are rotary keys, of one head each.

Beams, crop, batch selection and left padding work as in transformers, whose classes these are subclasses of. It does
not know what computes attention; masks come from `get_mask_sizes` as in transformers.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import PretrainedConfig
from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

__all__ = ["GrowingCache", "GrowingLayer", "GrowingSlidingLayer"]

INITIAL_CAPACITY = 256
"""Positions that the first allocation of a layer has room for, at least."""


class _Buffers:
    """Keys and values `[batch, heads, capacity, dim]` of which positions `start` to `end` are in use.

    Keys and values may differ in heads, dim and dtype, never in batch or positions.
    """

    def __init__(self, keys: torch.Tensor, values: torch.Tensor, capacity: int, dtype: torch.dtype | None) -> None:
        """Make room for `capacity` positions shaped (without a dtype: and typed) as these `[batch, heads, _, dim]`."""
        self.start = 0
        self.end = 0
        self.tensors = self._empty(keys, capacity, dtype), self._empty(values, capacity, dtype)

    @staticmethod
    def _empty(like: torch.Tensor, capacity: int, dtype: torch.dtype | None = None) -> torch.Tensor:
        return like.new_empty((like.shape[0], like.shape[1], capacity, like.shape[3]), dtype=dtype)

    @property
    def capacity(self) -> int:
        return self.tensors[0].shape[2]

    def view(self, start: int, end: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of these positions, without a copy."""
        keys, values = self.tensors
        return keys.narrow(2, start, end - start), values.narrow(2, start, end - start)

    def append(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Write new states behind the last; needs room for them (see `reserve`)."""
        new_end = self.end + keys.shape[2]
        key_view, value_view = self.view(self.end, new_end)
        key_view.copy_(keys)
        value_view.copy_(values)
        self.end = new_end

    def reserve(self, num_new: int) -> None:
        """Make room for `num_new` more positions: move to the front if half the buffer is free, double it otherwise."""
        if self.end + num_new <= self.capacity:
            return
        length = self.end - self.start
        needed = length + num_new
        # Without the factor 2 a full sliding buffer would be moved at every token.
        capacity = self.capacity if 2 * needed <= self.capacity else max(2 * self.capacity, 2 * needed)
        self._replace(lambda x: x, capacity)

    def select(self, indices: torch.Tensor) -> None:
        """Keep these rows of the batch, in this order; a row may occur more than once or not at all."""
        self._replace(lambda x: x.index_select(0, indices.to(x.device)), self.capacity)

    def _replace(self, transform: Any, capacity: int) -> None:
        """Copy the positions in use, transformed along the batch, to the front of new buffers."""
        length = self.end - self.start
        keys, values = (transform(old[:, :, self.start : self.end]) for old in self.tensors)
        new_keys, new_values = self._empty(keys, capacity), self._empty(values, capacity)
        new_keys[:, :, :length].copy_(keys)
        new_values[:, :, :length].copy_(values)
        self.tensors = new_keys, new_values
        self.start, self.end = 0, length


class _BufferedLayer:
    """What full and sliding layers share: the buffers behind `keys` and `values`."""

    _buffers: _Buffers | None = None
    storage_dtype: torch.dtype | None = None
    is_initialized: bool

    @property
    def keys(self) -> torch.Tensor | None:
        """Keys in use, `[batch, heads, length, dim]`, or None before the first update."""
        return None if self._buffers is None else self._buffers.view(self._buffers.start, self._buffers.end)[0]

    @keys.setter
    def keys(self, value: torch.Tensor | None) -> None:
        self._assign_none(value)

    @property
    def values(self) -> torch.Tensor | None:
        """Values in use, `[batch, heads, length, dim]`, or None before the first update."""
        return None if self._buffers is None else self._buffers.view(self._buffers.start, self._buffers.end)[1]

    @values.setter
    def values(self, value: torch.Tensor | None) -> None:
        self._assign_none(value)

    def _assign_none(self, value: torch.Tensor | None) -> None:
        # The base classes assign None in their constructor and in reset(); nothing may put a tensor in from outside.
        if value is not None:
            raise AttributeError(
                "the states of a growing cache layer are changed by update(), crop() and reorder_cache()"
            )
        self._buffers = None

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Allocate the buffers for states like these (`[batch, heads, num_new, dim]`, float)."""
        self.dtype, self.device = key_states.dtype, key_states.device
        capacity = max(INITIAL_CAPACITY, 2 * key_states.shape[2])
        self._buffers = _Buffers(key_states, value_states, capacity, self.storage_dtype)
        self.is_initialized = True

    def reset(self) -> None:
        """Forget everything, as a new layer (some versions of transformers would keep the length, of zeros)."""
        self._buffers = None
        self.is_initialized = False
        super().reset()  # type: ignore[misc]

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """Beam search: row i of the batch becomes what row `beam_idx[i]` was."""
        if self._buffers is None or self._buffers.end == 0:
            return
        # Beams that keep their order are common (and the only case for one beam): nothing to copy.
        if not torch.equal(beam_idx.cpu(), torch.arange(beam_idx.numel())):
            self._buffers.select(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row of the batch `repeats` times, copies side by side."""
        if self._buffers is not None:
            rows = torch.arange(self._buffers.view(0, 0)[0].shape[0])
            self._buffers.select(rows.repeat_interleave(repeats))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keep these rows of the batch (indices, or a boolean per row)."""
        if self._buffers is not None:
            self._buffers.select(indices.nonzero().flatten() if indices.dtype == torch.bool else indices)


class GrowingLayer(_BufferedLayer, DynamicLayer):  # type: ignore[misc]
    """Full attention, or the latents of MLA: keeps every position."""

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Append states `[batch, heads, num_new, dim]`; return all of them as views `[batch, heads, length, dim]`."""
        if self._buffers is None:
            self.lazy_initialization(key_states, value_states)
        buffers = self._buffers
        assert buffers is not None
        buffers.reserve(key_states.shape[2])
        buffers.append(key_states, value_states)
        return buffers.view(0, buffers.end)

    def reserve(
        self, like: torch.Tensor, num_heads: int, key_dim: int, value_dim: int
    ) -> tuple[torch.Tensor, torch.Tensor, int]:
        """Room for a kernel that writes new states itself; `advance` makes them part of the cache.

        Args:
            like: hidden states `[batch, num_new, ...]`, for the batch, the number of new positions and the dtype.
            num_heads: of keys and values.
            key_dim: of a key.
            value_dim: of a value.

        Returns:
            Keys and values with room `[batch, num_heads, capacity, dim]`, and the number of positions in use.
        """
        batch, num_new = like.shape[:2]
        if self._buffers is None:
            self.lazy_initialization(
                like.new_empty(batch, num_heads, num_new, key_dim), like.new_empty(batch, num_heads, num_new, value_dim)
            )
        buffers = self._buffers
        assert buffers is not None
        buffers.reserve(num_new)
        return *buffers.tensors, buffers.end

    def advance(self, num_new: int) -> None:
        """Count the positions that have been written behind the last into what `reserve` gave."""
        assert self._buffers is not None
        self._buffers.end += num_new

    def get_seq_length(self) -> int:
        """Number of positions stored."""
        return 0 if self._buffers is None else self._buffers.end

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last `-tokens_to_remove` positions (transformers passes a negative number, or 0)."""
        if tokens_to_remove > 0:
            raise ValueError(f"crop({tokens_to_remove}): pass the negative of the number of tokens to remove.")
        if self._buffers is not None:
            self._buffers.end = max(0, self._buffers.end + tokens_to_remove)


class GrowingSlidingLayer(_BufferedLayer, DynamicSlidingWindowLayer):  # type: ignore[misc]
    """Sliding-window attention: keeps the last `sliding_window - 1` positions, all that the next token sees."""

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Append states; return the positions kept so far and the new ones, `[batch, heads, kept + num_new, dim]`."""
        if self._buffers is None:
            self.lazy_initialization(key_states, value_states)
        buffers = self._buffers
        assert buffers is not None
        num_new = key_states.shape[2]
        buffers.reserve(num_new)
        visible_from = max(buffers.start, buffers.end - self.sliding_window + 1)
        buffers.append(key_states, value_states)
        self.cumulative_length += num_new
        states = buffers.view(visible_from, buffers.end)
        if not self.record_past:
            self._trim()
        return states

    def _trim(self) -> None:
        buffers = self._buffers
        if buffers is not None:
            buffers.start = max(buffers.start, buffers.end - self.sliding_window + 1)

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last `-tokens_to_remove` positions, then all but the window.

        Raises:
            RuntimeError: positions that fell out of the window are gone (see `activate_past_recording`).
        """
        if tokens_to_remove > 0:
            raise ValueError(f"crop({tokens_to_remove}): pass the negative of the number of tokens to remove.")
        if self._buffers is None:
            return
        if tokens_to_remove < 0 and self.cumulative_length >= self.sliding_window and not self.record_past:
            raise RuntimeError(
                "crop() of a sliding window that is full: call activate_past_recording() before the tokens that may "
                "have to be removed."
            )
        removed = min(-tokens_to_remove, self._buffers.end - self._buffers.start)
        self._buffers.end -= removed
        self.cumulative_length -= removed
        self._trim()


class GrowingCache(DynamicCache):  # type: ignore[misc]
    """A `DynamicCache` whose attention layers are growing buffers; layers of other kinds stay those of transformers.

    Args:
        config: the model's configuration, which says which layers slide and which are linear attention.
        dtype: what states are stored as (float32, bfloat16 or float16); None stores them as they come.
    """

    def __init__(self, config: PretrainedConfig, dtype: torch.dtype | None = None) -> None:
        super().__init__(config=config)
        self.layers: list[Any] = [_growing(layer, dtype) for layer in self.layers]


def _growing(layer: Any, dtype: torch.dtype | None) -> Any:
    growing: GrowingLayer | GrowingSlidingLayer
    # Exact types: subclasses (hybrid, indexed layers) carry further state that a growing layer would lose.
    if type(layer) is DynamicLayer:
        growing = GrowingLayer()
    elif type(layer) is DynamicSlidingWindowLayer:
        growing = GrowingSlidingLayer(layer.sliding_window)
    else:
        return layer
    growing.storage_dtype = dtype
    return growing
