"""A few decode steps as a Chrome trace (Perfetto opens it): what the GPU did beside what the CPU did.

Lanes of the CPU come from the server of experts, which notes when requests arrived and were answered, on the monotonic
clock. Lanes of the GPU are PyTorch's profiler's, whose clock is another one: before each step a marker is recorded
between two looks at the monotonic clock, which says how far apart the clocks are, and how well that is known. Without
events of the profiler the GPU's lane is what lies between answers and requests. Nothing else of a profile is kept, so
that no path of a file gets into a trace.
"""

from __future__ import annotations

import json
import re
import statistics
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch.profiler import ProfilerActivity, profile, record_function

from moesaic.engine.gpu.timed_runs import GpuTimedRuns, StepTimes
from moesaic.errors import ExpertTimeoutError
from moesaic.files import write_whole

__all__ = ["Alignment", "align", "build_trace", "lanes_of_profile", "lanes_of_steps", "write_trace"]

Event = dict[str, Any]

_MARKER = "moesaic.clock"
_GPU, _CPU = 1, 2  # processes of the trace
_STEPS, _EXPERTS, _CALLS, _BETWEEN = 1, 2, 3, 0  # lanes: three of the CPU, and the GPU's without a profiler
_ON_GPU = frozenset({"kernel", "gpu_memcpy", "gpu_memset"})
_CALL = frozenset({"cuda_runtime", "cuda_driver"})
_POLL = "_wait"  # the kernel that ends when an answer is there
_PATH = re.compile(r"(?:[A-Za-z]:)?(?:[\\/][\w.+~-]+)+[\\/]")


@dataclass(frozen=True, slots=True)
class Alignment:
    """How the profiler's clock is turned into the monotonic one.

    Attributes:
        offset: nanoseconds to add to the profiler's.
        error: nanoseconds that this may be wrong: half of the time that the closest marker took, and the drift.
    """

    offset: float
    error: float


def align(looks: Sequence[tuple[int, int]], profiled: Sequence[Mapping[str, Any]]) -> Alignment | None:
    """Compare clocks.

    Args:
        looks: nanoseconds of the monotonic clock before and after each marker.
        profiled: events of a profile, times in microseconds.

    Returns:
        None if the profile does not have the markers.
    """
    markers = [event for event in profiled if event.get("name") == _MARKER and event.get("cat") == "user_annotation"]
    markers.sort(key=lambda event: float(event["ts"]))
    if not markers or len(markers) != len(looks):
        return None
    offsets = [
        (before + after) / 2 - 1e3 * (float(event["ts"]) + float(event.get("dur", 0.0)) / 2)
        for (before, after), event in zip(looks, markers, strict=True)
    ]
    widths = [after - before for before, after in looks]
    best = min(range(len(widths)), key=widths.__getitem__)
    return Alignment(offsets[best], widths[best] / 2 + max(offsets) - min(offsets))


def lanes_of_steps(steps: Sequence[StepTimes], *, gpu: bool) -> list[Event]:
    """Steps, and the experts that the CPU computed in them.

    Args:
        steps: in order.
        gpu: whether to draw the GPU's lane from them too: what lies between answers and requests.
    """
    events = []
    for index, step in enumerate(steps):
        events.append(_event(_CPU, _STEPS, f"step {index}", step.began, step.ended))
        before = step.began
        for layer, (requested, answered, done) in enumerate(step.layers):
            if gpu:
                events.append(_event(_GPU, _BETWEEN, f"until layer {layer} asks", before, requested))
            events.append(_event(_CPU, _EXPERTS, f"experts of layer {layer}", requested, answered))
            if done > answered:
                events.append(_event(_CPU, _EXPERTS, f"deferred experts of layer {layer}", answered, done))
            before = answered
        if gpu:
            events.append(_event(_GPU, _BETWEEN, "after the last answer", before, step.ended))
    return events


def lanes_of_profile(profiled: Sequence[Mapping[str, Any]], offset: float, first: int, last: int) -> list[Event]:
    """Kernels and copies by stream, and calls of the driver, that began within [first, last] nanoseconds."""
    events = []
    for source in profiled:
        category = source.get("cat")
        if source.get("ph") != "X" or category not in _ON_GPU | _CALL:
            continue
        began = 1e3 * float(source["ts"]) + offset
        if not first <= began <= last:
            continue
        process, lane = (_CPU, _CALLS) if category in _CALL else (_GPU, int(source.get("args", {}).get("stream", 0)))
        name = _PATH.sub("", str(source["name"]))
        events.append(_event(process, lane, name, began, began + 1e3 * float(source.get("dur", 0.0))))
    return events


