"""`moesaic plan` with GPUs that this computer does not have: what it prints, its JSON, and what it refuses."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from moesaic.cli.main import main
from moesaic.placement import Gpu, Hardware
from moesaic.placement.hardware import NumaNode

GIB = 1024**3
MACHINE = Hardware(
    "Test CPU",
    16,
    16,
    None,
    64 * GIB,
    60 * GIB,
    False,
    (NumaNode(0, (0,), 64 * GIB),),
    (Gpu("RTX", 24 * GIB, memory_free=23 * GIB),),
)


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """A computer with a GPU that this PyTorch can use."""
    monkeypatch.setattr("moesaic.engine.loader.detect_hardware", lambda: dataclasses.replace(MACHINE, gpus=()))
    monkeypatch.setattr("moesaic.engine.loader.detect_gpus", lambda: MACHINE.gpus)
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("moesaic.engine.bench.vram_rate", lambda: 1000.0)


@pytest.fixture(autouse=True)
def bandwidth(monkeypatch: pytest.MonkeyPatch) -> None:
    """DRAM is not really measured, which would take most of the time of these tests."""
    monkeypatch.setattr("moesaic._native.read_bandwidth", lambda num_bytes, seconds: (25.0, 20.0))


def printed(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    assert main(["plan", *words]) == 0
    return capsys.readouterr().out


def test_a_hybrid_plan(machine: None, tiny_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = printed(capsys, str(tiny_folder), "--plan", "hybrid", "--vram", "1GiB", "--context", "100")
    lines = [" ".join(line.split()) for line in out.splitlines()]
    assert "model.layers.[0-2].mlp.experts 3 experts moesaic cpu F32 18.0 MiB 6.8 MiB" in lines
    assert "model.layers.[0-2].self_attn.o_proj 3 attention moesaic gpu F32 768.0 KiB 768.0 KiB" in lines
    assert "VRAM: 1.0 GiB to use" in lines
    assert "KV cache 3.2 MiB 100 tokens, BF16" in lines  # two blocks of 64, and 32 begun
    assert "expert cache 18.0 MiB 24 experts of 768.0 KiB, 100.0% of all in DRAM" in lines
    assert "a token reads 6.8 MiB from DRAM and" in out and "0.03 ms for hand-overs" in out
    assert "with 100.0% of the chosen experts in the expert cache, as if routers chose all equally often: at" in out
    assert lines[-1].startswith("fits: with a cache for 100 tokens it takes ")


def test_auto_says_what_it_took(machine: None, tiny_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "(plan: auto, as gpu)" in printed(capsys, str(tiny_folder))
    out = printed(capsys, str(tiny_folder), "--vram", "600M")
    assert "(plan: auto, as cpu)" in out
    assert "warning: the GPU is not used: as 'hybrid' it needs " in out


def test_late_experts_are_named(machine: None, tiny_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    hybrid = (str(tiny_folder), "--plan", "hybrid", "--vram", "1GiB")
    named = "in decode 2 of 3 experts arrive one layer late; answers differ slightly from the exact model."
    assert named in printed(capsys, *hybrid, "--defer-experts", "2").splitlines()
    assert "late" not in printed(capsys, *hybrid, "--defer-experts", "0")


@pytest.mark.parametrize("command", ["plan", "run", "bench decode", "bench serve"])
def test_experts_that_cannot_be_late(
    command: str, machine: None, tiny_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [*command.split(), str(tiny_folder), *(["hi"] if command == "run" else []), "--defer-experts"]
    assert main([*words, "1", "--plan", "cpu"]) == 2
    message = "--defer-experts 1: with the plan 'cpu', as cpu, no layer on a GPU has routed experts on the CPU"
    assert message in capsys.readouterr().err
    assert main([*words, "3", "--plan", "hybrid", "--vram", "1GiB"]) == 2
    assert "a token has 3 experts, at least one of which has to be on time: expected 0 to 2" in capsys.readouterr().err


def test_the_speed_that_bandwidths_allow(machine: None, tiny_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = (str(tiny_folder), "--plan", "hybrid", "--json", "--bandwidth")
    data = json.loads(printed(capsys, *words, "dram=10GB/s,vram=1TB/s"))
    seconds = data["dram"]["bytes_per_token"] / 10e9 + data["vram"]["bytes_per_token"] / 1e12 + 3 * 10e-6
    assert data["roofline"]["tokens_per_second"] == pytest.approx(1 / seconds)  # no shared experts that overlap
    budget = data["vram_budget"]
    assert budget["total"] == 23 * GIB - 23 * GIB // 20
    assert budget["required"] + budget["staging"] + budget["cache"] <= budget["total"]
    assert (budget["context"], budget["num_blocks"], budget["num_experts"]) == (4096, 96, 24)
    cached = data["roofline_with_cache"]
    assert (cached["hit_rate"], data["roofline"]["hit_rate"]) == (1.0, 0.0)
    assert cached["tokens_per_second"] > data["roofline"]["tokens_per_second"]
    data = json.loads(printed(capsys, *words, "dram=10GB/s", "--no-measure"))
    assert data["roofline"]["vram_seconds"] is None and data["roofline_with_cache"] is None
    out = printed(capsys, str(tiny_folder), "--plan", "cpu", "--bandwidth", "dram=10GB/s")
    assert " from DRAM: at most " in out and "VRAM" not in out


def test_bandwidths_are_measured_unless_they_are_given_or_it_is_not_wanted(
    machine: None, tiny_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "for DRAM at 20.0 GB/s" in printed(capsys, str(tiny_folder), "--plan", "cpu")
    hybrid = (str(tiny_folder), "--plan", "hybrid")
    assert "for DRAM at 20.0 GB/s, " in (out := printed(capsys, *hybrid)) and "for VRAM at 1000.0 GB/s" in out
    assert "for VRAM at 2000.0 GB/s" in printed(capsys, *hybrid, "--bandwidth", "vram=2TB/s")
    assert "--measure, or --bandwidth dram=97GB/s,vram" in printed(capsys, *hybrid, "--no-measure")

    def full() -> float:
        raise RuntimeError("CUDA out of memory")

    monkeypatch.setattr("moesaic.engine.bench.vram_rate", full)
    assert "VRAM left out: its bandwidth is not known" in printed(capsys, *hybrid)


def test_a_preset_is_planned(machine: None, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "--synthetic", "deepseek-v3", "--plan", "hybrid"]) == 1
    captured = capsys.readouterr()
    assert "model.layers.[3-60].mlp.experts" in captured.out
    assert "of 64.00 GiB are available" in captured.err and "VRAM" not in captured.err


def test_a_card_that_is_not_here(
    tiny_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """What is planned for --vram of a card to come: whether the rest fits, and all that is too little if not."""
    monkeypatch.setattr("moesaic.engine.loader.detect_gpus", lambda: ())
    assert main(["plan", str(tiny_folder), "--plan", "hybrid", "--vram", "24GiB"]) == 1
    captured = capsys.readouterr()
    assert "but for the GPU it fits: with a cache for 4096 tokens it takes " in captured.out
    assert captured.err.startswith("moesaic: plan 'hybrid' needs a GPU: ")
    assert main(["plan", str(tiny_folder), "--plan", "hybrid", "--vram", "500MiB"]) == 1
    captured = capsys.readouterr()
    assert "but for the GPU" not in captured.out
    for part in ("does not fit: it needs ", "but the budget is 0.49 GiB: ", "too little", " And plan 'hybrid' needs a"):
        assert part in captured.err


@pytest.mark.parametrize("command", ["plan", "run", "bench decode"])
def test_no_gpu_is_told_before_loading(
    command: str, tiny_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("moesaic.engine.loader.detect_gpus", lambda: ())
    assert main([*command.split(), str(tiny_folder), *(["hi"] if command == "run" else []), "--plan", "hybrid"]) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "plan 'hybrid' needs a GPU: nvidia-smi found none" in captured.err


@pytest.mark.parametrize("command", ["run", "bench decode"])
def test_a_profile_that_could_not_be_saved_is_told_before_loading(
    command: str, machine: None, tiny_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("moesaic.engine.loader.build_modules", lambda *_: pytest.fail("loaded"))
    words = [*command.split(), str(tiny_folder), *(["hi"] if command == "run" else []), "--save-expert-profile"]
    for plan, message in (
        ("cpu", "the plan 'cpu' uses no GPU"),
        ("gpu", "with the plan 'gpu' no layer's busy experts are cached"),
        ("hybrid", "expected a file in a folder that exists"),
    ):
        assert main([*words, str(tiny_folder / "absent" / "x"), "--plan", plan]) == 2
        assert f"--save-expert-profile{':' if plan != 'hybrid' else ''} " in (said := capsys.readouterr().err)
        assert message in said


def test_a_gpu_that_pytorch_cannot_use(
    machine: None, tiny_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert "warning: the GPU is not used: PyTorch " in printed(capsys, str(tiny_folder))
    for vram in ([], ["--vram", "4GiB"]):
        assert main(["plan", str(tiny_folder), "--plan", "gpu", *vram]) == 1
        assert "RTX cannot be used: PyTorch " in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("demo --vram 24", "'24' has no unit: did you mean 24GiB?"),
        ("demo --vram much", "'much' is not a size"),
        ("demo --context 0", "'0' is not a whole number of at least 1"),
        ("demo --bandwidth 97GB/s", "expected dram=RATE, vram=RATE or both"),
        ("demo --bandwidth dram=97GB", "'97GB' is not a bandwidth"),
        ("demo --bandwidth dram=9GB/s,dram=9GB/s", "expected dram=RATE"),
        ("demo --defer-experts -1", "'-1' is not a whole number of at least 0"),
        ("demo --defer-experts some", "'some' is not a whole number of at least 0"),
        ("", "plan needs either MODEL or --synthetic PRESET"),
        ("demo --synthetic mixtral-8x7b", "plan needs either MODEL or --synthetic PRESET"),
    ],
)
def test_wrong_usage(words: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    try:
        code = main(["plan", *words.split()])
    except SystemExit as end:  # argparse
        code = int(end.code or 0)
    assert code == 2
    assert message in capsys.readouterr().err
