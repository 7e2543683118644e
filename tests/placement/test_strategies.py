"""Where modules go: templates, rules before the strategy, what one GPU can run, and what is refused."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import pytest
from tests.placement.conftest import load_tiny
from tests.tiny_models import FAMILIES
from transformers import PreTrainedModel

from moesaic.errors import PlanDoesNotFitError, PlanError, RuleError
from moesaic.models import WeightMap
from moesaic.placement import TEMPLATES, Gpu, Hardware, Plan, Rules, load_plan, make_plan, planner
from moesaic.placement.rules import parse_rules

GIB, MIB = 1024**3, 1024**2
Tiny = Callable[[str], tuple[PreTrainedModel, WeightMap]]
NOT_ROUTED = (
    'rules:\n  - match: {role: [experts, embedding]}\n    device: cpu\n  - match: {name: "*"}\n    device: gpu\n'
)


@pytest.fixture
def with_gpu(hardware: Hardware) -> Hardware:
    return dataclasses.replace(hardware, gpus=(Gpu("RTX", 24 * GIB, memory_free=23 * GIB),))


def rules_of(text: str) -> Rules:
    return load_plan(text) if text in TEMPLATES else parse_rules(text, "mine.yaml")


def devices(plan: Plan) -> dict[str, str]:
    return {entry.module: entry.device for entry in plan.entries}


def needed(tiny: Tiny, family: str, hardware: Hardware, text: str) -> int:
    """VRAM that a plan cannot do without."""
    budget = make_plan(*tiny(family), rules_of(text), hardware).vram_budget(hardware)
    assert budget is not None
    return budget.required


@pytest.mark.parametrize("family", FAMILIES)
def test_hybrid_is_all_but_routed_experts(family: str, tiny: Tiny, with_gpu: Hardware) -> None:
    plan = make_plan(*tiny(family), load_plan("hybrid"), with_gpu)
    for entry in plan.entries:
        assert entry.device == ("cpu" if entry.role in ("experts", "embedding") else "gpu"), entry
    assert devices(plan) == devices(make_plan(*tiny(family), rules_of(NOT_ROUTED), with_gpu))
    assert plan.strategy == "hybrid"


def test_gpu_is_all_but_the_embedding(tiny: Tiny, with_gpu: Hardware) -> None:
    plan = make_plan(*tiny("qwen2_moe"), load_plan("gpu"), with_gpu)
    assert {entry.module for entry in plan.entries if entry.device == "cpu"} == {"model.embed_tokens"}


@pytest.mark.parametrize("family", FAMILIES)
def test_auto_without_a_gpu_is_cpu(family: str, tiny: Tiny, hardware: Hardware) -> None:
    auto, cpu = (make_plan(*tiny(family), load_plan(name), hardware) for name in ("auto", "cpu"))
    assert auto.entries == cpu.entries
    assert (auto.strategy, cpu.strategy) == ("cpu", "cpu")
    assert auto.warnings == ()


def test_auto_takes_what_fits(tiny: Tiny, with_gpu: Hardware) -> None:
    model, weight_map = tiny("deepseek_v3")
    gpu, hybrid = (needed(tiny, "deepseek_v3", with_gpu, name) for name in ("gpu", "hybrid"))
    assert hybrid < gpu
    for vram, expected in ((gpu, "gpu"), (gpu - 1, "hybrid"), (hybrid, "hybrid"), (hybrid - 1, "cpu")):
        plan = make_plan(model, weight_map, load_plan("auto"), with_gpu, vram=vram)
        assert plan.strategy == expected
        assert devices(plan) == devices(make_plan(model, weight_map, load_plan(expected), with_gpu))
    first, second = plan.warnings
    assert first.startswith("the GPU is not used: as 'hybrid' it needs ")
    assert "--vram has no effect" in second
    # A longer context needs more of the budget.
    assert make_plan(model, weight_map, load_plan("auto"), with_gpu, vram=hybrid, context=8192).strategy == "cpu"


@pytest.mark.parametrize(
    ("family", "words"),
    [
        ("mixtral", "computed by transformers"),
        ("qwen3_next", "linear_attn.conv1d' (Conv1d) cannot be on the GPU: it is computed by transformers"),
    ],
)
def test_auto_says_which_part_keeps_it_from_the_gpu(family: str, words: str, tiny: Tiny, with_gpu: Hardware) -> None:
    part = "linear_attn.conv1d" if family == "qwen3_next" else "self_attn*"
    text = f'rules:\n  - match: {{name: "model.layers.1.{part}"}}\n    implementation: transformers\n'
    plan = make_plan(*tiny(family), rules_of(text), with_gpu)
    assert not plan.uses_gpu
    assert plan.warnings[0].startswith("the GPU is not used: ") and words in plan.warnings[0]
    with pytest.raises(PlanError, match=r"plan 'mine\.yaml'"):
        make_plan(*tiny(family), rules_of(f"strategy: gpu\n{text}"), with_gpu)


def test_auto_says_what_no_gpu_can_run(
    tiny: Tiny, with_gpu: Hardware, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dynamic = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 1.0}
    moving = load_tiny(tmp_path / "moving", "qwen3_moe", rope_parameters=dict(dynamic))
    # Hunyuan calls it dynamic too, but a fixed alpha makes the same angles for all lengths.
    fixed = load_tiny(tmp_path / "fixed", "hunyuan_v1_moe", rope_parameters=dynamic | {"alpha": 1000.0})
    assert make_plan(*fixed, load_plan("hybrid"), with_gpu).uses_gpu
    known = {name: family for name, family in planner.FAMILIES.items() if name != "dots1"}
    monkeypatch.setattr(planner, "FAMILIES", known)
    for model, words in ((moving, "angles of type 'dynamic' change"), (tiny("dots1"), "no forward of 'dots1'")):
        plan = make_plan(*model, load_plan("auto"), with_gpu)
        assert not plan.uses_gpu
        assert plan.warnings[0].startswith("the GPU is not used: ") and words in plan.warnings[0]
        with pytest.raises(PlanError, match="plan 'hybrid'"):
            make_plan(*model, load_plan("hybrid"), with_gpu)


def test_a_broken_gpu_is_told(tiny: Tiny, hardware: Hardware) -> None:
    broken = dataclasses.replace(hardware, gpus=(Gpu("RTX", 24 * GIB, problem="nvidia-smi failed: x"),))
    plan = make_plan(*tiny("mixtral"), load_plan("auto"), broken)
    assert plan.warnings == ("the GPU is not used: nvidia-smi failed: x",)
    with pytest.raises(PlanError, match="RTX cannot be used: nvidia-smi failed: x"):
        make_plan(*tiny("mixtral"), load_plan("hybrid"), broken)
    unknown = dataclasses.replace(hardware, gpus=(Gpu("GB10", 0),))
    with pytest.raises(PlanError, match=r"memory of GB10 is unknown: .*--vram 8GiB"):
        make_plan(*tiny("mixtral"), load_plan("hybrid"), unknown)


@pytest.mark.parametrize("name", ["hybrid", "layers", "gpu"])
def test_no_gpu(name: str, tiny: Tiny, hardware: Hardware) -> None:
    with pytest.raises(PlanError, match=f"plan '{name}' needs a GPU: nvidia-smi found none"):
        make_plan(*tiny("mixtral"), load_plan(name), hardware)
    elsewhere = make_plan(*tiny("mixtral"), load_plan(name), hardware, vram=2 * GIB)  # planned for another computer
    with pytest.raises(PlanError, match=f"plan '{name}' needs a GPU"):
        elsewhere.check_fits(hardware)


def test_layers_are_as_many_of_the_first_as_fit(tiny: Tiny, with_gpu: Hardware) -> None:
    model, weight_map = tiny("deepseek_v3")  # three layers, the first of them dense
    enough = needed(tiny, "deepseek_v3", with_gpu, "gpu")
    head = 512 * 256 * 4 + 256 * 4

    def on_gpu(vram: int) -> tuple[set[str], Plan]:
        plan = make_plan(model, weight_map, load_plan("layers"), with_gpu, vram=vram)
        return {module for module, device in devices(plan).items() if device == "gpu"}, plan

    everything, plan = on_gpu(enough)
    assert everything == {entry.module for entry in plan.entries if entry.role != "embedding"}
    two, plan = on_gpu(enough - 1)  # what follows the last layer goes with it
    assert {module.split(".")[2] for module in two} == {"0", "1"}
    assert two == {
        entry.module for entry in plan.entries if entry.module.startswith(("model.layers.0.", "model.layers.1."))
    }
    budget = plan.vram_budget(with_gpu)
    assert budget is not None and budget.num_experts == 0
    last = sum(
        entry.nbytes + (64 + 32) * 64 * entry.kv_bytes_per_position
        for entry in make_plan(model, weight_map, load_plan("gpu"), with_gpu).entries
        if entry.module.startswith("model.layers.2.")
    )
    assert budget.required == enough - last - head
    with pytest.raises(PlanDoesNotFitError, match=r"as 'layers': with one layer on the GPU it needs .* too little"):
        on_gpu(600 * MIB)


@pytest.mark.parametrize("family", ["qwen3_next", "qwen3_moe"])
def test_a_split_that_cannot_run_is_refused_when_it_is_planned(family: str, tiny: Tiny, with_gpu: Hardware) -> None:
    """Layers that keep a window or a recurrent state can be among the first ones only."""
    model, weight_map = tiny(family)
    rules = parse_rules('strategy: cpu\nrules:\n  - match: {name: "model.layers.0.*"}\n    device: gpu\n', "test.yaml")
    if family == "qwen3_moe":
        assert make_plan(model, weight_map, rules, with_gpu).gpu_layers == {0}
        return
    with pytest.raises(PlanError, match=r"plan 'test.yaml' puts 1 layers of .* on the GPU: .* 'hybrid' or 'cpu'"):
        make_plan(model, weight_map, rules, with_gpu)


def test_rules_come_before_the_strategy(tiny: Tiny, with_gpu: Hardware) -> None:
    text = "rules:\n  - match: {role: experts}\n    device: cpu\n  - match: {role: attention}\n    format: Q8_0\n"
    plan = make_plan(*tiny("qwen3_moe"), rules_of(text), with_gpu)
    assert plan.strategy == "gpu"
    assert plan.of("model.layers.1.mlp.experts").device == "cpu"
    assert plan.of("model.layers.1.self_attn.q_proj").formats == {"weight": "Q8_0"}
    assert devices(plan) == devices(make_plan(*tiny("qwen3_moe"), load_plan("hybrid"), with_gpu))

    text = 'strategy: hybrid\nrules:\n  - match: {name: "model.layers.0.mlp.experts"}\n    device: gpu\n'
    plan = make_plan(*tiny("qwen3_moe"), rules_of(text), with_gpu)
    assert [plan.of(f"model.layers.{layer}.mlp.experts").device for layer in range(3)] == ["gpu", "cpu", "cpu"]
    budget = plan.vram_budget(with_gpu)
    assert budget is not None and budget.num_experts == 2 * 8

    text = 'strategy: hybrid\nrules:\n  - match: {name: ["model.layers.2.*", model.norm, lm_head]}\n    device: cpu\n'
    assert make_plan(*tiny("qwen3_moe"), rules_of(text), with_gpu).gpu_layers == {0, 1}


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("strategy: hybrid\nrules:\n  - match: {role: router}\n    device: cpu", "a layer lies on one device"),
        ("strategy: cpu\nrules:\n  - match: {role: experts}\n    device: gpu", "a layer lies on one device"),
        ('strategy: hybrid\nrules:\n  - match: {name: "model.layers.0.*"}\n    device: cpu', "are the first ones"),
        ('strategy: cpu\nrules:\n  - match: {name: "model.layers.1.*"}\n    device: gpu', "are the first ones"),
        (
            "strategy: cpu\nrules:\n  - match: {role: lm_head}\n    device: gpu",
            "'model.norm' is on the CPU and 'lm_head' on the GPU",
        ),
    ],
)
def test_what_one_gpu_cannot_run(text: str, words: str, tiny: Tiny, with_gpu: Hardware) -> None:
    with pytest.raises(PlanError, match=r"^plan 'mine\.yaml': ") as caught:
        make_plan(*tiny("qwen3_moe"), rules_of(text), with_gpu)
    assert words in str(caught.value)


@pytest.mark.parametrize(
    ("text", "line", "words"),
    [
        ('rules:\n  - match: {name: "*"}\n    device: gpu', 2, "the embedding stays in DRAM"),
        (
            "strategy: gpu\nrules:\n  - match: {role: attention}\n    implementation: transformers\n    device: gpu",
            3,
            "it is computed by transformers",
        ),
    ],
)
def test_a_rule_for_what_cannot_be_on_a_gpu(text: str, line: int, words: str, tiny: Tiny, with_gpu: Hardware) -> None:
    with pytest.raises(RuleError, match=words) as caught:
        make_plan(*tiny("qwen3_moe"), rules_of(text), with_gpu)
    assert caught.value.line == line
