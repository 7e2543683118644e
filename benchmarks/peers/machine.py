"""What the machine of a comparison is, for its result file: named by its parts, never by host or user."""

from __future__ import annotations

import datetime
import json
import os
import platform
import re
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

from moesaic.kernels import active_isa, read_bandwidth
from moesaic.kernels.probe import peak_ops
from moesaic.placement.hardware import detect_hardware

__all__ = ["cache_bytes", "describe", "package_versions"]

_FEATURES = re.compile(r"^(avx|amx|fma$|f16c$)")
_PEERS = ("kt-kernel", "llama-cpp-python", "torch", "numpy")


def cache_bytes() -> int:
    """Size of the last-level cache that one core sees; 32 MiB where the system does not say."""
    sizes = [0]
    for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        found = re.fullmatch(r"(\d+)([KMG])", path.read_text().strip())
        if found:
            sizes.append(int(found[1]) << {"K": 10, "M": 20, "G": 30}[found[2]])
    return max(sizes) or 32 << 20


def describe(threads: int, cache: int, note: str, commit: str = "") -> dict[str, Any]:
    """Processor, memory, rates measured now, versions, date; `commit` is told of a copy that has no history."""
    hardware = detect_hardware()
    commit = commit or _commit()
    bandwidth = read_bandwidth(min(4 * cache + (1 << 29), hardware.dram_available // 4), 2.0)
    return {
        "date": datetime.date.today().isoformat(),
        "cpu": hardware.cpu,
        "cores": hardware.num_cores,
        "logical_cpus": hardware.num_cpus,
        "numa_nodes": len(hardware.numa_nodes),
        "memory_gib": round(hardware.dram_total / 2**30, 1),
        "last_level_cache_mib": cache >> 20,
        "features": _features(),
        "threads": threads,
        "isa": active_isa(),
        "read_bandwidth_gb_s": {"best": round(bandwidth.best, 1), "median": round(bandwidth.median, 1)},
        "peak_dot_i8_gmac_s": round(peak_ops("dot_i8").best / 2),
        "peak_fma_f32_gmac_s": round(peak_ops("fma_f32").best / 2),
        "virtual": "hypervisor" in Path("/proc/cpuinfo").read_text(errors="replace"),
        "system": f"Linux {platform.release().split('-')[0]}, {platform.libc_ver()[0]} {platform.libc_ver()[1]}",
        "python": platform.python_version(),
        "moesaic": f"{metadata.version('moesaic')}, commit {commit}" if _installed() else f"commit {commit}",
        "load_average": os.getloadavg()[0],
        "note": note,
    }


def package_versions(python: str) -> dict[str, str]:
    """Versions of the packages that matter in another environment; empty where it cannot be asked."""
    code = (
        "import json; from importlib import metadata as m\n"
        "def v(n):\n try: return m.version(n)\n except m.PackageNotFoundError: return ''\n"
        f"print(json.dumps({{n: v(n) for n in {_PEERS!r}}}))"
    )
    try:
        done = subprocess.run([python, "-c", code], capture_output=True, text=True, timeout=60, check=True)
        return {name: version for name, version in json.loads(done.stdout).items() if version}
    except (OSError, subprocess.SubprocessError, ValueError):
        return {}


def _features() -> list[str]:
    found = re.search(r"^flags\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(errors="replace"), re.MULTILINE)
    return sorted(flag for flag in found[1].split() if _FEATURES.match(flag)) if found else []


def _installed() -> bool:
    try:
        return bool(metadata.version("moesaic"))
    except metadata.PackageNotFoundError:
        return False


def _commit() -> str:
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return "unknown"
