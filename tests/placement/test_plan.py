"""Plans of tiny models of all families: every byte is accounted for, rules do what they say, sizes are refused."""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections.abc import Callable
from pathlib import Path

import pytest
from tests.placement.conftest import load_tiny
from tests.tiny_models import FAMILIES
from transformers import PreTrainedModel

from moesaic.errors import PlanDoesNotFitError, PlanError, RuleError
from moesaic.models import WeightMap
from moesaic.placement import Hardware, Plan, load_plan, make_plan
from moesaic.placement.hardware import NumaNode
from moesaic.placement.rules import parse_rules

GIB = 1024**3
Tiny = Callable[[str], tuple[PreTrainedModel, WeightMap]]

# (block size, block bytes) as published by ggml.
BLOCKS = {"F32": (1, 4), "BF16": (1, 2), "Q8_0": (32, 34), "Q4_K": (256, 144), "Q6_K": (256, 210), "Q4_0": (32, 18)}


def packed(fmt: str, rows: int, cols: int) -> int:
    """Bytes of a packed matrix: rows padded to tiles of 16, blocks as in the file."""
    block, size = BLOCKS[fmt]
    return math.ceil(rows / 16) * 16 * cols // block * size


def plan_of(tiny: Tiny, family: str, hardware: Hardware, text: str | None = None) -> Plan:
    rules = load_plan("auto") if text is None else parse_rules(text, "test.yaml")
    return make_plan(*tiny(family), rules, hardware)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_tensor_of_the_model_is_placed_once(family: str, tiny: Tiny, hardware: Hardware) -> None:
    model, _ = tiny(family)
    plan = plan_of(tiny, family, hardware)
    expected = 0
    tied = model.config.tie_word_embeddings
    for name, tensor in model.state_dict().items():
        module = model.get_submodule(name.rpartition(".")[0])
        is_packed = type(module).__name__ in {"Linear", "Embedding"} or "Router" in type(module).__name__
        if tied and name == "lm_head.weight":
            continue
        if tensor.dim() == 3 and "experts" in name:
            rows, cols = (tensor.shape[2], tensor.shape[1]) if family == "gpt_oss" else tensor.shape[1:]
            expected += tensor.shape[0] * packed("F32", rows, cols)
        elif is_packed and name.endswith(".weight"):
            expected += packed("F32", *tensor.shape)
        else:
            expected += 4 * tensor.numel()
    assert plan.nbytes == expected
    assert plan.warnings == ()


@pytest.mark.parametrize("family", FAMILIES)
def test_a_token_reads_active_experts_and_one_embedding_row(family: str, tiny: Tiny, hardware: Hardware) -> None:
    model, _ = tiny(family)
    plan = plan_of(tiny, family, hardware)
    active = {"hunyuan_v1_moe": "moe_topk", "ernie4_5_moe": "moe_k"}.get(family, "num_experts_per_tok")
    share = getattr(model.config, active) / next(
        module.down_proj.shape[0] for name, module in model.named_modules() if name.endswith(".experts")
    )
    for entry in plan.entries:
        if entry.role == "experts":
            assert entry.bytes_per_token == math.ceil(entry.nbytes * share)
        elif entry.role == "embedding":
            assert entry.bytes_per_token == 4 * model.config.hidden_size
        elif entry.role == "lm_head":
            assert entry.bytes_per_token == packed("F32", *model.lm_head.weight.shape)
        else:
            assert entry.bytes_per_token == entry.nbytes
    assert plan.bytes_per_token == sum(entry.bytes_per_token for entry in plan.entries)


def test_blocks_have_entries_of_their_own(tiny: Tiny, hardware: Hardware) -> None:
    plan = plan_of(tiny, "qwen2_moe", hardware)
    for name in ("self_attn", "mlp", "mlp.experts", "mlp.gate", "mlp.shared_expert", "self_attn.q_proj"):
        assert plan.of(f"model.layers.1.{name}").implementation == "moesaic"
    assert "model.layers.1" not in plan
    with pytest.raises(PlanError, match="no entry"):
        plan.of("model.layers.1")


def test_what_has_no_own_implementation_stays_stock(tiny: Tiny, hardware: Hardware) -> None:
    plan = plan_of(tiny, "qwen3_next", hardware)
    conv = plan.of("model.layers.0.linear_attn.conv1d")
    assert (conv.implementation, conv.formats["weight"]) == ("transformers", "F32")
    text = 'rules:\n  - match: {name: "*"}\n    implementation: moesaic\n'
    with pytest.raises(RuleError, match=r"test\.yaml:2: .*conv1d.* has no Moesaic implementation"):
        plan_of(tiny, "qwen3_next", hardware, text)


