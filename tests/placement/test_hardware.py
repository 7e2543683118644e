"""Reading a computer from kernel files: fake trees with known numbers, limits of containers, and this machine."""

from __future__ import annotations

import dataclasses
import os
import stat
from pathlib import Path

import pytest

from moesaic.placement import detect_gpus, detect_hardware

GIB = 1024**3


def write(root: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine with 4 logical CPUs on 2 physical cores, 2 NUMA nodes and 64 GiB, no container."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1, 2, 3}, raising=False)
    write(
        tmp_path,
        {
            "proc/meminfo": f"MemTotal: {64 * 1024**2} kB\nMemFree: 1 kB\nMemAvailable: {48 * 1024**2} kB\n",
            "proc/cpuinfo": "processor : 0\nmodel name\t: Test CPU 9000\nprocessor : 1\nmodel name\t: Test CPU 9000\n",
            "proc/self/cgroup": "0::/\n",
            "sys/fs/cgroup/cgroup.controllers": "cpu memory\n",
            **{
                f"sys/devices/system/cpu/cpu{i}/topology/thread_siblings_list": f"{i % 2},{i % 2 + 2}" for i in range(4)
            },
            "sys/devices/system/node/node0/cpulist": "0,2\n",
            "sys/devices/system/node/node0/meminfo": f"Node 0 MemTotal:       {32 * 1024**2} kB\n",
            "sys/devices/system/node/node1/cpulist": "1,3,8-11\n",
            "sys/devices/system/node/node1/meminfo": f"Node 1 MemTotal:       {32 * 1024**2} kB\n",
        },
    )
    return tmp_path


def test_a_machine_without_a_container(machine: Path) -> None:
    hardware = detect_hardware(root=machine)
    assert hardware.cpu == "Test CPU 9000"
    assert (hardware.num_cores, hardware.num_cpus, hardware.cpu_quota) == (2, 4, None)
    assert (hardware.dram_total, hardware.dram_available, hardware.dram_limited) == (64 * GIB, 48 * GIB, False)
    assert [(n.node, n.cpus, n.dram_total) for n in hardware.numa_nodes] == [
        (0, (0, 2), 32 * GIB),
        (1, (1, 3), 32 * GIB),  # CPUs outside the affinity mask are not ours
    ]


def test_affinity_limits_the_cores(machine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 2}, raising=False)
    hardware = detect_hardware(root=machine)
    assert (hardware.num_cores, hardware.num_cpus) == (1, 2)


def test_cgroup_v2_limit_minus_what_cannot_be_dropped(machine: Path) -> None:
    write(
        machine,
        {
            "sys/fs/cgroup/memory.max": f"{16 * GIB}\n",
            "sys/fs/cgroup/memory.current": f"{10 * GIB}\n",
            "sys/fs/cgroup/memory.stat": f"anon 1\ninactive_file {4 * GIB}\n",
            "sys/fs/cgroup/cpu.max": "150000 100000\n",
        },
    )
    hardware = detect_hardware(root=machine)
    assert (hardware.dram_total, hardware.dram_available, hardware.dram_limited) == (16 * GIB, 10 * GIB, True)
    assert hardware.cpu_quota == 1.5


def test_the_tightest_limit_of_nested_groups_counts(machine: Path) -> None:
    write(
        machine,
        {
            "proc/self/cgroup": "0::/slice/job\n",
            "sys/fs/cgroup/slice/memory.max": f"{8 * GIB}",
            "sys/fs/cgroup/slice/memory.current": f"{2 * GIB}",
            "sys/fs/cgroup/slice/job/memory.max": "max",
        },
    )
    assert detect_hardware(root=machine).dram_available == 6 * GIB


def test_cgroup_v1(machine: Path) -> None:
    (machine / "sys/fs/cgroup/cgroup.controllers").unlink()
    write(
        machine,
        {
            "proc/self/cgroup": "5:memory:/docker/abc\n4:cpu,cpuacct:/docker/abc\n",
            "sys/fs/cgroup/memory/memory.limit_in_bytes": f"{4 * GIB}",
            "sys/fs/cgroup/memory/memory.usage_in_bytes": f"{1 * GIB}",
            "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "-1",
            "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000",
        },
    )
    hardware = detect_hardware(root=machine)
    assert (hardware.dram_available, hardware.cpu_quota) == (3 * GIB, None)


def test_an_unlimited_v1_group_is_no_limit(machine: Path) -> None:
    (machine / "sys/fs/cgroup/cgroup.controllers").unlink()
    write(machine, {"sys/fs/cgroup/memory/memory.limit_in_bytes": "9223372036854771712"})
    hardware = detect_hardware(root=machine)
    assert (hardware.dram_available, hardware.dram_limited) == (48 * GIB, False)


def test_a_tree_without_files_still_answers(tmp_path: Path) -> None:
    hardware = detect_hardware(root=tmp_path)
    assert hardware.dram_total > 0
    assert hardware.num_cores == hardware.num_cpus >= 1
    assert len(hardware.numa_nodes) == 1


