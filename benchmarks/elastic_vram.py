"""What it costs to lend VRAM, and what a decode step takes before, while and after the experts have lent some.

    python benchmarks/elastic_vram.py [--subject qwen3-30b-a3b:Q4_K:24] [--vram 6GiB] [--context 2048] [--long 16384]
        [--tokens 64] [--out FILE]

`driver`: microseconds of each call of the driver for lots of several sizes, and of moving 192 MiB with them.
`fixed` and `lending`: one model in two processes, with VRAM divided once and with VRAM that is lent. Both decode at a
short and at a long context (blocks that hold zeros: only the time counts). Where memory is lent, blocks are taken until
the experts have lent all they can, then freed; each move is timed, and so are steps and hits in between.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from moesaic.engine import loader
from moesaic.engine.gpu import lending as lending_module
from moesaic.engine.gpu.cuda_memory import CudaMemory
from moesaic.engine.gpu.runner import ModelRunner
from moesaic.engine.subjects import prepare_synthetic
from moesaic.kvcache.paged import PagedSequence, PoolLayer
from moesaic.placement.units import parse_size
from moesaic.quant import get_format

MIB = 2**20
Row = dict[str, Any]


def driver_row(lot: int, total: int = 192 * MIB, repeat: int = 20) -> Row:
    """Medians of the calls for lots of one size."""
    driver, times = CudaMemory(torch.device("cuda")), dict[str, list[float]]()

    def timed(name: str, call: Callable[[], Any]) -> Any:
        began = time.perf_counter()
        result = call()
        times.setdefault(name, []).append((time.perf_counter() - began) * 1e6)
        return result

    address, other = driver.reserve(total), driver.reserve(total)
    pieces = [timed("create", lambda: driver.create(lot)) for _ in range(total // lot)]
    for index, piece in enumerate(pieces):
        driver.map(address + index * lot, piece, lot)
    driver.allow(address, total)
    whole = []
    for _ in range(repeat):
        began = time.perf_counter()
        for index, piece in enumerate(pieces):
            timed("unmap", lambda at=address + index * lot: driver.unmap(at, lot))
            timed("map", lambda at=other + index * lot, piece=piece: driver.map(at, piece, lot))
        timed("allow", lambda at=other: driver.allow(at, total))
        whole.append((time.perf_counter() - began) * 1e3)
        address, other = other, address
    for index, piece in enumerate(pieces):
        driver.unmap(address + index * lot, lot)
        timed("release", lambda piece=piece: driver.release(piece))
    driver.free(address, total)
    driver.free(other, total)
    medians = {f"{name}_us": round(statistics.median(values), 1) for name, values in times.items()}
    return {"part": "driver", "lot_mib": lot // MIB, "granularity": driver.granularity} | medians | {
        "move_192_mib_ms": round(statistics.median(whole), 3)
    }  # fmt: skip


class Subject:
    """A model, and how its steps are timed."""

    def __init__(self, arguments: argparse.Namespace, fixed: bool) -> None:
        name, fmt, *layers = arguments.subject.split(":")
        context = arguments.long + 1024 if fixed else arguments.context
        count = int(layers[0]) if layers else None
        prepared = prepare_synthetic(
            name, get_format(fmt), count, "hybrid", vram=parse_size(arguments.vram), context=context
        )
        self.budget = prepared.plan.vram_budget(loader.this_computer(True))
        self.runner: ModelRunner = loader.load(prepared, progress=False, lends=not fixed).runner
        self.tokens, self.mode = arguments.tokens, "fixed" if fixed else "lending"
        self._random = torch.Generator().manual_seed(0)

    def row(self, what: str, length: int, seconds: float = 0.0) -> Row:
        """Decode steps of a sequence that is `length` long, for as many tokens or seconds as it takes."""
        runner, lending = self.runner, self.runner.lending
        sequence = runner.new_sequence()
        sequence.append(length)
        self._zero(sequence)
        policy = runner.slots.cache.policy if runner.slots.cache is not None else None
        before = (int(policy.hits.sum()), int(policy.uses.sum())) if policy is not None else (0, 0)
        times, began = [], time.perf_counter()
        while len(times) < self.tokens + 8 or time.perf_counter() - began < seconds:
            token = int(torch.randint(1000, (1,), generator=self._random))
            started = time.perf_counter()
            runner.decode([sequence], [token])
            times.append((time.perf_counter() - started) * 1e3)
            sequence.truncate(length)
        sequence.free()
        free, total = torch.cuda.mem_get_info()
        hits = None
        if policy is not None:
            uses = int(policy.uses.sum()) - before[1]
            hits = round((int(policy.hits.sum()) - before[0]) / max(1, uses), 4)
        return {
            "part": self.mode, "what": what, "length": length, "steps": len(times),
            "step_ms": round(statistics.median(times[8:]), 3), "longest_ms": round(max(times[8:]), 3), "hit_rate": hits,
            "num_slots": None if policy is None else policy.num_slots,
            "held": None if policy is None else int((policy.slot_of >= 0).sum()),
            "blocks": runner.pool.num_backed, "blocks_most": runner.pool.num_blocks,
            "vram_used_gib": round((total - free) / 2**30, 3),
            "torch_reserved_gib": round(torch.cuda.max_memory_reserved() / 2**30, 3),
            "lots_gib": None if lending is None else round(lending.nbytes / 2**30, 3),
        }  # fmt: skip

    def _zero(self, sequence: PagedSequence) -> None:
        blocks = torch.tensor(sequence.blocks, device=self.runner.decoder.device)
        for cache in self.runner.caches:
            if isinstance(cache, PoolLayer):
                cache.keys[blocks] = 0
                if cache.values is not None:
                    cache.values[blocks] = 0


def lend(subject: Subject, arguments: argparse.Namespace, say: Callable[[Row], None]) -> None:
    """Take blocks, step by step, then give them back."""
    runner, lending = subject.runner, subject.runner.lending
    assert lending is not None, "nothing can be lent: see the plan"
    say({"part": "lending", "what": "lots", "lots": str(lending.lots)})
    say(subject.row("before", 64, 1.0))
    if lending.staging is not None:
        began = time.perf_counter()
        lending.begin_streaming(1)
        taken = time.perf_counter() - began
        lending.end_streaming()
        say({"part": "lending", "what": "staging buffers come", "ms": round(taken * 1e3, 3)})
        say(subject.row("after that", 64, 1.0))
    held = runner.new_sequence()
    for share in (0.25, 0.5, 0.75, 1.0):
        room = runner.pool.num_blocks - (arguments.long // 64 + 2 if share == 1.0 else 2)
        wanted, before = int(room * share) * 64 - held.length, lending.figures()
        if wanted < 64:
            continue
        held.append(wanted)
        after = lending.figures()
        moved = (after.num_blocks - before.num_blocks) * lending.lots.block_bytes / MIB
        taken = (after.seconds - before.seconds) * 1e3
        say({"part": "lending", "what": f"pool to {share:.0%}", "moved_mib": round(moved), "ms": round(taken, 3)})
        say(subject.row(f"pool at {share:.0%}", 64))
    say(subject.row("long", arguments.long))
    held.free()
    before = lending.figures()
    say(subject.row("freed", 64, lending_module._SECONDS + 1.5))
    after = lending.figures()
    say({"part": "lending", "what": "back", "moves": after.moves - before.moves,
         "ms": round((after.seconds - before.seconds) * 1e3, 3), "slots": after.num_slots,
         "slots_before": before.num_slots})  # fmt: skip
    say(subject.row("after", 64, 1.0))


def main() -> None:
    """Measure all parts, each in a process of its own."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--subject", default="qwen3-30b-a3b:Q4_K:24", help="MODEL:FORMAT[:LAYERS]")
    parser.add_argument("--vram", default="6GiB", help="budget of the VRAM")
    parser.add_argument("--context", type=int, default=2048, help="tokens of cache at first")
    parser.add_argument("--long", type=int, default=16384, help="tokens of the long context")
    parser.add_argument("--tokens", type=int, default=64, help="steps of each figure")
    parser.add_argument("--out", type=Path, help="file for the rows, as JSON lines")
    parser.add_argument("--part", choices=("driver", "fixed", "lending"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()

    def say(row: Row) -> None:
        text = json.dumps(row)
        print(text, flush=True)
        if arguments.out is not None:
            with arguments.out.open("a") as file:
                file.write(text + "\n")

    if arguments.part is None:
        for part in ("driver", "lending", "fixed"):
            subprocess.run([sys.executable, __file__, *sys.argv[1:], "--part", part], check=False)
    elif arguments.part == "driver":
        for lot in (2, 8, 16, 32, 64):
            say(driver_row(lot * MIB))
    else:
        subject = Subject(arguments, arguments.part == "fixed")
        if arguments.part == "lending":
            lend(subject, arguments, say)
        else:
            say(subject.row("before", 64, 1.0))
            say(subject.row("long", arguments.long))


if __name__ == "__main__":
    main()
