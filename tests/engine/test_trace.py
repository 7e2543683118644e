"""Traces of decode steps: lanes from known times, and clocks aligned by a real profile."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from torch.profiler import ProfilerActivity, profile, record_function

from moesaic.engine.bench_checks import check_trace
from moesaic.engine.gpu import trace
from moesaic.engine.gpu.timed_runs import StepTimes
from moesaic.errors import ConfigError, ExpertTimeoutError
from moesaic.placement import Plan

STEPS = [
    StepTimes(1_000_000, 1_900_000, ((1_100_000, 1_300_000, 1_300_000), (1_450_000, 1_800_000, 1_800_000))),
    StepTimes(2_000_000, 2_700_000, ((2_100_000, 2_200_000, 2_280_000), (2_300_000, 2_600_000, 2_600_000))),
]


def kernel(name: str, ts: float, dur: float, category: str = "kernel", **arguments: Any) -> dict[str, Any]:
    return {"ph": "X", "cat": category, "name": name, "ts": ts, "dur": dur, "pid": 0, "tid": 7, "args": arguments}


def marker(ts: float, dur: float) -> dict[str, Any]:
    return kernel("moesaic.clock", ts, dur, "user_annotation")


def drawn(built: dict[str, Any], pid: int, tid: int) -> list[tuple[str, float, float]]:
    return [
        (event["name"], event["ts"], event["dur"])
        for event in built["traceEvents"]
        if event["ph"] == "X" and (event["pid"], event["tid"]) == (pid, tid)
    ]


def test_lanes_without_a_profiler() -> None:
    built = trace.build_trace(trace.lanes_of_steps(STEPS[:1], gpu=True), 1_000_000, {"note": "text"})
    assert drawn(built, 2, 1) == [("step 0", 0.0, 900.0)]
    assert drawn(built, 2, 2) == [("experts of layer 0", 100.0, 200.0), ("experts of layer 1", 450.0, 350.0)]
    gpu = [
        ("until layer 0 asks", 0.0, 100.0),
        ("until layer 1 asks", 300.0, 150.0),
        ("after the last answer", 800.0, 100.0),
    ]
    assert drawn(built, 1, 0) == gpu
    assert built["otherData"] == {"note": "text"}
    names = {e["args"]["name"] for e in built["traceEvents"] if e["ph"] == "M"}
    assert names == {"GPU", "CPU", "steps", "routed experts", "between answers and requests"}


def test_experts_that_come_a_layer_late_are_drawn_behind_the_answer() -> None:
    built = trace.build_trace(trace.lanes_of_steps(STEPS[1:], gpu=True), 2_000_000, {})
    assert drawn(built, 2, 2) == [
        ("experts of layer 0", 100.0, 100.0),
        ("deferred experts of layer 0", 200.0, 80.0),
        ("experts of layer 1", 300.0, 300.0),
    ]
    assert ("until layer 1 asks", 200.0, 100.0) in drawn(built, 1, 0)


def test_a_model_that_is_all_on_the_gpu_has_no_experts_to_draw() -> None:
    lanes = trace.lanes_of_steps([StepTimes(0, 10_000, ())], gpu=True)
    assert [(event["name"], event["dur"]) for event in lanes] == [("step 0", 10_000), ("after the last answer", 10_000)]


def test_clocks_are_aligned_by_the_shortest_look() -> None:
    # The monotonic clock is 5 ms ahead. The first look took 40 us, and its marker was 2 us before the middle of it.
    looks = [(6_000_000, 6_040_000), (7_000_000, 7_002_000), (8_000_000, 8_020_000)]
    markers = [marker(1017.0, 2.0), marker(2000.5, 1.0), marker(3009.5, 1.0)]
    found = trace.align(looks, [kernel("_wait", 1500.0, 3.0), *reversed(markers)])
    assert found is not None
    assert found.offset == 5_000_000
    assert found.error == 1_000 + 2_000


def test_drift_of_the_clocks_is_part_of_the_error() -> None:
    looks = [(1_000_000, 1_002_000), (2_000_000, 2_002_000)]
    found = trace.align(looks, [marker(0.5, 1.0), marker(1003.5, 1.0)])
    assert found is not None and found.error == 1_000 + 3_000


def test_markers_that_are_missing_align_nothing() -> None:
    assert trace.align([(0, 1)], []) is None
    assert trace.align([(0, 1), (2, 3)], [marker(0, 1)]) is None
    assert trace.align([(0, 1)], [kernel("moesaic.clock", 0, 1, "gpu_user_annotation")]) is None


def test_a_real_profile_is_aligned() -> None:
    looks = []
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        for _ in range(3):
            before = time.perf_counter_ns()
            with record_function("moesaic.clock"):
                pass
            looks.append((before, time.perf_counter_ns()))
        began = time.perf_counter_ns()
        with record_function("something"):
            time.sleep(0.05)
        ended = time.perf_counter_ns()
    profiled = trace._exported(profiler)
    found = trace.align(looks, profiled)
    assert found is not None
    (event,) = [event for event in profiled if event["name"] == "something" and event["ph"] == "X"]
    start = 1e3 * event["ts"] + found.offset
    slack = found.error + 2_000_000  # somebody else may have the processor between a look and an event
    assert began - slack <= start <= began + slack
    assert abs(start + 1e3 * event["dur"] - ended) <= slack


def test_only_kernels_copies_and_calls_are_kept_and_no_path() -> None:
    profiled = [
        kernel("_hand_off", 1100.0, 5.0, stream=7),
        kernel("Memcpy HtoD", 1200.0, 5.0, "gpu_memcpy", stream=13),
        kernel("void f</home/somebody/src/kernel.cu:12>()", 1300.0, 5.0, stream=7),
        kernel("cudaGraphLaunch", 1050.0, 20.0, "cuda_runtime"),
        kernel("aten::add", 1060.0, 20.0, "cpu_op"),
        kernel("/usr/lib/python3/x.py(3): f", 1060.0, 20.0, "python_function"),
        kernel("late", 9000.0, 5.0, stream=7),
        {"ph": "M", "name": "process_name", "args": {"name": "/usr/bin/python"}},
    ]
    lanes = trace.lanes_of_profile(profiled, 0.0, 1_000_000, 2_700_000)
    found = [(event["pid"], event["tid"], event["name"]) for event in lanes]
    expected = [
        (1, 7, "_hand_off"),
        (1, 13, "Memcpy HtoD"),
        (1, 7, "void f<kernel.cu:12>()"),
        (2, 3, "cudaGraphLaunch"),
    ]
    assert found == expected


def test_the_order_of_answers_and_waiting_kernels_is_checked() -> None:
    answers = [answered for step in STEPS for _, answered, _ in step.layers]
    lanes = trace.lanes_of_profile([kernel("_wait", a / 1e3 - 10, 12.0) for a in answers], 0.0, 0, 10**7)
    assert "2.0 to 2.0 us after answers" in trace.check_order(lanes, STEPS)
    assert trace.check_order(lanes[1:], STEPS).startswith("not made: 3 waiting kernels for 4 answers")


class FakeBench:
    """Steps of no model."""

    def __init__(self, fails: bool = False) -> None:
        self._fails = fails

    def timed_steps(self, count: int, before_step: Callable[[], None] | None = None) -> list[StepTimes]:
        if before_step is not None and self._fails:
            raise ExpertTimeoutError("too slow")
        steps = []
        for _ in range(count):
            if before_step is not None:
                before_step()
            began = time.perf_counter_ns()
            torch.ones(10).sum()
            steps.append(StepTimes(began, began + 900_000, ((began + 100_000, began + 300_000, began + 300_000),)))
        return steps


@pytest.mark.parametrize(("fails", "reason"), [(False, "it saw no kernels"), (True, "ExpertTimeoutError")])
@pytest.mark.filterwarnings("ignore:CUDA is not available")
def test_a_trace_is_written_without_a_gpu_to_profile(tmp_path: Path, fails: bool, reason: str) -> None:
    path = tmp_path / "trace.json"
    trace.write_trace(FakeBench(fails), path, num_steps=2)  # type: ignore[arg-type]
    text = path.read_text()
    built = json.loads(text)
    assert [name for name, _, _ in drawn(built, 2, 1)] == ["step 0", "step 1"]
    assert drawn(built, 2, 1)[0][1] == 0
    assert len(drawn(built, 1, 0)) == 4
    assert built["otherData"]["GPU"].endswith(reason)
    assert not re.search(r"/(?:home|work|usr|tmp|root)\b", text)


def test_a_trace_of_something_else_is_refused(tmp_path: Path) -> None:
    plan = Plan("cpu", "Model", ())
    check_trace(None, "prefill", plan)
    with pytest.raises(ConfigError, match="bench decode"):
        check_trace(tmp_path / "x.json", "prefill", plan)
    with pytest.raises(ConfigError, match="nothing on a GPU"):
        check_trace(tmp_path / "x.json", "decode", plan)
