"""What a bench says of a model on a GPU beside its rate: in Triton's interpreter where there is none."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from tests.engine.test_gpu import ON_GPU, checkpoint_of, eager_cache, on_gpu

from moesaic.cli.bench import _gpu_lines
from moesaic.engine.bench import _warm_up
from moesaic.engine.gpu.bench import gpu_figures
from moesaic.engine.gpu.timed_runs import GpuTimedRuns
from moesaic.engine.gpu.warm_up import WarmUp, warm_up
from moesaic.engine.loader import prepare
from moesaic.placement import Plan

FEW = 4
"""Tokens of a run: three steps."""


def plan_of_experts_in_dram() -> Plan:
    """As `on_gpu` loads it, whatever the template `auto` makes of the machine."""
    return prepare(str(checkpoint_of("qwen3_moe")[1]), plan="cpu").plan


def test_a_decode_step_is_taken_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    """Hits by layer add up to those of all; bytes found in the cache are the GPU's, and the limit follows from both."""
    if not ON_GPU:
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Card")
        monkeypatch.setattr(torch.cuda, "max_memory_reserved", lambda device: 3 << 29)
    ours, plan = on_gpu("qwen3_moe", ON_GPU, slots=eager_cache), plan_of_experts_in_dram()
    runner = ours.runner
    bench = GpuTimedRuns(runner, "decode", prompt_tokens=2, new_tokens=FEW)
    policy = runner.slots.cache.policy
    before = WarmUp(12, 3.45, ("upload shares", "expert cache"))
    figures = gpu_figures(runner, plan, bench, 10.0, 100.0, runs=(40.0, 60.0, 50.0), warm_up=before)
    assert policy.uses.tolist() == [(FEW - 1) * runner.decoder.top_k] * 2
    assert figures.layer_hit_rates == tuple(policy.hits / policy.uses)
    assert figures.hit_rate == pytest.approx(sum(figures.layer_hit_rates) / 2)
    experts = sum(entry.bytes_per_token for entry in plan.entries if entry.role == "experts")
    assert figures.dram_bytes == round(plan.bytes_per_token_on("cpu") - figures.hit_rate * experts)
    assert figures.vram_bytes == round(figures.hit_rate * experts)
    limit = max(figures.dram_bytes / 10e9, figures.vram_bytes / 100e9) + 2 * 10e-6
    assert figures.roofline_seconds == pytest.approx(limit)
    assert figures.step_seconds is not None
    assert figures.roofline_share == pytest.approx(limit / figures.step_seconds)
    assert figures.runs_roofline_share == pytest.approx(limit * 50.0)  # tok/s of the median run
    low, high = min(figures.layer_hit_rates), max(figures.layer_hit_rates)
    lines = _gpu_lines(figures)
    assert f"expert cache: 5 experts, {figures.hit_rate:.1%} hits ({low:.1%} to {high:.1%} by layer)" in lines
    assert any(line.startswith("a step: ") for line in lines)
    both = f"the runs reach {limit * 50.0:.0%} and the median step {figures.roofline_share:.0%}"
    assert any(line.startswith("limit: ") and line.endswith(both) for line in lines)
    assert (
        "warm-up: 12 steps in 3.5 s, before the runs, which do not count them; not settled by then: upload shares, "
        "expert cache" in lines
    )


def test_steps_of_a_warm_up_are_those_of_runs() -> None:
    """The first run is whole; the limit of steps ends the third in its midst; all were steps of the runner."""
    ours = on_gpu("qwen3_moe", ON_GPU, slots=eager_cache)
    policy = ours.runner.slots.cache.policy
    done = warm_up(GpuTimedRuns(ours.runner, "decode", prompt_tokens=2, new_tokens=FEW), most_steps=FEW)
    assert done.steps == (FEW - 1) + FEW and done.unsettled == ("expert cache",) and done.seconds > 0
    assert policy.uses.tolist() == [done.steps * ours.runner.decoder.top_k] * 2
    assert ours.runner.pool.num_free == ours.runner.pool.num_blocks


def test_a_bench_says_how_decode_warmed_up_and_that_prompts_do_not(monkeypatch: pytest.MonkeyPatch) -> None:
    runner = on_gpu("qwen3_moe", ON_GPU).runner
    decode, prefill = (GpuTimedRuns(runner, what, 2, FEW) for what in ("decode", "prefill"))
    assert _warm_up(decode) == WarmUp(FEW - 1, pytest.approx(30.0, abs=30.0))
    monkeypatch.setattr(GpuTimedRuns, "run", lambda self: runs.append(self))
    runs: list[GpuTimedRuns] = []
    assert _warm_up(prefill) is None and runs == [prefill]


def test_without_a_cache_there_are_no_hits(monkeypatch: pytest.MonkeyPatch) -> None:
    if not ON_GPU:
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Card")
        monkeypatch.setattr(torch.cuda, "max_memory_reserved", lambda device: 3 << 29)
    ours, plan = on_gpu("qwen3_moe"), plan_of_experts_in_dram()
    bench = GpuTimedRuns(ours.runner, "prefill", prompt_tokens=2, new_tokens=1)
    figures = gpu_figures(ours.runner, plan, bench, read_bandwidth=10.0, vram_bandwidth=100.0)
    assert (figures.hit_rate, figures.layer_hit_rates, figures.roofline_share) == (0.0, (), None)
    assert figures.runs_roofline_share is None
    assert not any("cache" in line or "limit" in line or "warm-up" in line for line in _gpu_lines(figures))
