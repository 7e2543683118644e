"""What lies between two decode steps on a GPU: graph launches by themselves, and the gap in real runners' steps.

    python benchmarks/step_gap.py [--parts graphs,steps] [--subjects qwen3-30b-a3b:Q4_K:8,deepseek-v3:Q2_K:6]
        [--vram 24GiB] [--steps 200]

`graphs`: 900 trivial kernels as one captured line, with copies at its front and end, with forks to a second stream, cut
into pieces, and with the parts of a step that are not kernels: how long the call of the launch takes, how long after it
the first kernel runs, and when the last one has run.

`steps`: medians of the time from the CPU's last answer in a step to the GPU's first request in the next, split where
the host can see it: until the GPU is seen to be done, until the next step is called for, until it is launched, the call
of the launch, and from its beginning until the first request. In the loop of the bench, in that of `moesaic run`, in
`generate()`, and in the server's engine with one and with eight sequences, with the likeliest tokens and with drawn
ones; where misses may be uploaded, with graphs without and with uploads.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import islice, pairwise
from typing import Any

import torch
import triton
import triton.language as tl
from triton.language.extra import cuda as tl_cuda

from moesaic.engine.format_mix import FormatMix
from moesaic.engine.gpu.timed_runs import GpuTimedRuns
from moesaic.engine.gpu.upload_shares import numbers_of
from moesaic.engine.loader import load
from moesaic.engine.serving.core import Engine
from moesaic.engine.serving.gpu_runner import GpuStepRunner
from moesaic.engine.serving.params import SamplingParams
from moesaic.engine.serving.sampler import RequestSampler
from moesaic.engine.serving.token_stream import token_stream_of
from moesaic.engine.subjects import prepare_synthetic
from moesaic.placement.units import parse_size

KERNELS, FORKS, REPEAT = 900, 28, 60


@triton.jit
def _touch(x_ptr, y_ptr, z_ptr, out_ptr, first, count, BLOCK: tl.constexpr):
    offsets = first + tl.arange(0, BLOCK)
    inside = offsets < count
    total = tl.load(x_ptr + offsets, mask=inside) + tl.load(y_ptr + offsets, mask=inside)
    tl.store(out_ptr + offsets, total + tl.load(z_ptr + offsets, mask=inside), mask=inside)


@triton.jit
def _stamp(out_ptr):
    tl.store(out_ptr, tl_cuda.globaltimer())


class Trivial:
    """Graphs of kernels that do next to nothing."""

    def __init__(self) -> None:
        self.data = [torch.zeros(128, device="cuda") for _ in range(4)]
        self.stamps = torch.zeros(2, dtype=torch.int64, device="cuda")
        self.host = torch.zeros(64 * 1024, dtype=torch.uint8, pin_memory=True)
        self.device = torch.zeros(64 * 1024, dtype=torch.uint8, device="cuda")
        self.back = torch.zeros(8, dtype=torch.int64, pin_memory=True)
        self.side = torch.cuda.Stream()

    def kernels(self, count: int) -> None:
        """So many, in a line."""
        for _ in range(count):
            _touch[(1,)](*self.data, 0, 128, BLOCK=128, num_warps=4)

    def stamp(self, index: int) -> None:
        """Note when the GPU came here."""
        _stamp[(1,)](self.stamps[index:], num_warps=1)

    def forked(self, count: int, forks: int) -> None:
        """Kernels, and beside some of them one in another stream."""
        for _ in range(forks):
            self.kernels(count // forks // 2)
            self.side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self.side):
                self.kernels(2)
            self.kernels(count // forks // 2)
            torch.cuda.current_stream().wait_stream(self.side)

    def upload(self) -> None:
        """As the inputs of a step."""
        self.device.copy_(self.host, non_blocking=True)

    def report(self) -> None:
        """As the likeliest tokens."""
        self.back.copy_(self.stamps[:1].expand(8), non_blocking=True)

    def line(self) -> list[Callable[[], None]]:
        """One graph."""
        return [lambda: (self.stamp(0), self.kernels(KERNELS), self.stamp(1))]

    def cut(self, *sizes: int, copies: bool = False) -> list[Callable[[], None]]:
        """A graph for each of so many kernels."""

        def part(index: int, size: int) -> None:
            if index == 0:
                if copies:
                    self.upload()
                self.stamp(0)
            self.kernels(size)
            if index == len(sizes) - 1:
                self.stamp(1)

        return [lambda i=i, size=size: part(i, size) for i, size in enumerate(sizes)]  # type: ignore[misc]


def measure(trivial: Trivial, parts: list[Callable[[], None]], between: Callable[[], None] | None = None) -> str:
    """Capture and launch: microseconds of the calls, until the first kernel, and until all is seen to be done."""
    for part in parts:
        part()
    torch.cuda.synchronize()
    graphs: list[Any] = []
    for part in parts:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=graphs[0].pool() if graphs else None):
            part()
        graphs.append(graph)
    calls, firsts, totals, spans = [], [], [], []
    for _ in range(REPEAT + 5):
        torch.cuda.synchronize()
        time.sleep(0.001)
        began = time.perf_counter_ns()
        if between is not None:
            between()
        for index, graph in enumerate(graphs):
            graph.replay()
            if index == 0:
                firsts.append(time.perf_counter_ns() - began)
        called = time.perf_counter_ns()
        torch.cuda.current_stream().synchronize()
        ended = time.perf_counter_ns()
        first, last = trivial.stamps.tolist()
        calls.append(called - began)
        totals.append(ended - began)
        spans.append(last - first)
    middle = [statistics.median(values[5:]) / 1e3 for values in (firsts, calls, totals, spans)]
    slow = sorted(calls[5:])[int(0.95 * REPEAT)] / 1e3
    wait = statistics.median(total - span for total, span in zip(totals[5:], spans[5:], strict=True)) / 1e3
    return (
        f"first call {middle[0]:7.1f}  all calls {middle[1]:7.1f} (p95 {slow:7.1f})"
        f"  total {middle[2]:7.1f}  kernels {middle[3]:7.1f}  before+after {wait:6.1f}"
    )


def graphs() -> None:
    """Print a line for each kind of graph."""
    t = Trivial()
    print(f"torch {torch.__version__}, CUDA {torch.version.cuda}, {torch.cuda.get_device_name()}; microseconds")
    kinds: list[tuple[str, list[Callable[[], None]], dict[str, Any]]] = [
        ("2 stamps only", t.cut(0), {}),
        ("line of 900", t.line(), {}),
        ("line of 900, launched again", t.line(), {}),
        ("copy in, 900", [lambda: (t.upload(), t.stamp(0), t.kernels(KERNELS), t.stamp(1))], {}),
        ("900, copy out", [lambda: (t.stamp(0), t.kernels(KERNELS), t.stamp(1), t.report())], {}),
        ("copy in, 900, copy out", [lambda: (t.upload(), t.stamp(0), t.kernels(KERNELS), t.stamp(1), t.report())], {}),
        ("copy in outside, then 900", t.line(), {"between": t.upload}),
        ("28 forks", [lambda: (t.stamp(0), t.forked(KERNELS, FORKS), t.stamp(1))], {}),
        ("1 fork", [lambda: (t.stamp(0), t.forked(KERNELS, 1), t.stamp(1))], {}),
        ("28 forks, copies", [lambda: (t.upload(), t.stamp(0), t.forked(KERNELS, FORKS), t.stamp(1), t.report())], {}),
        ("32 + 868", t.cut(32, 868), {}),
        ("copy in 32 + 868", t.cut(32, 868, copies=True), {}),
        ("100 + 800", t.cut(100, 800), {}),
        ("9 of 100", t.cut(*[100] * 9), {}),
        ("28 of 32", t.cut(*[32] * 28), {}),
        (
            "32 + 28 forks of 868",
            [lambda: (t.stamp(0), t.kernels(32)), lambda: (t.forked(868, FORKS), t.stamp(1))],
            {},
        ),
    ]
    for name, parts, more in kinds:
        with guarded(name):
            print(f"| {name:28s} | {measure(t, parts, **more)}", flush=True)
    with guarded("eager 32, then 868 as a graph"):
        eager = t.cut(868)
        print(f"| {'32 eager, then graph of 868':28s} | {measure(t, eager, between=lambda: t.kernels(32))}", flush=True)


@contextmanager
def guarded(name: str) -> Iterator[None]:
    """What fails is a line, and the rest goes on."""
    try:
        yield
    except Exception as error:
        print(f"| {name}: {type(error).__name__}: {error}", flush=True)


class Marks:
    """When the host came where, of each step of a runner; nanoseconds of the monotonic clock."""

    def __init__(self, runner: Any) -> None:
        self.runner, self.steps = runner, []
        self._now: dict[str, int] = {}
        hand_off, steps = runner.hand_off, runner.steps
        hand_off.times = torch.zeros(len(runner.server.layers), 3, dtype=torch.int64)
        self._run, self._inner, self._check = steps.run, steps._run, hand_off.check
        steps.run, steps._run, hand_off.check = self._on_call, self._on_run, self._on_check

    def close(self) -> None:
        """Take it all out again."""
        steps, hand_off = self.runner.steps, self.runner.hand_off
        steps.run, steps._run, hand_off.check, hand_off.times = self._run, self._inner, self._check, None

    def _on_call(self, *args: Any, **kwargs: Any) -> Any:
        self._now = {"call": time.perf_counter_ns()}
        try:
            return self._run(*args, **kwargs)
        finally:
            self._now["returned"] = time.perf_counter_ns()
            self.steps.append(self._now)

    def _on_run(self, bucket: Any, *args: Any) -> Any:
        self._now["run"] = time.perf_counter_ns()
        for brings, graph in bucket.graphs.items():
            if not isinstance(graph, _Marked):
                bucket.graphs[brings] = _Marked(graph)
            bucket.graphs[brings].marks, bucket.graphs[brings].brings = self._now, brings
        return self._inner(bucket, *args)

    def _on_check(self) -> None:
        self._now["done"] = time.perf_counter_ns()
        times = self.runner.hand_off.times
        self._now["request"], self._now["answer"] = int(times[0, 0]), int(times[-1, 1])
        self._check()

    def line(self, brings: bool) -> str:
        """Medians."""
        pairs = list(zip(self.steps[8:-1], self.steps[9:], strict=True))
        rows = []
        for before, now in pairs:
            if "launch" not in now or "answer" not in before or bool(now["brings"]) != brings:
                continue
            ways = [before["answer"], before["done"], before["returned"], now["call"], now["run"], now["launch"]]
            cuts = [b - a for a, b in pairwise(ways)]
            cuts += [now["launched"] - now["launch"], now["request"] - now["launch"], now["request"] - before["answer"]]
            rows.append([*cuts, now["done"] - before["done"]])
        if not rows:
            return "no steps"
        cut_at = ("answer-done", "done-returned", "returned-call", "call-run", "run-launch")
        names = (*cut_at, "launch", "launch-request", "gap", "step")
        medians = [statistics.median(column) / 1e3 for column in zip(*rows, strict=True)]
        text = "  ".join(f"{name} {value:.0f}" for name, value in zip(names, medians, strict=True))
        return f"{len(rows)} steps: {text}"


class _Marked:
    """A graph that notes when it is launched."""

    def __init__(self, graph: Any) -> None:
        self._graph, self.marks, self.brings = graph, {}, False

    def replay(self) -> None:
        self.marks["launch"], self.marks["brings"] = time.perf_counter_ns(), self.brings
        self._graph.replay()
        self.marks["launched"] = time.perf_counter_ns()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._graph, name)


def loops(model: Any, num_steps: int) -> Iterator[tuple[str, Callable[[], None]]]:
    """Who decodes, by name."""
    runner = model.runner
    yield "bench", lambda: GpuTimedRuns(runner, "decode", 16, num_steps).run()

    def generate() -> None:
        prompt = torch.arange(16)[None]
        model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=num_steps, do_sample=False)

    yield "generate()", generate
    stream = token_stream_of(model)

    def run() -> None:
        prompt = list(range(16))
        sampler = RequestSampler(SamplingParams(temperature=0), {}, runner.decoder.vocab_size, prompt)
        stream.begin(prompt)
        for _ in islice(stream.generate(prompt, sampler), num_steps):
            pass
        stream.forget()

    yield "run", run

    def engine(count: int, temperature: float) -> None:
        made = Engine(GpuStepRunner(runner), None, one_torch_thread=True)
        params = SamplingParams(temperature=temperature, top_p=0.95, max_tokens=num_steps, ignore_eos=True)
        with made.running():
            for index in range(count):
                made.add(str(index), list(range(3 + index, 19 + index)), params)
            while made.has_work:
                made.step()
        made.close()

    for count in (1, 8):
        for temperature in (0.0, 0.7):
            name = f"engine, {count}{', drawn' if temperature else ''}"
            yield name, lambda count=count, temperature=temperature: engine(count, temperature)  # type: ignore[misc]


def steps(subject: str, vram: int, num_steps: int) -> None:
    """Print a line for each loop."""
    name, fmt, layers = subject.split(":")
    prepared = prepare_synthetic(name, FormatMix.parse(fmt), int(layers), "hybrid", vram=vram, context=4096)
    model: Any = load(prepared, progress=False)
    runner = model.runner
    nodes = f"; {runner.no_uploads}" if runner.uploads is None else "; uploads may be"
    print(f"\n{subject}{nodes}; head {runner.head_seconds(1) * 1e6:.0f} us; microseconds, medians", flush=True)
    uploads = runner.uploads
    ways: list[tuple[bool, Any]] = [(False, None)]
    if uploads is not None:
        landing = uploads.landing
        none, some = [0] * (landing.max_distinct + 1), numbers_of(3, landing.max_distinct, landing.num_slots)
        ways = [(False, none), (True, some)]
    for loop, run in loops(model, num_steps):
        for brings, fixed in ways:
            if uploads is not None:
                uploads.fixed = fixed
            with guarded(loop):
                run()  # captures, fills the cache
                marks = Marks(runner)
                try:
                    run()
                finally:
                    marks.close()
                print(f"| {loop:16s} | {'uploads' if brings else 'none':7s} | {marks.line(brings)}", flush=True)


def main() -> None:
    """Parse, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", default="graphs,steps")
    parser.add_argument("--subjects", default="qwen3-30b-a3b:Q4_K:8,deepseek-v3:Q2_K:6")
    parser.add_argument("--vram", default="24GiB")
    parser.add_argument("--steps", type=int, default=200)
    args = parser.parse_args()
    if "graphs" in args.parts:
        graphs()
    for subject in args.subjects.split(",") if "steps" in args.parts else []:
        with guarded(subject):
            steps(subject, parse_size(args.vram), args.steps)


if __name__ == "__main__":
    main()
