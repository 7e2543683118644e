"""Attention of the model library through the native kernel, under the name "moesaic" of its attention interface.

The attention modules of transformers compute projections, norms and rotary embedding themselves and hand queries, keys
and values to the implementation that `config._attn_implementation` names; the mask is made by the function registered
under the same name. So every model with an attention interface runs on the kernel, known or not.

Mask convention: None means causal, aligned at the last key (query i of T sees keys up to S - T + i), nothing padded and
no window narrower than the keys. Everything else is a boolean mask, True where a key is visible.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface, causal_mask_function, sdpa_mask

from moesaic.kernels import ops

__all__ = ["ATTENTION_NAME", "attention_forward", "attention_mask", "keep_stock_attention", "register_attention"]

ATTENTION_NAME = "moesaic"


def attention_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | torch.Tensor = 0,
    kv_offset: int = 0,
    mask_function: Callable[..., Any] = causal_mask_function,
    attention_mask: torch.Tensor | None = None,
    local_size: int | None = None,
    allow_is_causal_skip: bool = True,
    **kwargs: Any,
) -> torch.Tensor | None:
    """The mask that the model library asks for, as `attention_forward` takes it (see the convention above).

    Args:
        batch_size: rows of the batch.
        q_length: queries.
        kv_length: keys that the cache returns.
        q_offset: position of the first query; a tensor for static caches.
        kv_offset: position of the first key.
        mask_function: which keys a query sees, by position.
        attention_mask: bool `[batch, positions]`, False where padded, or None.
        local_size: width of the sliding window or chunk, if there is one.
        allow_is_causal_skip: False if `mask_function` is more than causal (or the cache is static).
        kwargs: passed on to transformers' own mask function.

    Returns:
        None, or bool `[batch, 1, q_length, kv_length]`.
    """
    if (
        allow_is_causal_skip
        and isinstance(q_offset, int)
        and q_offset + q_length == kv_offset + kv_length
        and (local_size is None or kv_length <= local_size)
        and (attention_mask is None or bool(attention_mask[:, kv_offset : kv_offset + kv_length].all()))
    ):
        return None
    mask: torch.Tensor = sdpa_mask(
        batch_size,
        q_length,
        kv_length,
        q_offset=q_offset,
        kv_offset=kv_offset,
        mask_function=mask_function,
        attention_mask=attention_mask,
        local_size=local_size,
        allow_is_causal_skip=False,
        **kwargs,
    )
    return mask


def attention_forward(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """What transformers calls for `attn_implementation="moesaic"`.

    Args:
        module: the attention module (unused; part of the interface).
        query: float32 `[batch, heads, q_length, head_dim]`.
        key: `[batch, kv_heads, kv_length, head_dim]`, float32 or bfloat16, any strides.
        value: `[batch, kv_heads, kv_length, value_dim]`.
        attention_mask: from `attention_mask`.
        scaling: factor of the scores; `head_dim ** -0.5` if None.
        softcap: bound of the scores by tanh, if any.
        s_aux: float `[heads]`, logits of the attention sinks (gpt-oss), if any.
        kwargs: dropout and window of the interface: inference has none, and the mask holds the other.

    Returns:
        float32 `[batch, q_length, heads, value_dim]`, and None in place of the attention weights (which only a module
        that keeps the stock attention returns).
    """
    stock = getattr(module, "moesaic_stock_attention", None)
    if stock is not None:
        mask = _additive(attention_mask, query, key.shape[2])
        result: tuple[torch.Tensor, torch.Tensor | None] = stock(
            module, query, key, value, mask, scaling=scaling, softcap=softcap, s_aux=s_aux, **kwargs
        )
        return result
    output = ops.attention(
        query,
        key,
        value,
        scale=query.shape[-1] ** -0.5 if scaling is None else scaling,
        causal_offset=key.shape[2] - query.shape[2] if attention_mask is None else None,
        mask=attention_mask,
        sinks=s_aux,
        softcap=softcap,
    )
    return output, None


def _additive(mask: torch.Tensor | None, query: torch.Tensor, num_keys: int) -> torch.Tensor:
    """A mask of the convention above as eager attention takes it: 0 where visible, the least float elsewhere."""
    if mask is None:
        num_queries = query.shape[2]
        mask = torch.ones(num_queries, num_keys, dtype=torch.bool).tril(num_keys - num_queries)[None, None]
    return torch.zeros(mask.shape).masked_fill_(~mask, torch.finfo(torch.float32).min)


def register_attention() -> None:
    """Make "moesaic" known to the model library; calling it again changes nothing."""
    AttentionInterface.register(ATTENTION_NAME, attention_forward)
    AttentionMaskInterface.register(ATTENTION_NAME, attention_mask)


def keep_stock_attention(module: nn.Module) -> None:
    """Let an attention module compute with the eager implementation of its own modeling file.

    The model's masks stay those of "moesaic", because transformers makes one mask for all layers.
    """
    module.moesaic_stock_attention = sys.modules[type(module).__module__].eager_attention_forward