def fake_nvidia_smi(folder: Path, monkeypatch: pytest.MonkeyPatch, script: str) -> None:
    folder.mkdir()
    tool = folder / "nvidia-smi"
    tool.write_text(f"#!/bin/sh\n{script}\n")
    tool.chmod(tool.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")


def test_nvidia_cards(machine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_nvidia_smi(
        machine / "bin", monkeypatch, "echo 'NVIDIA RTX 4090, 24564, 580.10'\necho 'NVIDIA A1, [N/A], 580.10'"
    )
    first, second = detect_hardware(with_gpus=True, root=machine).gpus
    assert (first.name, first.memory_total, first.driver) == ("NVIDIA RTX 4090", 24564 * 1024**2, "580.10")
    assert (second.name, second.memory_total) == ("NVIDIA A1", 0)


CARDS = """cat <<EOF
NVIDIA H200, 143771, 580.10, 141000, GPU-aaaa
NVIDIA L4, 23034, 580.10, 20000, GPU-bbbb
NVIDIA GB10, [N/A], 580.10, [N/A], GPU-cccc
EOF"""


def test_free_memory_of_nvidia_cards(machine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_nvidia_smi(machine / "bin", monkeypatch, CARDS)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    gpus = detect_gpus(machine)
    assert [(gpu.index, gpu.memory_total, gpu.memory_free) for gpu in gpus] == [
        (0, 143771 * 1024**2, 141000 * 1024**2),
        (1, 23034 * 1024**2, 20000 * 1024**2),
        (2, 0, 0),
    ]
    assert detect_hardware(with_gpus=True, root=machine).gpus == gpus


@pytest.mark.parametrize(
    ("visible", "names"),
    [
        ("1", ["NVIDIA L4"]),
        ("1,0", ["NVIDIA L4", "NVIDIA H200"]),
        ("GPU-cc", ["NVIDIA GB10"]),
        ("", []),
        ("-1", []),
        ("0,7,1", ["NVIDIA H200"]),  # the driver stops at what it does not know
    ],
)
def test_only_visible_cards_count(
    visible: str, names: list[str], machine: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_nvidia_smi(machine / "bin", monkeypatch, CARDS)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    gpus = detect_gpus(machine)
    assert [gpu.name for gpu in gpus] == names
    assert [gpu.index for gpu in gpus] == list(range(len(names)))


def test_a_failing_nvidia_smi_is_reported(machine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_nvidia_smi(machine / "bin", monkeypatch, "exit 9")
    (gpu,) = detect_hardware(with_gpus=True, root=machine).gpus
    assert "nvidia-smi failed" in gpu.problem


def test_an_amd_card(machine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.which", lambda _: None)
    device = "sys/class/drm/card0/device"
    write(
        machine,
        {
            f"{device}/vendor": "0x1002",
            f"{device}/mem_info_vram_total": str(24 * GIB),
            f"{device}/mem_info_vram_used": str(3 * GIB),
            f"{device}/product_name": "W7900",
        },
    )
    (gpu,) = detect_hardware(with_gpus=True, root=machine).gpus
    assert (gpu.name, gpu.memory_total, gpu.memory_free) == ("W7900", 24 * GIB, 21 * GIB)


def test_this_machine() -> None:
    hardware = detect_hardware()
    assert 0 < hardware.dram_available <= hardware.dram_total
    assert 1 <= hardware.num_cores <= hardware.num_cpus
    assert hardware.gpus == ()


def test_all_last_level_caches_count_once(machine: Path) -> None:
    for cpu in range(4):
        folder = f"sys/devices/system/cpu/cpu{cpu}/cache"
        write(
            machine,
            {
                f"{folder}/index0/level": "1\n",
                f"{folder}/index0/size": "32K\n",
                f"{folder}/index3/level": "3\n",
                f"{folder}/index3/size": "300M\n",
                f"{folder}/index3/shared_cpu_list": f"{cpu % 2},{cpu % 2 + 2}\n",
            },
        )
    hardware = detect_hardware(root=machine)
    assert hardware.last_level_cache == 600 * 1024**2
    assert hardware.cold_bytes == hardware.probe_bytes == 8 * 600 * 1024**2


def test_what_is_probed_has_bounds(machine: Path) -> None:
    hardware = detect_hardware(root=machine)
    assert hardware.last_level_cache == 32 * 1024**2  # nothing is said of caches
    assert (hardware.cold_bytes, hardware.probe_bytes) == (256 * 1024**2, 512 * 1024**2)
    small = dataclasses.replace(hardware, dram_available=GIB)
    assert small.cold_bytes == small.probe_bytes == GIB // 4
    wide = dataclasses.replace(hardware, last_level_cache=64 * GIB, dram_available=1024 * GIB)
    assert wide.cold_bytes == wide.probe_bytes == 16 * GIB
