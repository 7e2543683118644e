"""What `moesaic doctor` says about computers that this one is not."""

from __future__ import annotations

import argparse
import dataclasses
import json
import subprocess
import sys
from importlib import metadata

import pytest

from moesaic.cli import doctor
from moesaic.cli.main import build_parser, main
from moesaic.engine.estimate import Estimate, Part
from moesaic.placement import hardware
from moesaic.placement.hardware import Gpu, Hardware, NumaNode

GIB = 1024**3
GOOD = Hardware(
    "Test CPU",
    64,
    128,
    None,
    64 * GIB,
    60 * GIB,
    False,
    (NumaNode(0, tuple(range(128)), 64 * GIB),),
    last_level_cache=1 << 19,
)


def arguments(*words: str) -> argparse.Namespace:
    return build_parser().parse_args(["doctor", *words])


def problems(**changes: object) -> dict[str, bool]:
    """Problem -> whether it is serious, on `GOOD` with these changes."""
    report = doctor.diagnose(dataclasses.replace(GOOD, **changes))  # type: ignore[arg-type]
    assert all(problem.advice for problem in report.problems)
    return {problem.text: problem.serious for problem in report.problems}


@pytest.fixture(autouse=True)
def quick_probe(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr(hardware, "_MIN_PROBE_BYTES", 1 << 22)
    monkeypatch.setattr(doctor, "_PROBE_SECONDS", 0.01)
    monkeypatch.delenv("MOESAIC_ISA", raising=False)
    monkeypatch.delenv("MOESAIC_THREADS", raising=False)


def test_a_good_machine_has_no_problem() -> None:
    assert problems() == {}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"cpu_quota": 0.5}, "the container may use 0.5 CPUs"),
        ({"num_cores": 0}, "share 0 physical cores"),
        ({"dram_limited": True}, "a container limit leaves 64.0 GiB"),
        ({"dram_available": 8 * GIB}, "only 8.0 of 64.0 GiB"),
        ({"numa_nodes": (NumaNode(0, (0,), GIB), NumaNode(1, (), GIB))}, "no CPU of NUMA node 1"),
        ({"gpus": (Gpu("RTX", 24 * GIB),)}, "finds no GPU, so RTX is not used"),
    ],
)
def test_each_problem_is_told_with_advice(changes: dict[str, object], words: str) -> None:
    (text,) = problems(**changes)
    assert words in text


def test_a_card_that_pytorch_uses_is_no_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    assert problems(gpus=(Gpu("RTX", 24 * GIB),)) == {}


def test_a_broken_driver_is_told() -> None:
    found = problems(gpus=(Gpu("NVIDIA GPU", 0, problem="nvidia-smi failed: x"),))
    assert "NVIDIA GPU: nvidia-smi failed: x" in found


def test_a_forced_instruction_set_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    from moesaic import _native

    active = _native.active_isa()
    try:
        monkeypatch.setenv("MOESAIC_ISA", "generic")
        expected = {"the instruction set generic is used although " + _native.isas()[0] + " is available": False}
        assert problems() == (expected if _native.isas()[0] != "generic" else problems())
        monkeypatch.setenv("MOESAIC_ISA", "avx1024")
        assert any("avx1024" in text and serious for text, serious in problems().items())
    finally:
        _native.set_isa(active)


def test_a_build_for_another_processor_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("moesaic._native.left_out_isas", lambda: ["amx", "avx512"])
    assert problems() == {"this build has no code for amx, avx512, which this processor could run": False}


def test_an_extension_that_does_not_load_is_serious(monkeypatch: pytest.MonkeyPatch) -> None:
    import moesaic

    monkeypatch.setitem(sys.modules, "moesaic._native", None)
    monkeypatch.delattr(moesaic, "_native", raising=False)
    ((text, serious),) = problems().items()
    assert "native extension cannot be loaded" in text
    assert serious


def test_old_and_missing_packages_are_serious(monkeypatch: pytest.MonkeyPatch) -> None:
    real = metadata.version

    def version(package: str) -> str:
        if package == "transformers":
            raise metadata.PackageNotFoundError(package)
        return "2.9.1+cpu" if package == "torch" else real(package)

    monkeypatch.setattr(doctor.metadata, "version", version)
    assert problems() == {
        "torch 2.9.1+cpu is older than 2.11, the oldest version supported": True,
        "transformers is not installed": True,
    }


