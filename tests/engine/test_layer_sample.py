"""A few layers for all: which are chosen, that they are what the whole model's plan says, and that they run."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tests.engine.test_plan_bytes import packed_tensors
from tests.tiny_models import ALL_FAMILIES, save_tiny

from moesaic.engine.layer_sample import LayerCost, choose_layers, layer_costs, take_layers
from moesaic.engine.loader import load, prepare
from moesaic.engine.subjects import prepare_synthetic
from moesaic.engine.timed_runs import TimedRuns
from moesaic.placement.rules import parse_rules
from moesaic.quant import get_format

MIXED = parse_rules(
    "rules:\n  - match: {name: 'model.layers.[01].*', role: [experts, attention]}\n    format: Q8_0\n"
    "  - match: {role: experts}\n    format: Q4_K\n",
    "mixed.yaml",
)


def costs(*kinds: str, nbytes: int = 100, per_token: int = 10) -> list[LayerCost]:
    return [LayerCost(kind, nbytes, per_token) for kind in kinds]


def test_kinds_have_their_share() -> None:
    layers = costs(*"AAABBBBBBBBB")  # 3 and 9
    assert choose_layers(layers, 40, 10_000) == [0, 3, 6, 9]
    assert choose_layers(layers, 10, 10_000) == [3]
    assert choose_layers(layers, 75, 10_000) == [0, 1, 3, 4, 6, 7, 9, 10]
    assert choose_layers(layers, 1000, 10_000) == list(range(12))


def test_what_reads_more_counts_more() -> None:
    layers = [*costs("A", "A", per_token=100), *costs("B", "B", "B", "B", per_token=10)]
    assert choose_layers(layers, 110, 10_000) == [0, 1]
    assert choose_layers(layers, 205, 10_000) == [0, 1, 2]


def test_memory_limits_all_but_the_first_layer() -> None:
    assert choose_layers(costs(*"AAAA"), 40, 250) == [0, 2]
    assert choose_layers(costs(*"AAAA"), 40, 50) == [0]


def test_one_layer_has_a_cache() -> None:
    layers = [LayerCost("linear", 100, 10, has_cache=False)] * 3 + costs("full")
    assert choose_layers(layers, 10, 10_000) == [3]
    assert choose_layers(layers, 30, 10_000) == [0, 1, 3]
    assert choose_layers(layers[:2], 10, 10_000) == [0]


@pytest.mark.parametrize("family", ALL_FAMILIES)
def test_chosen_layers_of_a_checkpoint_are_held_as_planned_and_run(family: str, tmp_path: Path) -> None:
    save_tiny(tmp_path, family, num_hidden_layers=4)
    whole = prepare(str(tmp_path), plan=MIXED)
    whole.checkpoint.close()
    found = layer_costs(whole)
    assert len(found) == 4
    sample = take_layers(whole, [1, 3])
    for old, new in ((1, 0), (3, 1)):
        of_layer = [entry for entry in whole.plan.entries if entry.module.startswith(f"model.layers.{old}.")]
        assert sum(entry.nbytes for entry in of_layer) == found[old].nbytes
        for entry in of_layer:
            renamed = entry.module.replace(f"layers.{old}.", f"layers.{new}.")
            assert sample.plan.of(renamed).formats == entry.formats
    outside = whole.plan.nbytes - sum(cost.nbytes for cost in found)
    assert sample.plan.nbytes == outside + found[1].nbytes + found[3].nbytes

    others = packed_tensors()
    model = load(sample, progress=False)
    packed = sum(size for address, size in packed_tensors().items() if address not in others)
    floats = {t.data_ptr(): t.nbytes for t in [*model.parameters(), *model.buffers()]}
    assert packed + sum(floats.values()) == pytest.approx(sample.plan.nbytes, rel=0.02)
    assert len(model.get_decoder().layers) == 2
    with torch.no_grad():
        assert torch.isfinite(model(torch.tensor([[3, 4, 5]])).logits).all()
    assert TimedRuns(model, "decode", 3, 4).run() > 0


def test_layers_that_differ_are_of_different_kinds(tmp_path: Path) -> None:
    save_tiny(tmp_path / "formats", "qwen3_moe", num_hidden_layers=4)
    mixed = prepare(str(tmp_path / "formats"), plan=MIXED)
    mixed.checkpoint.close()
    kinds = [cost.kind for cost in layer_costs(mixed)]
    assert kinds[0] == kinds[1] != kinds[2] == kinds[3]
    whole = prepare_synthetic("deepseek-v3", get_format("Q4_K"), None, "cpu")
    kinds = [cost.kind for cost in layer_costs(whole)]
    assert len(set(kinds)) == 2
    assert kinds[2] != kinds[3] == kinds[60]


def test_the_whole_model_stays_as_it_was() -> None:
    whole = prepare("demo", plan="cpu", offline=True)
    before = {name: tuple(tensor.shape) for name, tensor in whole.model.state_dict().items()}
    take_layers(whole, [0, 3])
    assert {name: tuple(tensor.shape) for name, tensor in whole.model.state_dict().items()} == before
    assert whole.config.num_hidden_layers == 6
    assert [layer.self_attn.layer_idx for layer in whole.model.get_decoder().layers] == list(range(6))
    whole.checkpoint.close()


def test_halves_of_latent_attention_and_ternary_digits() -> None:
    whole = prepare("demo", plan="cpu", offline=True)
    whole.checkpoint.close()
    sample = take_layers(whole, [0, 2, 5])
    assert sample.weight_map.mla("model.layers.2.self_attn") is not None
    assert TimedRuns(load(sample, progress=False), "decode", 3, 4).run() > 0

    rules = parse_rules("ternary: always\nrules:\n  - match: {role: experts}\n    format: keep\n", "ternary.yaml")
    digits = prepare_synthetic("mixtral-8x7b", get_format("IQ1_S"), 2, rules)
    sample = take_layers(digits, [1])
    assert sample.plan.of("model.layers.0.mlp.experts").formats["up"] == "IQ1_S_TERNARY"
    assert sample.weight_map.experts("model.layers.0.mlp.experts").up[0].format.name == "IQ1_S"
