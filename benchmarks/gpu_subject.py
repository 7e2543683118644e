"""One model in one format, built once, under several plans: what `benchmarks/gpu.py` starts and collects.

Hybrid first, then the CPU, then the split by layers. A runner takes what goes to the GPU out of the model; that is put
back before the next plan, so the experts are packed once. What is measured is written line by line, so that a process
that is ended keeps what it had.
"""

from __future__ import annotations

import gc
import json
import statistics
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from gpu_parts import GIB, Report, Snapshot, Task, TimedTail, memory
from moesaic.engine.format_mix import FormatMix
from moesaic.engine.gpu.bench import gpu_figures
from moesaic.engine.gpu.promotion import PromotionPolicy
from moesaic.engine.gpu.runner import ModelRunner, RunnerOptions
from moesaic.engine.gpu.slots import ExpertSlots
from moesaic.engine.gpu.start import start_on_gpu
from moesaic.engine.gpu.timed_runs import GpuTimedRuns, vram_bandwidth
from moesaic.engine.gpu.warm_up import MOST_SECONDS, WarmUp, warm_up
from moesaic.engine.loader import load, this_computer
from moesaic.engine.presets import get_preset
from moesaic.engine.subjects import prepare_synthetic
from moesaic.engine.timed_runs import TimedRuns
from moesaic.kernels import active_isa, num_threads, read_bandwidth
from moesaic.modules.gpu.decoder import GpuDecoder
from moesaic.modules.gpu.experts import ResidentExperts
from moesaic.placement.vram import DRIVER_BYTES, KV_BLOCK, MAX_BATCH, MAX_STATES
from zipf_routers import ZipfRouters

DECODE_PROMPT = 16


@dataclass(frozen=True, slots=True)
class _Cached:
    """What a runner has beside the simple hybrid."""

    slots: Any
    uploads: Any


