"""What this computer is: cores, NUMA nodes, DRAM that can really be used, graphics cards.

Read from the files of the Linux kernel (under a root that tests replace), because the numbers that matter in a
container are its limits and not the machine's. On other systems the file-based facts are absent and the portable
calls of Python answer. This module knows no model and measures nothing.
"""

from __future__ import annotations

import os
import platform
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from moesaic.placement.gpus import Gpu, detect_gpus

__all__ = ["Gpu", "Hardware", "NumaNode", "detect_gpus", "detect_hardware"]

_CACHES = 8  # of what is read in turn, at most an eighth can come from a cache
_FREE_SHARE = 4
_MIN_PROBE_BYTES = 512 * 1024**2
_MAX_COLD_BYTES = 16 * 1024**3  # virtual machines may say that every core has the whole host's cache
_USUAL_CACHE = 32 * 1024**2  # where the system does not say
_UNLIMITED = 1 << 60  # cgroup v1 writes a number near 2**63 for "no limit"


@dataclass(frozen=True, slots=True)
class NumaNode:
    """One memory node: its CPUs (logical, that this process may use) and its DRAM in bytes."""

    node: int
    cpus: tuple[int, ...]
    dram_total: int


@dataclass(frozen=True, slots=True)
class Hardware:
    """The part of a computer that this process may use.

    Attributes:
        cpu: the processor's name.
        num_cores: physical cores in this process's affinity mask.
        num_cpus: logical CPUs in that mask.
        cpu_quota: CPUs' worth of time that the container allows, None without a limit.
        dram_total: bytes of DRAM, or the container's limit where that is lower.
        dram_available: bytes that can be allocated now without swapping, within the container's limit.
        dram_limited: the container's limit is below the machine's DRAM.
        numa_nodes: the machine's memory nodes.
        last_level_cache: bytes of all last-level caches of these CPUs together; a processor may have several.
        gpus: graphics cards; empty when they were not asked for.
    """

    cpu: str
    num_cores: int
    num_cpus: int
    cpu_quota: float | None
    dram_total: int
    dram_available: int
    dram_limited: bool
    numa_nodes: tuple[NumaNode, ...]
    gpus: tuple[Gpu, ...] = ()
    last_level_cache: int = _USUAL_CACHE

    @property
    def cold_bytes(self) -> int:
        """Bytes that have to be read in turn so that what is read comes from DRAM: 8 times the last-level caches.

        At most a quarter of the memory that is available, and never more than 16 GiB.
        """
        return min(_CACHES * self.last_level_cache, _MAX_COLD_BYTES, self.dram_available // _FREE_SHARE)

    @property
    def probe_bytes(self) -> int:
        """Bytes to measure the read bandwidth with: as `cold_bytes`, but at least 512 MiB where a quarter is more."""
        return max(self.cold_bytes, min(_MIN_PROBE_BYTES, self.dram_available // _FREE_SHARE), 1)


def detect_hardware(*, with_gpus: bool = False, root: Path = Path("/")) -> Hardware:
    """Read what this computer is.

    Args:
        with_gpus: also look for graphics cards (starts `nvidia-smi` where it is installed).
        root: folder that holds `proc` and `sys`.
    """
    cpus = _affinity()
    machine_total, machine_available = _meminfo(root)
    limit, used = _cgroup_memory(root)
    limited = limit is not None and limit < machine_total
    total = limit if limit is not None and limited else machine_total
    available = min(machine_available, max(0, limit - used)) if limit is not None else machine_available
    return Hardware(
        cpu=_cpu_name(root),
        num_cores=_physical_cores(root, cpus),
        num_cpus=len(cpus),
        cpu_quota=_cpu_quota(root),
        dram_total=total,
        dram_available=available,
        dram_limited=limited,
        numa_nodes=_numa_nodes(root, cpus),
        gpus=detect_gpus(root) if with_gpus else (),
        last_level_cache=_last_level_cache(root, cpus),
    )


def _affinity() -> frozenset[int]:
    if hasattr(os, "sched_getaffinity"):
        return frozenset(os.sched_getaffinity(0))
    return frozenset(range(os.cpu_count() or 1))


def _read(path: Path) -> str:
    """Text of a kernel file, "" where it is absent or may not be read (both are normal in containers)."""
    try:
        return path.read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return ""


def _cpu_name(root: Path) -> str:
    found = re.search(r"^model name\s*:\s*(.+)$", _read(root / "proc/cpuinfo"), re.MULTILINE)
    return found[1].strip() if found else platform.processor() or platform.machine()


def _cpu_list(text: str) -> set[int]:
    """CPUs of a kernel list such as "0-3,8"."""
    cpus: set[int] = set()
    for part in filter(None, text.split(",")):
        first, _, last = part.partition("-")
        if first.strip().isdecimal() and (not last or last.strip().isdecimal()):
            cpus.update(range(int(first), int(last or first) + 1))
    return cpus


def _physical_cores(root: Path, cpus: Iterable[int]) -> int:
    siblings = set()
    for cpu in cpus:
        text = _read(root / f"sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list")
        siblings.add(text or str(cpu))
    return len(siblings)


def _last_level_cache(root: Path, cpus: Iterable[int]) -> int:
    level, caches = 0, dict[str, int]()  # of the highest level, by the list of the CPUs that share each
    for cpu in cpus:
        for index in (root / f"sys/devices/system/cpu/cpu{cpu}/cache").glob("index[0-9]*"):
            here = _read(index / "level")
            size = re.fullmatch(r"(\d{1,9})([KMG]?)", _read(index / "size"))
            if not here.isdecimal() or size is None or int(here) < level:
                continue
            if int(here) > level:
                level, caches = int(here), {}
            sharing = _read(index / "shared_cpu_list") or str(cpu)
            caches[sharing] = int(size[1]) << {"": 0, "K": 10, "M": 20, "G": 30}[size[2]]
    return sum(caches.values()) or _USUAL_CACHE


def _cpu_quota(root: Path) -> float | None:
    quota, _, period = _read(_cgroup(root, "cpu") / "cpu.max").partition(" ")
    if not quota:  # cgroup v1
        quota = _read(_cgroup(root, "cpu") / "cpu.cfs_quota_us")
        period = _read(_cgroup(root, "cpu") / "cpu.cfs_period_us")
    if quota.isdecimal() and period.isdecimal() and int(period) > 0:
        return int(quota) / int(period)
    return None


def _meminfo(root: Path) -> tuple[int, int]:
    """DRAM of the machine in bytes: total, and available without swapping."""
    fields: dict[str, str] = dict(re.findall(r"^(\w+):\s+(\d+) kB$", _read(root / "proc/meminfo"), re.MULTILINE))
    if "MemTotal" in fields:
        total = int(fields["MemTotal"]) * 1024
        return total, int(fields.get("MemAvailable", fields["MemTotal"])) * 1024
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return total, total


def _cgroup(root: Path, controller: str) -> Path:
    """Folder of this process's cgroup, version 2 or the v1 controller; inside a container usually the mount itself."""
    mount = root / "sys/fs/cgroup"
    if not (mount / "cgroup.controllers").is_file():
        v1 = mount / controller
        if not v1.is_dir():
            return mount
        mount = v1
    for line in _read(root / "proc/self/cgroup").splitlines():
        _, controllers, path = [*line.split(":", 2), "", ""][:3]
        if (not controllers or controller in controllers.split(",")) and (mount / path.lstrip("/")).is_dir():
            return mount / path.lstrip("/")
    return mount


def _cgroup_memory(root: Path) -> tuple[int | None, int]:
    """The tightest memory limit over this process's cgroup and its parents, and the bytes in use below it.

    Page cache counts as used in a cgroup but is given back under pressure, so inactive file pages are taken off.
    """
    folder, top = _cgroup(root, "memory"), root / "sys/fs/cgroup"
    tightest: tuple[int, int] | None = None
    while True:
        limit_text = _read(folder / "memory.max") or _read(folder / "memory.limit_in_bytes")
        if limit_text.isdecimal() and int(limit_text) < _UNLIMITED:
            usage = _read(folder / "memory.current") or _read(folder / "memory.usage_in_bytes")
            stat: dict[str, str] = dict(re.findall(r"^(\w+) (\d+)$", _read(folder / "memory.stat"), re.MULTILINE))
            droppable = int(stat.get("total_inactive_file", stat.get("inactive_file", "0")))
            candidate = (int(limit_text), max(0, int(usage or "0") - droppable))
            if tightest is None or candidate[0] - candidate[1] < tightest[0] - tightest[1]:
                tightest = candidate
        if folder == top or top not in folder.parents:
            return tightest if tightest is not None else (None, 0)
        folder = folder.parent


def _numa_nodes(root: Path, cpus: frozenset[int]) -> tuple[NumaNode, ...]:
    nodes = []
    folder = root / "sys/devices/system/node"
    for path in sorted(folder.glob("node[0-9]*"), key=lambda p: int(re.sub(r"\D", "", p.name))):
        total = re.search(r"MemTotal:\s+(\d+) kB", _read(path / "meminfo"))
        usable = tuple(sorted(_cpu_list(_read(path / "cpulist")) & cpus))
        nodes.append(NumaNode(int(re.sub(r"\D", "", path.name)), usable, int(total[1]) * 1024 if total else 0))
    if nodes:
        return tuple(nodes)
    return (NumaNode(0, tuple(sorted(cpus)), _meminfo(root)[0]),)
