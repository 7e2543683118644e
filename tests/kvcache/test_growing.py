"""Growing cache layers against the concatenating layers of transformers: the same states after the same calls."""

from __future__ import annotations

import random

import pytest
import torch
from transformers import AutoConfig, DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer, LinearAttentionLayer

from moesaic.kvcache import GrowingCache, GrowingLayer, GrowingSlidingLayer
from moesaic.kvcache import growing as module


def _states(batch: int, length: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values of different sizes, as the latents and rotary keys of MLA are."""
    return (
        torch.randn(batch, 2, length, 8, generator=generator),
        torch.randn(batch, 2, length, 6, generator=generator),
    )


def _stock(window: int | None) -> DynamicLayer:
    """A new layer of transformers, recording if it slides."""
    if window is None:
        return DynamicLayer()
    layer = DynamicSlidingWindowLayer(window)
    layer.activate_past_recording()
    return layer


def _assert_same(ours, stock) -> None:
    assert ours.get_seq_length() == stock.get_seq_length()
    assert ours.get_mask_sizes(3) == stock.get_mask_sizes(3)
    if stock.get_seq_length() > 0:
        torch.testing.assert_close(ours.keys, stock.keys, rtol=0, atol=0)
        torch.testing.assert_close(ours.values, stock.values, rtol=0, atol=0)


@pytest.mark.parametrize("window", [None, 5, 8])
@pytest.mark.parametrize("seed", range(8))
def test_random_calls_equal_stock(window: int | None, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "INITIAL_CAPACITY", 4)
    rng, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    ours = GrowingLayer() if window is None else GrowingSlidingLayer(window)
    stock = _stock(window)
    if window is not None:
        ours.activate_past_recording()
    batch = 3
    for _ in range(60):
        action = rng.choice(["update"] * 5 + ["reorder", "crop", "select", "repeat", "reset"])
        if action == "update":
            keys, values = _states(batch, rng.choice([1, 1, 1, 2, 7]), generator)
            visible, _ = stock.get_mask_sizes(keys.shape[2])
            for mine, theirs in zip(ours.update(keys, values), stock.update(keys, values), strict=True):
                # Recording layers of transformers 5.17 return more than the mask that they announce is for.
                torch.testing.assert_close(mine, theirs[:, :, -visible:], rtol=0, atol=0)
        elif action == "reorder":
            index = torch.tensor([rng.randrange(batch) for _ in range(batch)])
            ours.reorder_cache(index)
            stock.reorder_cache(index)
        elif action == "crop" and stock.get_seq_length() > 0:
            removed = -rng.randrange(min(3, stock.get_seq_length()))
            ours.crop(removed)
            stock.crop(removed)
        elif action == "select" and stock.get_seq_length() > 0 and batch > 1:
            index = torch.tensor(sorted(rng.sample(range(batch), batch - 1)))
            ours.batch_select_indices(index)
            stock.batch_select_indices(index)
            batch -= 1
        elif action == "repeat" and stock.get_seq_length() > 0 and batch < 5:
            ours.batch_repeat_interleave(2)
            stock.batch_repeat_interleave(2)
            batch *= 2
        elif action == "reset" and rng.random() < 0.3:
            ours.reset()
            stock = _stock(window)  # what a reset layer should be like; that of 5.17 keeps its length
        _assert_same(ours, stock)


def test_sliding_layer_keeps_only_its_window() -> None:
    generator = torch.Generator().manual_seed(0)
    ours, stock = GrowingSlidingLayer(8), DynamicSlidingWindowLayer(8)
    for step in range(700):
        keys, values = _states(1, 20 if step == 0 else 1, generator)
        for mine, theirs in zip(ours.update(keys, values), stock.update(keys, values), strict=True):
            torch.testing.assert_close(mine, theirs, rtol=0, atol=0)
        _assert_same(ours, stock)
    assert ours.keys.shape[2] == 7
    assert ours._buffers.capacity <= module.INITIAL_CAPACITY
    with pytest.raises(RuntimeError, match="activate_past_recording"):
        ours.crop(-1)


def test_growth_is_by_doubling() -> None:
    layer = GrowingLayer()
    states = torch.zeros(1, 1, 1, 4)
    buffers = set()
    for _ in range(2000):
        layer.update(states, states)
        buffers.add(layer.keys.data_ptr())
    assert layer.get_seq_length() == 2000
    assert len(buffers) <= 5  # 256, 512, 1024, 2048 (and the allocator may reuse one)


def test_cache_takes_layer_kinds_from_the_config() -> None:
    gpt_oss = AutoConfig.for_model("gpt_oss", num_hidden_layers=4, sliding_window=16)
    assert [type(layer) for layer in GrowingCache(gpt_oss).layers] == [GrowingSlidingLayer, GrowingLayer] * 2
    qwen3_next = AutoConfig.for_model("qwen3_next", num_hidden_layers=4)
    assert [type(layer) for layer in GrowingCache(qwen3_next).layers] == [LinearAttentionLayer] * 3 + [GrowingLayer]
    assert isinstance(GrowingCache(gpt_oss), DynamicCache)


def test_positive_crop_is_refused() -> None:
    with pytest.raises(ValueError, match="negative"):
        GrowingLayer().crop(3)
