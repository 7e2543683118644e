"""What Prometheus is told, and that nobody's request makes a label."""

from __future__ import annotations

import asyncio
import re
from typing import cast

from prometheus_client.parser import text_string_to_metric_families
from tests.server.apps import call, make_app
from tests.server.fakes import ScriptedEngine

from moesaic.engine.serving.interface import EngineClient, EngineStats
from moesaic.engine.serving.params import SamplingParams
from moesaic.server.metrics import Metrics, ObservedEngine


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
    engine = ObservedEngine(cast(EngineClient, ScriptedEngine(words=["a", "b", "c"], delay=0.03)), metrics)

    async def ask() -> int:
        return len([chunk async for chunk in engine.generate([1], SamplingParams(n=2))])

    assert asyncio.run(ask()) == 6
    found = samples(metrics.text().decode())
    assert found["moesaic_time_to_first_token_seconds_count"] == 2
    assert 0.09 <= found["moesaic_time_to_first_token_seconds_sum"] < 0.2  # 0.03 of the first, 0.06 of the second
    assert found["moesaic_inter_token_seconds_count"] == 4
    assert 0.24 <= found["moesaic_inter_token_seconds_sum"] < 0.5


def test_an_observed_engine_is_cancelled_as_any() -> None:
    script = ScriptedEngine(words=["a"] * 10)
    engine = ObservedEngine(cast(EngineClient, script), Metrics())

    async def leave() -> None:
        pieces = engine.generate([1], SamplingParams())
        await anext(pieces)
        await pieces.aclose()  # type: ignore[attr-defined]

    asyncio.run(leave())
    assert script.cancelled == 1


def test_applications_share_no_counts() -> None:
    first = make_app()
    call(first, "POST", "/whole")
    assert not re.search('route="/whole"', call(make_app(), "GET", "/metrics").text)