def build_trace(lanes: Sequence[Event], first: int, notes: Mapping[str, str]) -> dict[str, Any]:
    """The trace: times from `first` on in microseconds, lanes with names, notes as `otherData`."""
    names = {(_CPU, _STEPS): "steps", (_CPU, _EXPERTS): "routed experts", (_CPU, _CALLS): "calls of the driver"}
    named: list[Event] = [
        {"ph": "M", "pid": pid, "name": "process_name", "args": {"name": name}}
        for pid, name in ((_GPU, "GPU"), (_CPU, "CPU"))
    ]
    for pid, tid in sorted({(event["pid"], event["tid"]) for event in lanes}):
        name = names.get((pid, tid)) or (f"stream {tid}" if tid != _BETWEEN else "between answers and requests")
        named.append({"ph": "M", "pid": pid, "tid": tid, "name": "thread_name", "args": {"name": name}})
    drawn = [event | {"ts": (event["ts"] - first) / 1e3, "dur": event["dur"] / 1e3} for event in lanes]
    drawn.sort(key=lambda event: float(event["ts"]))
    return {"displayTimeUnit": "ms", "otherData": dict(notes), "traceEvents": [*named, *drawn]}


def write_trace(bench: GpuTimedRuns, path: Path, num_steps: int = 4) -> None:
    """Run decode steps without and with the profiler, and write the trace of the latter, or of the former.

    Args:
        bench: of decode.
        path: file to write.
        num_steps: steps to show.

    Raises:
        ExpertTimeoutError: CPU and GPU waited for each other too long, without the profiler.
    """
    plain = bench.timed_steps(num_steps)
    looks: list[tuple[int, int]] = []

    def mark() -> None:
        before = time.perf_counter_ns()
        with record_function(_MARKER):
            pass
        looks.append((before, time.perf_counter_ns()))

    steps, profiled, reason = plain, [], "it saw no kernels"
    try:
        with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
            seen = bench.timed_steps(num_steps, mark)
        profiled = _exported(profiler)
        if any(event.get("cat") == "kernel" for event in profiled):
            steps, reason = seen, "it lost the markers by which clocks are aligned"
    except (ExpertTimeoutError, RuntimeError) as error:
        reason = f"{type(error).__name__}"
    alignment = None if steps is plain else align(looks, profiled)
    first, last = steps[0].began, steps[-1].ended
    if alignment is None:
        steps, first = plain, plain[0].began
        notes = {"GPU": f"drawn from the times of requests and answers; not from PyTorch's profiler: {reason}"}
        lanes = lanes_of_steps(steps, gpu=True)
    else:
        on_gpu = lanes_of_profile(profiled, alignment.offset, first, last)
        lanes = [*lanes_of_steps(steps, gpu=False), *on_gpu]
        notes = {
            "GPU": "kernels as PyTorch's profiler saw them, which makes a step longer",
            "clocks": f"aligned by {len(looks)} markers between looks at the monotonic clock: the GPU's lanes may be "
            f"{alignment.error / 1e3:.1f} us off against the CPU's",
            "check": check_order(on_gpu, steps),
        }
    notes["steps"] = f"median {_median_ms(plain):.3f} ms without the profiler, {_median_ms(steps):.3f} ms as shown"
    write_whole(path, json.dumps(build_trace(lanes, first, notes)))


def check_order(on_gpu: Sequence[Event], steps: Sequence[StepTimes]) -> str:
    """How long after answers the kernels ended that wait for them, which is never before: a check of the clocks."""
    ends = sorted(event["ts"] + event["dur"] for event in on_gpu if event["name"] == _POLL)
    answers = [answered for step in steps for _, answered, _ in step.layers]
    if not answers or len(ends) != len(answers):
        return f"not made: {len(ends)} waiting kernels for {len(answers)} answers"
    late = [(end - answered) / 1e3 for end, answered in zip(ends, answers, strict=True)]
    median = statistics.median(late)
    return f"waiting kernels ended {min(late):.1f} to {max(late):.1f} us after answers, median {median:.1f}"


def _event(pid: int, tid: int, name: str, began: float, ended: float) -> Event:
    """Times are nanoseconds until the trace is built."""
    return {"ph": "X", "pid": pid, "tid": tid, "name": name, "ts": began, "dur": max(0.0, ended - began)}


def _exported(profiler: profile) -> list[Event]:
    with tempfile.TemporaryDirectory(prefix="moesaic-trace-") as folder:
        path = Path(folder) / "profile.json"
        profiler.export_chrome_trace(str(path))
        events: list[Event] = json.loads(path.read_text())["traceEvents"]
    return events


def _median_ms(steps: Sequence[StepTimes]) -> float:
    return statistics.median((step.ended - step.began) / 1e6 for step in steps)
