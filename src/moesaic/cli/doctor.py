"""`moesaic doctor`: what this computer can do, and what stands in the way, with advice.

Every fact is read or measured here and now. A broken installation is what people run this for, so each import may fail
and becomes a problem of the report. With a model it also says how fast that would decode.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
from dataclasses import asdict, dataclass, field
from importlib import metadata
from types import ModuleType
from typing import TYPE_CHECKING

from moesaic.cli.options import add_any_model_arguments, list_presets, plan_of
from moesaic.config import read_settings
from moesaic.errors import ConfigError
from moesaic.placement.hardware import Hardware, detect_hardware

if TYPE_CHECKING:
    from moesaic.engine.estimate import Estimate

__all__ = ["DESCRIPTION", "HELP", "Report", "add_arguments", "diagnose", "run"]

HELP = "show what this computer can do and what is wrong"
DESCRIPTION = (
    "Print processor features and the instruction set chosen, cores, NUMA nodes, DRAM and its read bandwidth (median "
    "and best of repeated reads of 8 times the caches; the median is what decode is compared with), GPUs, versions, "
    "and every problem found with advice. With MODEL or --synthetic also the fastest path and the decode speed to "
    "expect, measured with random weights of the shapes of a few layers; no weight is loaded. Exit code 1 if something "
    "must be mended."
)

_MINIMUM_VERSIONS = {"torch": (2, 11), "transformers": (5, 17)}
_OTHER_PACKAGES = ("moesaic", "numpy", "gguf", "safetensors", "tokenizers", "huggingface_hub")
_PROBE_SECONDS = 1.0
_GIB = 1024**3


@dataclass(frozen=True, slots=True)
class Problem:
    """Something wrong; `serious` keeps models from running, the rest makes them slow or small."""

    text: str
    advice: str
    serious: bool = False


@dataclass(slots=True)
class Report:
    """What was found; sizes in bytes, bandwidth in GB/s (None if it could not be measured).

    `read_bandwidth` is the median of the repetitions, `probe_bytes` what each of them read; `estimate` is there if a
    model was named and nothing serious stands in the way.
    """

    hardware: Hardware
    versions: dict[str, str | None]
    isas: list[str] = field(default_factory=list)
    active_isa: str | None = None
    cpu_features: dict[str, bool] = field(default_factory=dict)
    num_threads: int | None = None
    read_bandwidth: float | None = None
    best_read_bandwidth: float | None = None
    probe_bytes: int | None = None
    problems: list[Problem] = field(default_factory=list)
    estimate: Estimate | None = None


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `moesaic doctor`."""
    add_any_model_arguments(parser)
    parser.add_argument("--json", action="store_true", help="print the report as JSON")


def run(arguments: argparse.Namespace) -> int:
    """Print the report; 1 if there is a serious problem."""
    if arguments.model is not None and arguments.synthetic is not None:
        raise ConfigError("doctor takes either MODEL or --synthetic PRESET.")
    if arguments.synthetic == "list":
        print(list_presets())
        return 0
    report = diagnose(detect_hardware(with_gpus=True), arguments.threads)
    _examine_model(report, arguments)
    print(json.dumps(asdict(report), indent=2) if arguments.json else _render(report))
    return int(any(problem.serious for problem in report.problems))


def diagnose(hardware: Hardware, threads: int | None = None) -> Report:
    """Examine the installation and the computer; `threads` instead of the number that the settings ask for."""
    report = Report(hardware, _versions())
    _examine_versions(report)
    _examine_native(report, threads)
    _examine_cpu(report)
    _examine_memory(report)
    _examine_gpus(report)
    return report


def _versions() -> dict[str, str | None]:
    versions: dict[str, str | None] = {"python": platform.python_version()}
    for package in (*_OTHER_PACKAGES, *_MINIMUM_VERSIONS):
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = None
    return versions


def _examine_versions(report: Report) -> None:
    for package, minimum in _MINIMUM_VERSIONS.items():
        version, wanted = report.versions[package], ".".join(map(str, minimum))
        if version is None:
            advice = f"pip install '{package}>={wanted}'"
            report.problems.append(Problem(f"{package} is not installed", advice, serious=True))
        elif tuple(int(part) for part in version.split(".")[:2] if part.isdecimal()) < minimum:
            text = f"{package} {version} is older than {wanted}, the oldest version supported"
            report.problems.append(Problem(text, f"pip install -U '{package}>={wanted}'", serious=True))


