"""What it costs the thread pool to start a task on all threads and to hold a barrier, in microseconds.

    python benchmarks/pool.py [--threads 1,2,4,8,16] [--seconds 1] [--csrc FOLDER] [--json]

A decode step does both hundreds of times per token. Compiles pool.cpp with the sources of the pool; --csrc takes them
from another checkout, so that two versions can be compared on one machine. run: an empty task on all threads, started
and finished; barrier: one barrier inside a task; parked: the first run after the threads have gone to sleep. Medians,
and the 99th percentile of batches of 200.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import tempfile
from pathlib import Path

from moesaic import kernels

ROOT = Path(__file__).parents[1]


def build(csrc: Path, program: Path) -> None:
    """Compile the probe with the pool's sources, whichever of them that version has."""
    compiler = shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        raise SystemExit("needs g++ or clang++")
    units = [csrc / f"{name}.cpp" for name in ("thread_pool", "work_queue", "numa", "cpu")]
    sources = [*(unit for unit in units if unit.exists()), Path(__file__).with_suffix(".cpp")]
    generated = ROOT / "build" / "generated"
    flags = ["-std=c++20", "-O3", "-DNDEBUG", "-pthread", f"-I{csrc}", f"-I{generated}"]
    subprocess.run([compiler, *flags, *map(str, sources), "-o", str(program)], check=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", default=str(kernels.num_threads()), help="one or several numbers")
    parser.add_argument("--seconds", type=float, default=1.0, help="for each figure")
    parser.add_argument("--csrc", type=Path, default=ROOT / "csrc")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        program = Path(folder) / "pool"
        build(args.csrc, program)
        command = [str(program), str(args.seconds), *args.threads.split(",")]
        lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    if args.json:
        print("\n".join(lines))
        return
    print("threads    run us    p99   barrier us    p99   parked us")
    for r in map(json.loads, lines):
        print(
            f"{r['threads']:7} {r['run_us']:9.2f} {r['run_p99_us']:6.2f} {r['barrier_us']:12.2f} "
            f"{r['barrier_p99_us']:6.2f} {r['parked_run_us']:11.0f}"
        )


if __name__ == "__main__":
    main()