RULES = """\
rules:
  - match: {name: "model.layers.1.*"}
    implementation: transformers
  - match: {role: attention}
    format: Q8_0
  - match: {role: experts}
    format: {gate: Q4_K, up: Q4_K, down: Q6_K}
  - match: {role: shared_experts}
    format: {down: Q4_0}
  - match: {role: [lm_head, embedding]}
    format: Q8_0
"""


def test_rules_choose_implementation_and_formats(tiny: Tiny, hardware: Hardware) -> None:
    plan = plan_of(tiny, "qwen2_moe", hardware, RULES)
    layer = "model.layers.2"
    assert plan.of(f"{layer}.self_attn.q_proj").formats == {"weight": "Q8_0", "bias": "F32"}
    assert plan.of(f"{layer}.self_attn.q_proj").nbytes == packed("Q8_0", 256, 256) + 4 * 256
    experts = plan.of(f"{layer}.mlp.experts")
    assert experts.formats == {"gate": "Q4_K", "up": "Q4_K", "down": "Q6_K"}
    assert experts.nbytes == 8 * (2 * packed("Q4_K", 256, 256) + packed("Q6_K", 256, 256))
    assert plan.of(f"{layer}.mlp.shared_expert.down_proj").formats == {"weight": "Q4_0"}
    assert plan.of(f"{layer}.mlp.shared_expert.up_proj").formats == {"weight": "F32"}
    stock = plan.of("model.layers.1.mlp.experts")
    assert (stock.implementation, stock.nbytes) == ("transformers", 8 * 3 * 256 * 256 * 4)
    assert set(stock.formats.values()) == {"F32"}
    assert plan.warnings == ()


def test_a_tied_head_shares_the_embedding(tiny: Tiny, hardware: Hardware) -> None:
    head = plan_of(tiny, "granitemoe", hardware, RULES).of("lm_head")
    assert (head.formats, head.nbytes, head.bytes_per_token) == ({"weight": "Q8_0"}, 0, packed("Q8_0", 512, 256))
    text = "rules:\n  - match: {role: lm_head}\n    format: Q6_K\n"
    head = plan_of(tiny, "granitemoe", hardware, text).of("lm_head")
    assert (head.formats, head.nbytes) == ({"weight": "Q6_K"}, packed("Q6_K", 512, 256))


def test_a_format_that_does_not_fit_the_shape_is_kept_and_reported(hardware: Hardware, tmp_path: Path) -> None:
    model, weight_map = load_tiny(tmp_path, "qwen3_moe", moe_intermediate_size=96)
    text = "rules:\n  - match: {role: experts}\n    format: Q4_K\n"
    plan = make_plan(model, weight_map, parse_rules(text, "test.yaml"), hardware)
    assert plan.of("model.layers.0.mlp.experts").formats == {"gate": "Q4_K", "up": "Q4_K", "down": "F32"}
    (warning,) = plan.warnings
    assert warning.startswith("test.yaml:2: model.layers.0.mlp.experts.down and 2 more cannot be held in Q4_K")


def test_a_format_that_nobody_can_make_is_refused_with_its_line(tiny: Tiny, hardware: Hardware) -> None:
    """When the plan is made, not after half of the model was loaded."""
    rules = parse_rules("rules:\n  - match: {role: experts}\n    format: IQ1_S\n", "test.yaml")
    message = r"test\.yaml:2: 'model\.layers\.0\.mlp\.experts\.gate.*' is stored as F32, and IQ1_S can be read but not"
    with pytest.raises(RuleError, match=message):
        make_plan(*tiny("qwen3_moe"), rules, hardware)


def test_vectors_take_no_format(tiny: Tiny, hardware: Hardware) -> None:
    text = "rules:\n  - match: {role: norm}\n    format: Q4_K\n"
    assert plan_of(tiny, "qwen3_next", hardware, text).of("model.norm").formats == {"weight": "F32"}


def test_a_rule_that_places_nothing_is_reported(tiny: Tiny, hardware: Hardware) -> None:
    text = (
        'rules:\n  - match: {name: "model.layer.*"}\n    format: Q8_0\n'
        '  - match: {name: "*"}\n    format: keep\n  - match: {role: experts}\n    format: Q4_K\n'
    )
    first, second = plan_of(tiny, "mixtral", hardware, text).warnings
    assert first.startswith("test.yaml:2: ") and "model.layer.*" in first
    assert second.startswith("test.yaml:6: ") and "experts" in second