def _examine_native(report: Report, threads: int | None) -> None:
    _torch()  # before the extension, as everywhere else: after it, some builds of PyTorch crash while they are imported
    try:
        from moesaic import _native
    except ImportError as error:
        advice = "reinstall moesaic for this Python version (pip install --force-reinstall moesaic)"
        report.problems.append(Problem(f"the native extension cannot be loaded: {error}", advice, serious=True))
        return
    settings = read_settings()
    report.isas, report.cpu_features = _native.isas(), _native.cpu_features()
    if settings.isa is not None:
        try:
            _native.set_isa(settings.isa)
        except ValueError as error:
            advice = f"set MOESAIC_ISA to one of {', '.join(report.isas)}, or unset it"
            report.problems.append(Problem(f"MOESAIC_ISA={settings.isa}: {error}", advice, serious=True))
    if left_out := _native.left_out_isas():
        text = f"this build has no code for {', '.join(left_out)}, which this processor could run"
        report.problems.append(Problem(text, "build it on this machine (pip install ., or make dev in a new clone)"))
    threads = settings.threads if threads is None else threads
    if threads is not None:
        _native.set_num_threads(threads)
    report.active_isa, report.num_threads = _native.active_isa(), _native.num_threads()
    report.probe_bytes = report.hardware.probe_bytes
    best, median = _native.read_bandwidth(report.probe_bytes, _PROBE_SECONDS)
    report.best_read_bandwidth, report.read_bandwidth = float(best), float(median)


def _examine_cpu(report: Report) -> None:
    hardware = report.hardware
    if report.active_isa is not None and report.active_isa != report.isas[0]:
        text = f"the instruction set {report.active_isa} is used although {report.isas[0]} is available"
        report.problems.append(Problem(text, "unset MOESAIC_ISA unless you want this"))
    if report.active_isa == "generic" and report.isas[0] == "generic":
        text = "this processor has neither AVX2 nor AVX-512: portable code is used, which is several times slower"
        report.problems.append(Problem(text, "in a virtual machine, let it see the host's processor (cpu: host)"))
    threads = report.num_threads or hardware.num_cores
    if hardware.cpu_quota is not None and hardware.cpu_quota < threads:
        text = f"the container may use {hardware.cpu_quota:g} CPUs, but {threads} threads would run"
        advice = f"raise the container's CPU limit, or use --threads {max(1, int(hardware.cpu_quota))}"
        report.problems.append(Problem(text, advice))
    if threads > hardware.num_cores:
        text = f"{threads} threads share {hardware.num_cores} physical cores: decode gets slower, not faster"
        report.problems.append(Problem(text, f"use --threads {hardware.num_cores}, or unset MOESAIC_THREADS"))


def _examine_memory(report: Report) -> None:
    hardware = report.hardware
    if hardware.dram_limited:
        text = f"a container limit leaves {hardware.dram_total / _GIB:.1f} GiB of the machine's DRAM"
        report.problems.append(Problem(text, "raise the memory limit of the container for larger models"))
    if hardware.dram_available < hardware.dram_total // 2:
        text = (
            f"only {hardware.dram_available / _GIB:.1f} of {hardware.dram_total / _GIB:.1f} GiB of DRAM are available"
        )
        report.problems.append(Problem(text, "close other programs before running a large model"))
    unused = [node for node in hardware.numa_nodes if not node.cpus]
    if unused:
        numbers = ", ".join(str(node.node) for node in unused)
        text = f"this process may use no CPU of NUMA node {numbers}: experts are divided over the other nodes only"
        report.problems.append(Problem(text, "let it use the CPUs of all nodes (taskset, the container's cpuset)"))


def _examine_gpus(report: Report) -> None:
    for gpu in report.hardware.gpus:
        if gpu.problem:
            report.problems.append(
                Problem(f"{gpu.name}: {gpu.problem}", "mend the driver if you want to use this card")
            )
    usable = [gpu for gpu in report.hardware.gpus if not gpu.problem]
    if usable and report.versions["torch"] is not None and not _torch_finds_a_gpu():
        text = f"PyTorch {report.versions['torch']} finds no GPU, so {usable[0].name} is not used"
        report.problems.append(Problem(text, "install a build of PyTorch for CUDA or ROCm (pytorch.org)"))


def _torch_finds_a_gpu() -> bool:
    torch = _torch()
    try:
        return torch is not None and torch.cuda.is_available()
    except (OSError, RuntimeError):  # a broken installation is what doctor is for
        return False