def test_the_report_for_people(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    machine = dataclasses.replace(GOOD, gpus=(Gpu("RTX", 24 * GIB, "580.1"),), cpu_quota=32.0)
    monkeypatch.setattr(doctor, "detect_hardware", lambda with_gpus: machine)
    monkeypatch.setattr("moesaic._native.read_bandwidth", lambda num_bytes, seconds: (25.0, 20.0))
    assert doctor.run(arguments()) == 0
    printed = capsys.readouterr().out
    for words in (
        "Test CPU",
        "64 physical, 128 logical, container limit 32 CPUs",
        "60.0 GiB available",
        "RTX, 24.0 GiB",
        "20.0 GB/s median, 25.0 best of reading 0.00 GiB (8 x the last-level caches)",
    ):
        assert words in printed
    assert "\n  -> " in printed
    assert "expected decode" not in printed


def test_the_estimate_of_a_model(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    parts = (Part("layers", 40_000_000, 0.002, 20.0, 0.8), Part("head and others", 5_000_000, 0.0005, 10.0, 0.4))
    paths = ("AVX-512 VNNI, dot products of int8", "AMX, tiles of bfloat16")
    made = Estimate("qwen3-30b-a3b", "Q2_K", 4, 48, 3, "amx", 16, *paths, 45_000_000, parts, 400.0)
    asked: dict[str, object] = {}

    def estimate_decode(bandwidth: float, **options: object) -> Estimate:
        asked.update(options, bandwidth=bandwidth)
        return made

    monkeypatch.setattr("moesaic.engine.estimate.estimate_decode", estimate_decode)
    monkeypatch.setattr("moesaic._native.read_bandwidth", lambda num_bytes, seconds: (30.0, 25.0))
    monkeypatch.setattr(doctor, "detect_hardware", lambda with_gpus: GOOD)
    words = ["--synthetic", "qwen3-30b-a3b", "--format", "Q2_K", "--layers", "4"]
    assert doctor.run(arguments(*words)) == 0
    assert asked["bandwidth"] == 25.0  # the median
    assert (asked["model"], asked["preset"], asked["weight_format"]) == (None, "qwen3-30b-a3b", "Q2_K")
    assert (asked["num_layers"], asked["threads"]) == (4, None)
    lines = capsys.readouterr().out.splitlines()
    assert "qwen3-30b-a3b, Q2_K, 4 of 48 layers, 16 threads" in lines
    assert "fastest prefill        amx: AMX, tiles of bfloat16" in lines
    assert [line.split() for line in lines if line.startswith("layers ")] == [
        ["layers", "40.0", "2.000", "20.0", "80%"]
    ]
    assert [line.split() for line in lines if line.startswith("together")] == [["together", "45.0", "2.500"]]
    assert "(measured with random weights of the shapes of 3 layers)" in lines
    assert "expected decode: 400.00 tok/s at a short context" in lines

    assert doctor.run(arguments(*words, "--json")) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["estimate"]["tokens_per_second"] == 400.0
    assert report["estimate"]["parts"][0]["bandwidth_share"] == 0.8
    assert (report["read_bandwidth"], report["best_read_bandwidth"]) == (25.0, 30.0)


def test_pytorch_is_loaded_before_the_extension() -> None:
    """After it, PyTorch 2.11 for CUDA crashes while it is imported."""
    program = (
        "import sys\n"
        "order = []\n"
        "class Watch:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        order.append(name)\n"
        "sys.meta_path.insert(0, Watch())\n"
        "from moesaic.cli import doctor\n"
        "from moesaic.placement.hardware import detect_hardware\n"
        "doctor._PROBE_SECONDS = 0.01\n"
        "doctor.diagnose(detect_hardware())\n"
        "print(order.index('torch') < order.index('moesaic._native'))\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout == "True\n"


def test_nothing_is_estimated_where_nothing_could_run(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError

    monkeypatch.setattr("moesaic.engine.estimate.estimate_decode", refuse)
    monkeypatch.setattr("moesaic._native.read_bandwidth", lambda num_bytes, seconds: (30.0, 25.0))
    monkeypatch.setitem(doctor._MINIMUM_VERSIONS, "torch", (99, 0))
    monkeypatch.setattr(doctor, "detect_hardware", lambda with_gpus: GOOD)
    assert doctor.run(arguments("demo")) == 1


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["demo", "--synthetic", "qwen3-30b-a3b"], "either MODEL or --synthetic"),
        (["--synthetic", "qwen9"], "expected one of qwen3-30b-a3b"),
        (["--synthetic", "qwen3-30b-a3b", "--format", "Q9"], "is no weight format"),
    ],
)
def test_wrong_usage(
    words: list[str], message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(doctor, "detect_hardware", lambda with_gpus: GOOD)
    assert main(["doctor", *words]) in (1, 2)
    assert message in capsys.readouterr().err
