"""`generate()` gives the tokens that stock transformers gives, however it is called."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from tests.engine.pairs import pair
from tests.tiny_models import FAMILIES, tiny_inputs
from transformers import DynamicCache, PreTrainedModel, StaticCache
from transformers.generation import BaseStreamer, StoppingCriteria, StoppingCriteriaList

from moesaic.kvcache import GrowingCache, growing

GREEDY = {"max_new_tokens": 12, "do_sample": False}


def _padded(batch: int = 3, length: int = 11) -> tuple[torch.Tensor, torch.Tensor]:
    """Prompts of different lengths, padded on the left, and their mask."""
    ids = tiny_inputs(batch, length, seed=3)
    mask = torch.ones_like(ids)
    for row in range(batch):
        mask[row, : 3 * row] = 0
    return ids * mask, mask


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy(family: str) -> None:
    stock, ours = pair(family)
    ids = tiny_inputs(batch=2, length=13)
    assert torch.equal(ours.generate(ids, **GREEDY), stock.generate(ids, **GREEDY))


@pytest.mark.parametrize("family", FAMILIES)
def test_beams(family: str) -> None:
    stock, ours = pair(family)
    arguments = GREEDY | {"num_beams": 3, "num_return_sequences": 2}
    ids = tiny_inputs(batch=2, length=13, seed=5)
    assert torch.equal(ours.generate(ids, **arguments), stock.generate(ids, **arguments))


@pytest.mark.parametrize("family", FAMILIES)
def test_padded_batch_equals_single_prompts(family: str) -> None:
    stock, ours = pair(family)
    ids, mask = _padded()
    together = ours.generate(ids, attention_mask=mask, **GREEDY)
    assert torch.equal(together, stock.generate(ids, attention_mask=mask, **GREEDY))
    for row in range(len(ids)):
        alone = ours.generate(ids[row : row + 1, 3 * row :], **GREEDY)
        assert torch.equal(alone[0, -12:], together[row, -12:])


_CALLS: dict[str, Callable[[PreTrainedModel], torch.Tensor]] = {
    "dynamic cache": lambda m: m.generate(tiny_inputs(), past_key_values=DynamicCache(config=m.config), **GREEDY),
    "static cache object": lambda m: m.generate(
        tiny_inputs(), past_key_values=StaticCache(config=m.config, max_cache_len=64), **GREEDY
    ),
    "static cache by name, padded": lambda m: m.generate(
        _padded()[0], attention_mask=_padded()[1], cache_implementation="static", **GREEDY
    ),
    "no cache": lambda m: m.generate(tiny_inputs(), max_new_tokens=5, do_sample=False, use_cache=False),
    "prefill in chunks": lambda m: m.generate(tiny_inputs(), prefill_chunk_size=5, **GREEDY),
    "minimum length and penalty": lambda m: m.generate(
        tiny_inputs(), repetition_penalty=1.3, no_repeat_ngram_size=2, **GREEDY
    ),
}


@pytest.mark.parametrize("family", ["qwen3_moe", "deepseek_v3", "gpt_oss", "qwen3_next"])
@pytest.mark.parametrize("call", _CALLS)
def test_other_ways(family: str, call: str) -> None:
    stock, ours = pair(family)
    assert torch.equal(_CALLS[call](ours), _CALLS[call](stock))


@pytest.mark.parametrize("family", ["qwen3_moe", "deepseek_v3", "gpt_oss"])
def test_prompt_lookup(family: str) -> None:
    """Assisted generation, which takes tokens back out of the cache."""
    stock, ours = pair(family)
    ids = tiny_inputs(batch=1)
    mine = ours.generate(ids, prompt_lookup_num_tokens=3, **GREEDY)
    assert torch.equal(mine, stock.generate(ids, prompt_lookup_num_tokens=3, **GREEDY))


@pytest.mark.parametrize("family", ["qwen3_moe", "deepseek_v2"])
def test_sampling_with_a_seed(family: str) -> None:
    results = []
    for model in pair(family):
        torch.manual_seed(7)
        results.append(
            model.generate(tiny_inputs(), max_new_tokens=20, do_sample=True, top_k=20, top_p=0.9, temperature=0.8)
        )
    assert torch.equal(results[0], results[1])


class _Recorder(BaseStreamer):
    def __init__(self) -> None:
        self.ids: list[int] = []
        self.ended = False

    def put(self, value: torch.Tensor) -> None:
        self.ids.extend(value.flatten().tolist())

    def end(self) -> None:
        self.ended = True


class _StopAfter(StoppingCriteria):
    def __init__(self, length: int) -> None:
        self._length = length

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **kwargs: object) -> torch.Tensor:
        return torch.full((len(input_ids),), input_ids.shape[1] >= self._length, dtype=torch.bool)


def test_streamer_and_stopping_criteria() -> None:
    _, ours = pair("olmoe")
    streamer = _Recorder()
    result = ours.generate(
        tiny_inputs(batch=1, length=6),
        streamer=streamer,
        stopping_criteria=StoppingCriteriaList([_StopAfter(11)]),
        **GREEDY,
    )
    assert result.shape == (1, 11)
    assert streamer.ids == result[0].tolist() and streamer.ended


def test_end_token_ends() -> None:
    stock, ours = pair("mixtral")
    ids = tiny_inputs(batch=2, length=6)
    end = int(stock.generate(ids, **GREEDY)[0, 10])
    results = [model.generate(ids, eos_token_id=end, **GREEDY) for model in (stock, ours)]
    assert torch.equal(*results)


@pytest.mark.parametrize("family", ["qwen3_moe", "deepseek_v3", "gpt_oss"])
def test_generation_across_cache_growth(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Several times more positions than the first allocation has room for, and than gpt_oss's window is wide."""
    monkeypatch.setattr(growing, "INITIAL_CAPACITY", 8)
    stock, ours = pair(family)
    ids = tiny_inputs(batch=1, length=4)
    arguments = {"max_new_tokens": 60, "do_sample": False}
    assert torch.equal(ours.generate(ids, **arguments), stock.generate(ids, **arguments))