def _torch() -> ModuleType | None:
    """PyTorch; None if it cannot be imported."""
    try:
        import torch
    except (ImportError, OSError, RuntimeError):
        return None
    return torch


def _examine_model(report: Report, arguments: argparse.Namespace) -> None:
    """Estimate the decode speed of the model that the arguments name, unless none could run."""
    named = arguments.model is not None or arguments.synthetic is not None
    if not named or report.read_bandwidth is None or any(problem.serious for problem in report.problems):
        return
    from moesaic.engine.estimate import estimate_decode

    report.estimate = estimate_decode(
        report.read_bandwidth,
        model=arguments.model,
        preset=arguments.synthetic,
        weight_format=arguments.format,
        num_layers=arguments.layers,
        threads=arguments.threads,
        gguf=arguments.gguf,
        plan=plan_of(arguments),
        offline=arguments.offline,
        progress=sys.stderr.isatty(),
    )


def _render_bandwidth(report: Report) -> str:
    if report.read_bandwidth is None or report.probe_bytes is None:
        return "not measured"
    caches = report.probe_bytes / report.hardware.last_level_cache
    return (
        f"{report.read_bandwidth:.1f} GB/s median, {report.best_read_bandwidth:.1f} best of reading "
        f"{report.probe_bytes / _GIB:.2f} GiB ({caches:.0f} x the last-level caches); decode is measured by the median"
    )


def _render_estimate(estimate: Estimate) -> list[str]:
    lines = [
        f"{estimate.model}, {estimate.weight_format}, {estimate.num_layers} of {estimate.total_layers} layers, "
        f"{estimate.threads} threads",
        f"{'fastest decode':<22} {estimate.isa}: {estimate.decode_path}",
        f"{'fastest prefill':<22} {estimate.isa}: {estimate.prefill_path}",
        "",
        f"{'part of a token':<22} {'MB read':>9} {'ms':>9} {'GB/s':>7} {'of the bandwidth':>17}",
    ]
    for part in estimate.parts:
        read = f"{part.bytes_per_token / 1e6:9.1f} {part.seconds * 1e3:9.3f}"
        lines.append(f"{part.name:<22} {read} {part.gigabytes_per_second:7.1f} {part.bandwidth_share:17.0%}")
    total = sum(part.seconds for part in estimate.parts)
    lines.append(f"{'together':<22} {estimate.bytes_per_token / 1e6:9.1f} {total * 1e3:9.3f}")
    lines.append(f"expected decode: {estimate.tokens_per_second:.2f} tok/s at a short context")
    return [*lines, f"(measured with random weights of the shapes of {_layers(estimate.sampled_layers)})", ""]


def _layers(count: int) -> str:
    return "1 layer" if count == 1 else f"{count} layers"


def _render(report: Report) -> str:
    hardware = report.hardware
    features = " ".join(name for name, present in report.cpu_features.items() if present) or "unknown"
    quota = "" if hardware.cpu_quota is None else f", container limit {hardware.cpu_quota:g} CPUs"
    nodes = [
        f"node {node.node}: {len(node.cpus)} CPUs, {node.dram_total / _GIB:.1f} GiB" for node in hardware.numa_nodes
    ]
    gpus = [f"{gpu.name}, {gpu.memory_total / _GIB:.1f} GiB {gpu.driver}".rstrip() for gpu in hardware.gpus]
    versions = ", ".join(f"{name} {version or 'missing'}" for name, version in report.versions.items())
    facts = [
        ("processor", hardware.cpu),
        ("features", features),
        ("instruction set", f"{report.active_isa or 'none'} (usable: {', '.join(report.isas) or 'none'})"),
        ("cores", f"{hardware.num_cores} physical, {hardware.num_cpus} logical{quota}"),
        ("threads", str(report.num_threads or "unknown")),
        ("NUMA", "; ".join(nodes)),
        ("DRAM", f"{hardware.dram_total / _GIB:.1f} GiB, {hardware.dram_available / _GIB:.1f} GiB available"),
        ("read bandwidth", _render_bandwidth(report)),
        ("GPUs", "; ".join(gpus) or "none"),
        ("versions", versions),
    ]
    lines = [f"{name:<16} {value}" for name, value in facts]
    lines.append("")
    if report.estimate is not None:
        lines += _render_estimate(report.estimate)
    for problem in report.problems:
        lines += [f"{'PROBLEM' if problem.serious else 'note'}: {problem.text}", f"  -> {problem.advice}"]
    return "\n".join(lines if report.problems else [*lines, "no problems found"])