class Subject:
    """The model, loaded for the CPU, and what its plans on a GPU say."""

    def __init__(self, task: Task, report: Report, started: float) -> None:
        self.task, self.report, self._started = task, report, started
        self.fmt, self.context = FormatMix.parse(task.weight_format), max((4096, *(n + 64 for n in task.prefill)))
        self.total_layers = get_preset(task.model).num_layers
        self.num_layers = task.layers or self.total_layers
        self.device = torch.device("cuda")
        self.bandwidth = read_bandwidth(this_computer(False).probe_bytes).median
        self.vram_bandwidth = vram_bandwidth(self.device) / 1e9
        torch.cuda.empty_cache()
        began = time.perf_counter()
        self.model: Any = load(self._prepare("cpu", self.num_layers), progress=False)
        self.snapshot = Snapshot(self.model)
        report.add(
            plan="load",
            load_s=time.perf_counter() - began,
            device=torch.cuda.get_device_name(),
            isa=active_isa(),
            threads=num_threads(),
            read_bandwidth=self.bandwidth,
            vram_bandwidth=self.vram_bandwidth,
        )
        self.rates: dict[str, float] = {}

    def _prepare(self, plan: str, layers: int | None) -> Any:
        vram = None if plan == "cpu" else self.task.vram
        return prepare_synthetic(self.task.model, self.fmt, layers, plan, vram=vram, context=self.context)

    def left(self) -> float:
        """Seconds."""
        return self.task.seconds - (time.monotonic() - self._started)

    def command(self, what: str, plan: str, tokens: int) -> str:
        """What measures about the same."""
        size = f"--tokens {tokens}" if what == "decode" else f"--prompt-tokens {tokens}"
        gpu = "" if plan == "cpu" else f" --vram {self.task.vram / GIB:g}GiB"
        return (
            f"moesaic bench {what} --synthetic {self.task.model} --format {self.task.weight_format} "
            f"--layers {self.num_layers} --plan {plan}{gpu} {size}"
        )

    @contextmanager
    def guarded(self, plan: str) -> Iterator[None]:
        """A failure is a row, and the next plan finds a model as it was loaded and an empty GPU."""
        try:
            yield
        except Exception as error:
            traceback.print_exc()
            self.report.add(plan=plan, what="failed", problem=f"{type(error).__name__}: {error}"[:300])
        self.snapshot.restore()
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()

    # Hybrid

    def hybrid(self) -> None:
        """Experts on the CPU; without and with the cache, on one copy of the other weights."""
        plan = self._prepare("hybrid", self.num_layers).plan
        budget = plan.vram_budget(this_computer(True))
        whole = self._prepare("hybrid", None).plan.vram_budget(this_computer(True))
        if whole.upload_experts and not budget.upload_experts:  # the experts of a few layers would all be there
            budget = replace(budget, upload_experts=whole.upload_experts)
        start_on_gpu(self.model, plan, budget)
        runner = self.model.runner
        runner.steps.lending = None  # it would give the cache more than its share
        cached = _Cached(runner.slots, runner.uploads)
        routers = ZipfRouters(runner) if self.task.zipf else None
        for index, exponent in enumerate(self.task.zipf or (None,)):
            if routers is not None and exponent is not None:
                routers.set_exponent(exponent)
            if index == 0:  # the simple hybrid, which nothing may be slower than, and which has no use for favourites
                runner.steps.slots, runner.steps.uploads = ExpertSlots(), None
                self._on_gpu(runner, plan, "hybrid", 0)
            if "cache" not in self.task.parts or cached.slots.cache is None:
                return
            name = "hybrid+cache" if len(self.task.zipf) < 2 else f"hybrid+cache, Zipf {exponent:g}"
            # One runner for all: two would have two caches of keys and values, which the budget has no room for.
            self._with_cache(runner, cached, plan, name, whole.cache_experts / whole.num_experts)

    def _with_cache(self, runner: ModelRunner, cached: _Cached, plan: Any, name: str, share: float) -> None:
        """With a cache of a share of the experts: as much as it could hold of the whole model."""
        steps, cache = runner.steps, cached.slots.cache
        steps.slots, steps.uploads = cached.slots, cached.uploads
        runner.server.uses.zero_()
        num_layers, num_experts = cache.policy.slot_of.shape
        slots = min(max(1, round(share * num_layers * num_experts)), cache.policy.num_slots)
        cache.restart(PromotionPolicy(num_layers, num_experts, slots))
        if "decode" not in self.task.parts:  # which begins with it
            self._warm_up(GpuTimedRuns(runner, "decode", DECODE_PROMPT, 65))
        self._on_gpu(runner, plan, name, slots)
        if self.task.defer:
            runner.hand_off.defer(self.task.defer)
            self._on_gpu(runner, plan, f"{name}, {self.task.defer} late", slots)
            runner.hand_off.defer(0)

    def _warm_up(self, bench: GpuTimedRuns) -> WarmUp:
        """Until the slots are taken and shares of uploads are known, or time is up."""
        return warm_up(bench, most_seconds=min(MOST_SECONDS, self.left() / 10))

    def _on_gpu(self, runner: ModelRunner, plan: Any, name: str, slots: int) -> None:
        if "decode" in self.task.parts:
            self._decode(runner, plan, name, slots)
        if "prefill" in self.task.parts:
            self._prefill(name, lambda n: GpuTimedRuns(runner, "prefill", n, 1), slots=slots)

    def _decode(self, runner: ModelRunner, plan: Any, name: str, slots: int) -> None:
        bench = GpuTimedRuns(runner, "decode", DECODE_PROMPT, self.task.tokens + 1)
        warmed_up = self._warm_up(bench)
        runs = [bench.run() for _ in range(self.task.repeat)]
        figures = gpu_figures(runner, plan, bench, self.bandwidth, self.vram_bandwidth, runs, warmed_up)
        step, head = 1 / statistics.median(runs), runner.head_seconds(1)
        layer = (step - head) / self.num_layers
        self._row(
            name,
            "decode",
            self.task.tokens,
            runs,
            layer,
            1 / (head + layer * self.total_layers),
            slots=slots,
            hit_rate=figures.hit_rate,
            step_ms=_ms(figures.step_seconds),
            experts_ms=_ms(figures.experts_seconds),
            between_ms=_ms(figures.between_seconds),
            head_ms=head * 1e3,
            roofline_ms=_ms(figures.roofline_seconds),
            # Of the runs without a clock in them; the profile's own step is a little longer.
            roofline_share=figures.runs_roofline_share,
            dram_bytes=figures.dram_bytes,
            vram_bytes=figures.vram_bytes,
            warm_up=asdict(warmed_up),
        )

    # By layers, and on the CPU

    def layers(self) -> None:
        """The first layers on the GPU, the others on the CPU; some on each where the whole model does not fit."""
        plan = self._prepare("layers", self.num_layers).plan
        budget = plan.vram_budget(this_computer(True))
        of_all = len(self._prepare("layers", None).plan.gpu_layers)
        count = len(plan.gpu_layers) if of_all == self.total_layers else min(len(plan.gpu_layers), self.num_layers - 1)
        if count < 1:
            raise RuntimeError("a split of a single layer: take more with --subjects MODEL:FORMAT:LAYERS")
        limit = (budget.total - DRIVER_BYTES) / torch.cuda.get_device_properties(self.device).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, limit))
        every = None if count == self.num_layers else count
        decoder = GpuDecoder(self.model, self.device, max_positions=budget.num_blocks * KV_BLOCK, num_layers=every)
        resident = {layer: ResidentExperts.of(experts, self.device) for layer, experts in enumerate(decoder.routed)}
        tail: Any = None if decoder.tail is None else TimedTail(decoder.tail)
        decoder.tail = tail
        options = RunnerOptions(budget.num_blocks, KV_BLOCK, max_batch=MAX_BATCH, num_states=MAX_STATES)
        runner = ModelRunner(decoder, options, ExpertSlots(resident))
        name = f"layers {of_all}/{self.total_layers}"
        if "decode" in self.task.parts:
            bench = GpuTimedRuns(runner, "decode", DECODE_PROMPT, self.task.tokens + 1)
            bench.run()
            runs, behind = self._timed(bench.run, tail, "decode", self.task.repeat)
            self._split(name, "decode", self.task.tokens, 1, runs, behind, count, of_all, runner.head_seconds(1))
        if "prefill" not in self.task.parts:
            return
        for length in self.task.prefill:
            if self._skip(name, length):
                continue
            run = GpuTimedRuns(runner, "prefill", length, 1).run
            self.rates[name] = run()
            runs, behind = self._timed(run, tail, "prefill", max(1, self._repeats(name, length)))
            self.rates[name] = statistics.median(runs)
            self._split(name, "prefill", length, length, runs, behind, count, of_all, 0.0)

    def _timed(
        self, run: Callable[[], float], tail: Any, what: str, count: int
    ) -> tuple[list[float], tuple[float, float]]:
        """Rates, and of a step or prompt the seconds in the layers behind the split and in the head there."""
        decodes = what == "decode"
        if tail is not None:
            tail.start(1 if decodes else max(self.task.prefill))
        runs = [run() for _ in range(count)]
        if tail is None:
            return runs, (0.0, 0.0)
        passes = count * (self.task.tokens if decodes else 1)
        heads = tail.head_seconds / tail.head_calls if decodes else tail.head_seconds / count
        return runs, (tail.layer_seconds / passes, heads)

    def _split(
        self,
        name: str,
        what: str,
        tokens: int,
        per_pass: int,
        runs: list[float],
        behind: tuple[float, float],
        count: int,
        of_all: int,
        head: float,
    ) -> None:
        step = per_pass / statistics.median(runs)
        behind_layers, behind_head = behind
        on_gpu = max(0.0, step - behind_layers - behind_head - head) / count
        on_cpu = behind_layers / max(1, self.num_layers - count)
        whole = of_all * on_gpu + (self.total_layers - of_all) * on_cpu + behind_head + head
        mean = (step - behind_head - head) / self.num_layers
        more = {"gpu_layer_ms": on_gpu * 1e3, "cpu_layer_ms": on_cpu * 1e3, "layers_on_gpu": count}
        self._row(name, what, tokens, runs, mean, per_pass / whole, **more)

    def cpu(self) -> None:
        """The same weights without a GPU."""
        if "decode" in self.task.parts:
            bench = TimedRuns(self.model, "decode", DECODE_PROMPT, self.task.tokens + 1)
            bench.run()
            runs = [bench.run() for _ in range(self.task.repeat)]
            share = bench.profile()[1]
            step = 1 / statistics.median(runs)
            layer = share * step / self.num_layers
            whole = 1 / ((1 - share) * step + layer * self.total_layers)
            self._row("cpu", "decode", self.task.tokens, runs, layer, whole)
        if "prefill" in self.task.parts:
            self._prefill("cpu", lambda n: TimedRuns(self.model, "prefill", n, 1))

    # Prompts

    def _prefill(self, name: str, make: Callable[[int], TimedRuns | GpuTimedRuns], **more: Any) -> None:
        """Short layers are taken to cost nothing, so that the others look no quicker than they are."""
        for length in self.task.prefill:
            if self._skip(name, length):
                continue
            bench = make(length)
            run, short = bench.run, bench.short_layers if self.num_layers > 1 else 0
            runs = [run()]
            self.rates[name] = runs[0]
            again = max(0 if name == "cpu" else 1, self._repeats(name, length))  # on a GPU the first one compiles
            runs = [run() for _ in range(again)] or runs
            self.rates[name] = statistics.median(runs)
            layer = length / statistics.median(runs) / (self.num_layers - short)
            self._row(name, "prefill", length, runs, layer, length / (layer * (self.total_layers - short)), **more)

    def _skip(self, name: str, length: int) -> bool:
        expected = length / self.rates[name] if name in self.rates else 0.0
        if self.left() > 1.2 * expected + 2:
            return False
        self.report.add(
            plan=name, what="prefill", tokens=length, problem=f"not run: {self.left():.0f} s left, needs {expected:.0f}"
        )
        return True

    def _repeats(self, name: str, length: int) -> int:
        """How many more runs, so that a figure takes no more than a tenth of the time that is left."""
        return max(0, min(self.task.repeat, int(self.left() / 10 * self.rates[name] / length)))

    def _row(
        self, plan: str, what: str, tokens: int, runs: list[float], layer: float, whole: float | None, **more: Any
    ) -> None:
        on_gpu = {}
        if plan != "cpu":
            free, total = torch.cuda.mem_get_info()
            on_gpu = {"vram_reserved": torch.cuda.max_memory_reserved(), "vram_used": total - free}
        self.report.add(
            plan=plan,
            what=what,
            tokens=tokens,
            runs=runs,
            tokens_per_second=statistics.median(runs),
            layer_ms=layer * 1e3,
            whole_tokens_per_second=whole,
            command=self.command(what, plan.split("+")[0].split()[0], tokens),
            **on_gpu,
            **more,
        )


def _ms(seconds: float | None) -> float | None:
    return None if seconds is None else seconds * 1e3


def main() -> None:
    """Measure what the arguments say: a task as JSON and the file that rows go to."""
    started = time.monotonic()
    task = Task.of(json.loads(sys.argv[1]))
    common = {
        "model": task.model,
        "format": task.weight_format,
        "layers": task.layers or get_preset(task.model).num_layers,
        "total_layers": get_preset(task.model).num_layers,
        "vram_budget": task.vram,
    }
    report = Report(Path(sys.argv[2]), common)
    if "memory" in task.parts:
        memory(task, report)
        return
    subject = Subject(task, report, started)
    if {"decode", "prefill", "cache"} & set(task.parts):
        with subject.guarded("hybrid"):
            subject.hybrid()
    if "cpu" in task.parts:
        with subject.guarded("cpu"):
            subject.cpu()
    if "layers" in task.parts:
        with subject.guarded("layers"):
            subject.layers()


if __name__ == "__main__":
    main()