def test_torch_keeps_to_one_thread_while_generating() -> None:
    """Its threads would spin on the kernels' cores; what the caller had set comes back."""
    seen = []

    class Watch(_Recorder):
        def put(self, value: torch.Tensor) -> None:
            seen.append(torch.get_num_threads())

    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        pair("qwen3_moe")[1].generate(tiny_inputs(batch=1), streamer=Watch(), **GREEDY)
        assert torch.get_num_threads() == 2 and set(seen) == {1}
    finally:
        torch.set_num_threads(before)


def test_the_default_cache_grows_and_others_are_kept() -> None:
    _, ours = pair("qwen3_moe")
    arguments = {"max_new_tokens": 2, "do_sample": False, "return_dict_in_generate": True}
    assert type(ours.generate(tiny_inputs(), **arguments).past_key_values) is GrowingCache
    static = ours.generate(tiny_inputs(), cache_implementation="static", **arguments).past_key_values
    assert type(static) is StaticCache
    mine = DynamicCache(config=ours.config)
    assert ours.generate(tiny_inputs(), past_key_values=mine, **arguments).past_key_values is mine


@pytest.mark.parametrize("family", ["qwen3_moe", "deepseek_v3", "gpt_oss"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_cache(family: str, dtype: torch.dtype) -> None:
    """Keys, values and latents in 16 bits: half the memory, and logits as near as 8 (11) bits of mantissa are."""
    ours, ids = pair(family)[1], tiny_inputs(batch=2, length=24)
    cache = GrowingCache(ours.config, dtype)
    with torch.no_grad():
        expected = ours(ids).logits
        found = [ours(ids[:, :20], past_key_values=cache).logits]
        found += [ours(ids[:, i : i + 1], past_key_values=cache).logits for i in range(20, 24)]
    assert {layer.keys.dtype for layer in cache.layers} == {dtype}
    assert (torch.cat(found, 1) - expected).norm() < 0.02 * expected.norm()
