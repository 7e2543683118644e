"""A decode step as one native call gives what the layers give one by one, and is left out where somebody looks."""

from __future__ import annotations

import pytest
import torch
from tests.engine.pairs import load_tiny

from moesaic.kvcache import CACHE_ARGUMENT, GrowingCache


def decode(model, ids, **options):
    """Logits of the last tokens, one step each, and the cache."""
    cache = GrowingCache(model.config)
    with torch.no_grad():
        model(ids[:, :6], use_cache=True, **{CACHE_ARGUMENT: cache})
        steps = [model(ids[:, i : i + 1], use_cache=True, **{CACHE_ARGUMENT: cache}, **options) for i in range(6, 10)]
    return steps, cache


@pytest.mark.parametrize("name", ["qwen3_moe", "deepseek_v3", "glm4_moe"])
def test_one_call_equals_the_layers(name, monkeypatch):
    ours = load_tiny(name)
    ids = torch.randint(ours.config.vocab_size, (2, 10), generator=torch.Generator().manual_seed(0))
    stack, used = ours._shared_state.stack, []
    run = stack.run

    def spy(*args):
        used.append(run(*args))
        return used[-1]

    monkeypatch.setattr(stack, "run", spy)
    together, cache = decode(ours, ids)
    assert [out is not None for out in used] == [False, True, True, True, True]
    monkeypatch.setattr(ours._shared_state, "stack", None)
    apart, expected = decode(ours, ids)
    for a, b in zip(together, apart, strict=True):
        assert torch.equal(a.logits, b.logits)
    for a, b in zip(cache.layers, expected.layers, strict=True):
        assert torch.equal(a.keys, b.keys)
        assert torch.equal(a.values, b.values)


def test_a_hook_on_a_layer_sees_its_own_result():
    ours = load_tiny("qwen3_moe")
    ids = torch.randint(ours.config.vocab_size, (1, 10), generator=torch.Generator().manual_seed(0))
    seen = []
    layers = ours.get_decoder().layers
    handles = [layer.register_forward_hook(lambda _module, _args, out: seen.append(out.clone())) for layer in layers]
    hooked, _ = decode(ours, ids)
    for handle in handles:
        handle.remove()
    free, _ = decode(ours, ids)
    assert torch.equal(hooked[-1].logits, free[-1].logits)
    assert not torch.equal(seen[-1], seen[-2])
    states = decode(ours, ids, output_hidden_states=True)[0][-1].hidden_states
    assert len({state.sum().item() for state in states}) == len(states)
