"""What Prometheus is told, and that nobody's request makes a label."""

from __future__ import annotations

import asyncio
import re
import time

from prometheus_client import CollectorRegistry, Histogram, generate_latest
from prometheus_client.parser import text_string_to_metric_families
from tests.engine.serving.fake_runner import FakeRunner
from tests.server.apps import call, make_app
from tests.server.fakes import ScriptedEngine

from moesaic.engine.serving.async_engine import AsyncEngine
from moesaic.engine.serving.core import Engine
from moesaic.engine.serving.interface import EngineStats
from moesaic.engine.serving.params import SamplingParams
from moesaic.server.metrics import Metrics


def samples(text: str) -> dict[str, float]:
    """Each sample by its name and labels, sorted."""
    return {
        sample.name + "".join(f"|{key}={value}" for key, value in sorted(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def test_requests_by_route_and_status() -> None:
    app = make_app()
    for _ in range(3):
        call(app, "POST", "/whole")
    call(app, "POST", "/broken")
    call(app, "GET", "/whole")
    call(app, "GET", "/a/b?c=1")
    call(app, "PROPFIND", "/d")
    answer = call(app, "GET", "/metrics")
    assert answer.headers["content-type"].startswith("text/plain; version=")
    found = samples(answer.text)
    prefix = "moesaic_requests_total|method="
    assert found[prefix + "POST|route=/whole|status=200"] == 3
    assert found[prefix + "POST|route=/broken|status=500"] == 1
    assert found[prefix + "GET|route=other|status=405"] == 1
    assert found[prefix + "GET|route=other|status=404"] == 1
    assert found[prefix + "other|route=other|status=404"] == 1
    assert found["moesaic_request_seconds_count|route=/whole"] == 3
    assert "/a/b" not in answer.text and "PROPFIND" not in answer.text


class CountingEngine(ScriptedEngine):
    def stats(self) -> EngineStats:
        return EngineStats(3, 4, 100, 60, 30, 1000, 400, 500, 2, (("stop", 7), ("length", 1)), 90, 100)


def test_counts_of_the_engine() -> None:
    found = samples(call(make_app(engine=CountingEngine()), "GET", "/metrics").text)
    expected = {
        "engine_ready": 1,
        "requests_running": 3,
        "requests_waiting": 4,
        "kv_blocks|state=free": 60,
        "kv_blocks|state=cached": 30,
        "kv_blocks|state=used": 10,
        "prompt_tokens_total": 1000,
        "cached_tokens_total": 400,
        "generated_tokens_total": 500,
        "preemptions_total": 2,
        "expert_cache_hits_total": 90,
        "expert_cache_lookups_total": 100,
        "answers_total|reason=stop": 7,
        "answers_total|reason=length": 1,
    }
    assert {name: found[f"moesaic_{name}"] for name in expected} == expected


def test_times_of_tokens() -> None:
    metrics = Metrics()

    async def ask() -> int:
        engine = AsyncEngine(lambda: Engine(FakeRunner(), None), times=metrics)
        engine.start()
        await engine.wait_ready()
        asked = time.perf_counter()
        pieces = [piece async for piece in engine.generate([1], SamplingParams(temperature=0, max_tokens=6, n=2))]
        seconds = time.perf_counter() - asked
        await engine.close()
        found = samples(metrics.text().decode())
        names = ("time_to_first_token", "inter_token")
        sums = [found[f"moesaic_{name}_seconds_sum"] for name in names]
        assert 0 < sums[0] / 2 + sums[1] / 2 <= seconds + 1e-3  # of two answers side by side
        assert [found[f"moesaic_{name}_seconds_count"] for name in names] == [2, 10]
        return len(pieces)

    assert asyncio.run(ask()) == 12


def test_times_are_in_the_buckets_that_prometheus_would_choose() -> None:
    metrics, oracle = Metrics(), CollectorRegistry()
    bounds = [float(each) for each in re.findall(r'moesaic_inter_token_seconds_bucket{le="([0-9.]+)"}', text(metrics))]
    histogram = Histogram("moesaic_inter_token_seconds", "x", buckets=bounds, registry=oracle)
    assert len(bounds) == 15
    for seconds in (0.0, 0.001, 0.002, 0.0020001, 0.03, 0.4, 5.0, 5.1, 100.0):
        metrics.next_token(seconds)
        histogram.observe(seconds)

    def lines(of: str) -> list[str]:
        return [line for line in of.splitlines() if line.startswith("moesaic_inter") and "_created" not in line]

    assert lines(text(metrics)) == lines(generate_latest(oracle).decode())


def text(metrics: Metrics) -> str:
    return metrics.text().decode()


def test_applications_share_no_counts() -> None:
    first = make_app()
    call(first, "POST", "/whole")
    assert not re.search('route="/whole"', call(make_app(), "GET", "/metrics").text)
