"""Instruction sets, threads, and what the objects of the build export."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tests.kernels.oracle import packed, tokens

from moesaic import kernels
from moesaic.config import Settings
from moesaic.errors import ConfigError
from moesaic.kernels.native import apply_settings

ROOT = Path(__file__).parents[2]


def test_the_best_instruction_set_comes_first_and_generic_last():
    assert kernels.isas()[-1] == "generic"
    assert kernels.active_isa() in kernels.isas()


def test_settings_that_cannot_be_used_are_refused():
    for settings in (Settings(isa="z80"), Settings(threads=1025)):
        with pytest.raises(ConfigError):
            apply_settings(settings)


def test_environment_forces_instruction_set_threads_and_nodes():
    code = "from moesaic import kernels; print(kernels.active_isa(), kernels.num_threads(), kernels.num_nodes())"
    environment = os.environ | {"MOESAIC_ISA": "generic", "MOESAIC_THREADS": "3", "MOESAIC_NUMA_NODES": "2"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["generic", "3", "2"]


@pytest.mark.parametrize("pin", ["0", "1"])
def test_environment_leaves_threads_to_the_scheduler(pin):
    """Each worker of a default pool is confined to its core; the caller's thread and those of others are not."""
    code = """if True:
        import os
        from moesaic import _native, kernels
        _native.read_bandwidth(1 << 20, 0.01)  # starts the pool
        everywhere = os.sched_getaffinity(0)
        masks = [os.sched_getaffinity(int(task)) for task in os.listdir("/proc/self/task")]
        print(sum(mask != everywhere for mask in masks), kernels.num_threads() - 1)
    """
    environment = os.environ | {"MOESAIC_PIN": pin}
    environment.pop("MOESAIC_THREADS", None)
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    confined, workers = map(int, done.stdout.split())
    assert confined == (workers if pin == "1" else 0)


@pytest.fixture
def thread_count():
    before = kernels.num_threads()
    yield kernels.set_num_threads
    kernels.set_num_threads(before)


def test_results_do_not_depend_on_the_number_of_threads(thread_count):
    weight, _ = packed("Q4_K", 300, 512)
    x = tokens(11, 512)
    results = []
    for count in (1, 2, 5):
        thread_count(count)
        assert kernels.num_threads() == count
        results.append(kernels.linear(x, weight))
    assert all(torch.equal(results[0], other) for other in results)


def test_objects_of_an_instruction_set_export_only_table_getters():
    """A weak symbol could be merged with that of another set: AVX-512 code on a machine that has none."""
    objects = sorted((ROOT / "build" / "CMakeFiles").glob("moesaic_*.dir/csrc/**/*.o"))
    nm = shutil.which("nm")
    if not objects or nm is None:
        pytest.skip("needs the object files of a build in build/, and nm")
    for path in objects:
        listing = subprocess.run([nm, "-C", "--defined-only", "-g", path], capture_output=True, text=True, check=True)
        isa = path.relative_to(ROOT / "build" / "CMakeFiles").parts[0].removeprefix("moesaic_").removesuffix(".dir")
        for line in listing.stdout.splitlines():
            _, kind, name = line.split(maxsplit=2)
            assert kind == "T", f"{path.name} of {isa} exports {name} as {kind}"
            assert name.startswith(f"moesaic::isa_{isa}::"), f"{path.name} of {isa} exports {name}"


def program_of(check: str, folder: Path) -> Path:
    """The program as `make test` has built it; compiled here if it is not there or older than what it is made of."""
    built, source = ROOT / "build" / check, Path(__file__).with_name(f"{check}.cpp")
    newest = max(path.stat().st_mtime for path in (source, *(ROOT / "csrc").rglob("*.[ch]*")))
    if built.exists() and built.stat().st_mtime > newest:
        return built
    compiler = shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        pytest.skip("needs a C++ compiler")
    program, include = folder / "check", f"-I{ROOT / 'csrc'}"
    units = [ROOT / f"csrc/{name}.cpp" for name in ("thread_pool", "work_queue", "moe_items", "numa", "cpu")]
    subprocess.run([compiler, "-std=c++20", "-O1", "-pthread", include, *units, source, "-o", program], check=True)
    return program


@pytest.mark.parametrize("check", ["thread_pool_check", "work_queue_check"])
def test_threads_and_work(check, tmp_path):
    """Programs in C++: barriers, exceptions, callers of several threads, parking, cores, nodes; shares of work."""
    done = subprocess.run([program_of(check, tmp_path)], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
