"""The estimate of decode speed: the arithmetic on injected measurements, and a measurement of a small model."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace

import pytest

from moesaic.engine import estimate
from moesaic.engine.estimate import DecodeTime
from moesaic.engine.loader import prepare
from moesaic.engine.subjects import prepare_synthetic
from moesaic.placement import Hardware, Plan, detect_hardware
from moesaic.quant import get_format


def test_layers_are_scaled_by_their_bytes() -> None:
    plan = prepare_synthetic("qwen3-30b-a3b", get_format("Q4_K"), 3, "cpu").plan
    in_layers = sum(entry.bytes_per_token for entry in plan.entries if entry.module.startswith("model.layers."))
    time = DecodeTime(2, in_layers // 3 * 2, in_layers, 0.004, 0.002)
    layers, rest = estimate.divide(plan, time, 20.0)
    assert (layers.name, layers.bytes_per_token, layers.seconds) == ("layers", in_layers, pytest.approx(0.006))
    assert (rest.name, rest.seconds) == ("head and others", 0.002)
    assert rest.bytes_per_token == plan.bytes_per_token - in_layers
    for part in (layers, rest):
        assert part.gigabytes_per_second == pytest.approx(part.bytes_per_token / part.seconds / 1e9)
        assert part.bandwidth_share == pytest.approx(part.gigabytes_per_second / 20.0)


def test_the_estimate_of_a_preset(monkeypatch: pytest.MonkeyPatch) -> None:
    def measured(prepared: object, hardware: Hardware, *, progress: object) -> DecodeTime:
        return DecodeTime(1, 20_000_000, 40_000_000, 0.004, 0.002)

    monkeypatch.setattr(estimate, "measure_decode", measured)
    found = estimate.estimate_decode(10.0, preset="qwen3-30b-a3b", weight_format="q2_k", num_layers=2)
    assert found.tokens_per_second == pytest.approx(100.0)  # 2 * 4 + 2 ms
    assert (found.model, found.weight_format) == ("qwen3-30b-a3b", "Q2_K")
    assert (found.num_layers, found.total_layers, found.sampled_layers) == (2, 48, 1)
    assert sum(part.bytes_per_token for part in found.parts) == found.bytes_per_token


@pytest.mark.parametrize(("cache", "sampled"), [(1 << 12, 1), (1 << 19, 2), (1 << 30, 6)])
def test_as_many_layers_run_as_the_caches_ask_for(cache: int, sampled: int) -> None:
    prepared = prepare("demo", plan="cpu", offline=True)
    prepared.checkpoint.close()
    hardware = dataclasses.replace(detect_hardware(), last_level_cache=cache)
    time = estimate.measure_decode(prepared, hardware, runs=1)
    assert time.sampled_layers == sampled
    in_layers = sum(entry.bytes_per_token for entry in prepared.plan.entries if ".layers." in entry.module)
    assert time.all_bytes == in_layers
    assert (time.sampled_bytes == in_layers) == (sampled == 6)
    assert time.in_layers > 0
    assert time.outside > 0


@pytest.mark.parametrize(
    ("isa", "formats", "tiles", "decode", "prefill"),
    [
        ("avx2", {"up": "Q4_K"}, None, "AVX2, dot products of int8", "AVX2, dot products of int8"),
        ("generic", {"up": "BF16"}, None, "portable code, multiply-adds of float32", "portable code, multiply-adds"),
        ("neon", {"up": "Q4_K"}, None, "neon, dot products of int8", "neon, dot products of int8"),
        (
            "amx",
            {"up": "Q4_K"},
            24,
            "AVX-512 VNNI, dot products of int8",
            "AMX, tiles of bfloat16 from 24 tokens of an expert on, below that AVX-512 VNNI, dot products of int8",
        ),
        (
            "avx512",
            {"up": "Q4_K", "down": "F16"},
            None,
            "F16: AVX-512, multiply-adds of float32; Q4_K: AVX-512 VNNI, dot products of int8",
            "F16: AVX-512, multiply-adds of float32; Q4_K",
        ),
    ],
)
def test_the_fastest_paths_in_words(
    isa: str, formats: dict[str, str], tiles: int | None, decode: str, prefill: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(estimate, "active_isa", lambda: isa)
    monkeypatch.setattr(estimate, "tiles_from", lambda ggml_type: tiles)
    entry = SimpleNamespace(role="experts", formats=formats)
    found = estimate.fastest_paths(Plan("test", "Test", (entry,)))  # type: ignore[arg-type]
    assert found[0] == decode
    assert found[1].startswith(prefill)
