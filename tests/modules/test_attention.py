"""The attention interface "moesaic" and its masks against the eager attention of the model library."""

from __future__ import annotations

import pytest
import torch
from transformers.integrations.sdpa_attention import repeat_kv
from transformers.masking_utils import causal_mask_function, sliding_window_causal_mask_function

from moesaic.modules.attention import attention_forward, attention_mask


class _Module(torch.nn.Module):
    num_key_value_groups = 2


def _states(num_queries: int, num_keys: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(num_queries * 100 + num_keys)
    shapes = ((2, 4, num_queries, 16), (2, 2, num_keys, 16), (2, 2, num_keys, 24))
    query, key, value = (torch.randn(*shape, generator=generator) for shape in shapes)
    return query, key, value


def _eager(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, visible: torch.Tensor, sinks: torch.Tensor | None
) -> torch.Tensor:
    """Softmax attention written out, float64; `visible [batch, 1, queries, keys]`."""
    query, key, value = query.double(), repeat_kv(key, 2).double(), repeat_kv(value, 2).double()
    scores = (query @ key.transpose(2, 3) * 0.3).masked_fill(~visible, -torch.inf)
    if sinks is not None:
        column = sinks.double().view(1, -1, 1, 1).expand(*scores.shape[:3], 1)
        scores = torch.cat([scores, column], -1)
    return (scores.softmax(-1)[..., : key.shape[2]] @ value).transpose(1, 2)


@pytest.mark.parametrize("with_sinks", [False, True])
@pytest.mark.parametrize(("num_queries", "past"), [(7, 0), (1, 12), (5, 6)])
@pytest.mark.parametrize("window", [None, 4, 50])
@pytest.mark.parametrize("padding", [0, 3])
def test_masks_and_attention(num_queries: int, past: int, window: int | None, padding: int, with_sinks: bool) -> None:
    num_keys = num_queries + past
    query, key, value = _states(num_queries, num_keys)
    padding_mask = torch.ones(2, num_keys, dtype=torch.bool)
    padding_mask[0, :padding] = False
    mask = attention_mask(
        2,
        num_queries,
        num_keys,
        q_offset=past,
        mask_function=causal_mask_function if window is None else sliding_window_causal_mask_function(window),
        attention_mask=padding_mask if padding else None,
        local_size=window,
    )
    needs_mask = padding > 0 or (window is not None and num_keys > window)
    assert (mask is not None) == needs_mask
    sinks = torch.tensor([0.5, -1.0, 2.0, 0.0]) if with_sinks else None
    found, weights = attention_forward(_Module(), query, key, value, mask, scaling=0.3, s_aux=sinks)

    positions = torch.arange(num_queries)[:, None] + past - torch.arange(num_keys)[None]
    visible = (positions >= 0) & (positions < (window or num_keys + 1))
    visible = visible[None, None] & padding_mask[:, None, None]
    sees_something = visible.any(-1)[:, 0]  # a padded query sees nothing, and nobody looks at what it gives
    expected = _eager(query, key, value, visible, sinks)
    torch.testing.assert_close(found[sees_something].double(), expected[sees_something], rtol=1e-5, atol=1e-5)
    assert weights is None and bool(found.isfinite().all())


def test_static_cache_is_masked_beyond_its_length() -> None:
    """Static caches return all their room, of which the rest is in the future; their offset is a tensor."""
    mask = attention_mask(1, 1, 16, q_offset=torch.tensor(5), attention_mask=torch.ones(1, 6, dtype=torch.bool))
    assert mask is not None and mask[0, 0, 0].tolist() == [True] * 6 + [False] * 10
