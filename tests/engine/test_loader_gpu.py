"""Plans with a GPU on their way through the loader: what is asked of the computer, and what is refused."""

from __future__ import annotations

import dataclasses
import importlib.util
from pathlib import Path

import pytest
from tests.engine.pairs import checkpoint_of

import moesaic
from moesaic.engine import bench, loader
from moesaic.engine.estimate import estimate_decode
from moesaic.engine.expert_profile import check_profile_target, check_profile_use
from moesaic.engine.serving.start import ServingOptions, make_engine
from moesaic.errors import ConfigError, GenerationError, PlanDoesNotFitError, PlanError
from moesaic.placement import Gpu, detect_hardware

GIB = 1024**3
RTX = Gpu("RTX", 24 * GIB, memory_free=23 * GIB)


@pytest.fixture
def with_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loader, "detect_gpus", lambda: (RTX,))
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr(loader, "build_modules", lambda *_: pytest.fail("loaded"))


def test_gpus_are_looked_for_only_where_one_could_be_used(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(loader, "detect_gpus", lambda: pytest.fail("asked for GPUs"))
    folder = str(checkpoint_of("mixtral")[1])
    assert not loader.prepare(folder, plan="cpu").plan.uses_gpu
    path = tmp_path / "mine.yaml"
    path.write_text('rules:\n  - match: {name: "*"}\n    device: cpu\n')
    assert not loader.prepare(folder, plan=path).plan.uses_gpu


def test_vram_and_context_reach_the_plan(with_gpu: None) -> None:
    folder = str(checkpoint_of("mixtral")[1])
    plan = loader.prepare(folder, plan="hybrid", vram=3 * GIB, context=640).plan
    assert (plan.vram, plan.context, plan.uses_gpu) == (3 * GIB, 640, True)
    budget = plan.vram_budget(loader.this_computer(with_gpus=True))
    assert budget is not None
    assert (budget.total, budget.num_blocks) == (3 * GIB, 10 + 32)
    assert loader.prepare(folder).plan.strategy == "gpu"
    made, _ = bench.prepare_subject(None, "mixtral-8x7b", "Q4_K", 2, None, "hybrid", True, vram=9 * GIB, context=64)
    assert (made.plan.vram, made.plan.context) == (9 * GIB, 64)


def test_what_does_not_fit_is_refused_before_loading(with_gpu: None) -> None:
    folder = str(checkpoint_of("mixtral")[1])
    with pytest.raises(PlanDoesNotFitError, match=r"but the budget is 0\.00 GiB"):
        moesaic.AutoModelForCausalLM.from_pretrained(folder, plan="hybrid", vram=1000, progress=False)
    with pytest.raises(PlanDoesNotFitError, match=r"--vram is 30\.00 GiB, but 23\.00 GiB of RTX's"):
        moesaic.AutoModelForCausalLM.from_pretrained(folder, plan="hybrid", vram="30GiB", progress=False)


def test_a_gpu_without_triton_is_not_used(with_gpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "triton" else found(name))
    folder = str(checkpoint_of("mixtral")[1])
    plan = loader.prepare(folder).plan
    assert not plan.uses_gpu
    assert any("pip install triton" in warning for warning in plan.warnings)
    with pytest.raises(PlanError, match="RTX cannot be used: Triton"):
        loader.prepare(folder, plan="hybrid")


def test_what_a_plan_warns_of_is_said_when_it_is_carried_out(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Nobody who gave --vram should have to find out from the speed that there is no GPU."""
    monkeypatch.setattr(loader, "detect_gpus", lambda: ())
    folder = str(checkpoint_of("mixtral")[1])
    with caplog.at_level("WARNING"):
        moesaic.AutoModelForCausalLM.from_pretrained(folder, vram="24GiB", progress=False)
        assert [record.getMessage() for record in caplog.records] == [
            "plan 'auto': --vram has no effect: no GPU was found."
        ]
        caplog.clear()
        moesaic.AutoModelForCausalLM.from_pretrained(folder, plan="cpu", progress=False)
        assert not caplog.records
    (warning,) = loader.prepare(folder, plan="cpu", vram=GIB).plan.warnings
    assert warning == "--vram has no effect: nothing is placed on a GPU."


def test_a_profile_of_experts_needs_a_cache_of_experts(with_gpu: None, tmp_path: Path) -> None:
    folder = str(checkpoint_of("mixtral")[1])
    check_profile_use(loader.prepare(folder, plan="hybrid").plan, "profile")
    for plan, taken in (("gpu", "'gpu'"), ("layers", "'layers'"), ("auto", "'auto', as gpu")):
        with pytest.raises(ConfigError, match=f"profile: with the plan {taken} no layer's busy experts are cached"):
            check_profile_use(loader.prepare(folder, plan=plan).plan, "profile")
    check_profile_target(tmp_path / "x", "profile")
    for path in (tmp_path, tmp_path / "absent" / "x"):
        with pytest.raises(ConfigError, match="expected a file in a folder that exists"):
            check_profile_target(path, "profile")


def test_a_size_of_the_cache_in_dram_is_refused_on_a_gpu(with_gpu: None) -> None:
    with pytest.raises(ConfigError, match=r"kv cache: .* this one is on the GPU"):
        make_engine("demo", ServingOptions(plan="hybrid", kv_cache=GIB), progress=False)


@pytest.mark.parametrize("vram", ["much", "24", 0, -1])
def test_wrong_sizes(vram: str | int) -> None:
    with pytest.raises(ConfigError, match=r"^vram"):
        moesaic.AutoModelForCausalLM.from_pretrained("demo", vram=vram)


def test_a_gpu_that_pytorch_cannot_use_has_a_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loader, "detect_gpus", lambda: (RTX,))
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    (gpu,) = loader.this_computer(with_gpus=True).gpus
    assert "PyTorch" in gpu.problem and dataclasses.replace(gpu, problem="") == RTX
    assert loader.this_computer(with_gpus=False).gpus == detect_hardware().gpus == ()


def test_a_bench_takes_no_more_sequences_than_a_step(with_gpu: None) -> None:
    for family, most in (("mixtral", 32), ("qwen3_next", 8)):
        subject = {"model": str(checkpoint_of(family)[1]), "plan": "hybrid"}
        with pytest.raises(ConfigError, match=f"--batch {most + 1}: a decode step of this model has at most {most} "):
            bench.measure("decode", batch=most + 1, num_tokens=2, prompt_tokens=1, **subject)


def test_a_bench_needs_its_context() -> None:
    with pytest.raises(GenerationError, match="the bench needs 49 positions, but --context is 48"):
        bench.measure("decode", preset="mixtral-8x7b", num_tokens=32, prompt_tokens=16, context=48)


@pytest.mark.parametrize("plan", ["hybrid", "layers", "gpu"])
def test_estimates_are_of_the_cpu(plan: str) -> None:
    with pytest.raises(PlanError, match=f"plan '{plan}' uses a GPU, but decode speed is estimated for the CPU alone"):
        estimate_decode(10.0, preset="mixtral-8x7b", plan=plan)