def test_the_cache_of_mla_is_its_latent(tiny: Tiny, hardware: Hardware) -> None:
    assert plan_of(tiny, "deepseek_v3", hardware).kv_bytes_per_position == 3 * (256 + 32) * 4
    stock = 'rules:\n  - match: {name: "*.self_attn"}\n    implementation: transformers\n'
    expanded = plan_of(tiny, "deepseek_v3", hardware, stock).kv_bytes_per_position
    assert expanded == 3 * 4 * ((64 + 32) + 64) * 4
    assert plan_of(tiny, "qwen3_moe", hardware).kv_bytes_per_position == 3 * 2 * 2 * 64 * 4
    assert plan_of(tiny, "qwen3_next", hardware).kv_bytes_per_position == 1 * 2 * 2 * 64 * 4  # one layer of four


def test_a_plan_that_does_not_fit_is_refused_with_the_shortfall(tiny: Tiny, hardware: Hardware) -> None:
    plan = plan_of(tiny, "mixtral", hardware)
    plan.check_fits(hardware)
    big = dataclasses.replace(plan, entries=(dataclasses.replace(plan.entries[0], nbytes=100 * GIB),))
    with pytest.raises(
        PlanDoesNotFitError, match=r"weights 100\.00 GiB.*60\.00 GiB of 64\.00 GiB.*40\.\d\d GiB too little"
    ):
        big.check_fits(hardware)
    small = dataclasses.replace(hardware, dram_total=GIB, dram_available=GIB // 4, dram_limited=True)
    with pytest.raises(PlanDoesNotFitError, match=r"the container's limit of 1\.00 GiB.*with a smaller format"):
        plan.check_fits(small)


def test_a_context_that_does_not_fit_is_told_which_one_does(tiny: Tiny, hardware: Hardware) -> None:
    plan = plan_of(tiny, "mixtral", hardware)
    with pytest.raises(PlanDoesNotFitError, match=r"Use --context \d+ or less") as refused:
        plan.check_fits(hardware, 1 << 28)
    most = int(re.findall(r"--context (\d+)", str(refused.value))[0])
    plan.check_fits(hardware, most)
    with pytest.raises(PlanDoesNotFitError):
        plan.check_fits(hardware, most + 1)
    with pytest.raises(PlanDoesNotFitError, match="cache for 100000000 tokens"):
        plan.check_fits(hardware, context=100_000_000)


def test_a_share_that_a_memory_node_has_no_room_for_is_refused(tiny: Tiny, hardware: Hardware) -> None:
    plan = plan_of(tiny, "mixtral", hardware)
    big = dataclasses.replace(plan, entries=(dataclasses.replace(plan.entries[0], nbytes=40 * GIB),))
    one, small, bare = NumaNode(0, (0,), 64 * GIB), NumaNode(1, (1,), 16 * GIB), NumaNode(2, (), GIB)
    for nodes in ((one,), (one, bare), (one, dataclasses.replace(small, dram_total=32 * GIB))):
        big.check_fits_nodes(dataclasses.replace(hardware, numa_nodes=nodes))
    with pytest.raises(PlanDoesNotFitError, match=r"NUMA node 1.*20\.00 GiB.*15\.50 GiB.*4\.50 GiB too little"):
        big.check_fits_nodes(dataclasses.replace(hardware, numa_nodes=(one, small)))


def test_a_tight_plan_is_reported(tiny: Tiny, hardware: Hardware) -> None:
    needed = plan_of(tiny, "mixtral", hardware).required_bytes()
    tight = dataclasses.replace(hardware, dram_available=needed + 1)
    (warning,) = plan_of(tiny, "mixtral", tight).warnings
    assert warning.startswith("the plan takes 100% of")


def test_json_holds_every_entry(tiny: Tiny, hardware: Hardware) -> None:
    plan = plan_of(tiny, "deepseek_v3", hardware, RULES)
    data = json.loads(plan.to_json())
    assert data["nbytes"] == plan.nbytes == sum(entry["nbytes"] for entry in data["entries"])
    assert data["bytes_per_token"] == plan.bytes_per_token
    assert data["model"] == "DeepseekV3ForCausalLM"
    by_module = {entry["module"]: entry for entry in data["entries"]}
    assert by_module["model.layers.2.mlp.experts"]["formats"] == {"gate": "Q4_K", "up": "Q4_K", "down": "Q6_K"}


def test_the_table_groups_layers(tiny: Tiny, hardware: Hardware) -> None:
    lines = plan_of(tiny, "deepseek_v3", hardware, RULES).table().splitlines()
    cells = {line.split()[0]: line.split() for line in lines if line}
    experts = cells["model.layers.[2].mlp.experts"]
    assert experts[1:3] == ["1", "experts"]
    assert "gate Q4_K, up Q4_K, down Q6_K" in next(
        line for line in lines if line.startswith("model.layers.[2].mlp.experts")
    )
    assert cells["model.layers.[0,2].self_attn.o_proj"][1] == "2"
    assert cells["model.layers.[1].self_attn.o_proj"][3] == "transformers"
    assert any(line.startswith("total: ") for line in lines)
