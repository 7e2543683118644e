"""The estimate of decode speed: what a plan is taken apart into, and the arithmetic on injected measurements."""

from __future__ import annotations

import dataclasses
from collections import Counter
from types import SimpleNamespace

import pytest

from moesaic.engine import estimate
from moesaic.engine.bench import prepare_synthetic
from moesaic.engine.decode_probe import Overhead, Probe, measure_overhead
from moesaic.engine.decode_work import DecodeWork, ExpertLayer, Matrix, decode_work
from moesaic.engine.loader import prepare
from moesaic.placement import Plan
from moesaic.quant import get_format

Q4_K, F32 = get_format("Q4_K"), get_format("F32")


@dataclasses.dataclass
class Fixed:
    """Products whose times are known."""

    seconds: tuple[float, float, float]

    def products(self, work: DecodeWork) -> tuple[float, float, float]:
        return self.seconds


def test_a_preset_is_taken_apart() -> None:
    work = decode_work(prepare_synthetic("qwen3-30b-a3b", Q4_K, 3, "cpu"))
    layer = ExpertLayer(Q4_K, Q4_K, Q4_K, hidden=2048, intermediate=768, num_experts=128, top_k=8)
    assert work.experts == {layer: 3}
    attention = [Matrix(Q4_K, 4096, 2048), Matrix(Q4_K, 512, 2048), Matrix(Q4_K, 512, 2048), Matrix(Q4_K, 2048, 4096)]
    assert list(work.layers.values()) == [3]
    (group,) = work.layers
    assert Counter(group) == Counter([*attention, Matrix(F32, 128, 2048)])
    assert work.outside == (Matrix(Q4_K, 151936, 2048),)
    assert (work.num_layers, work.vocab_size) == (3, 151936)
    # 4.5 bits a weight; norms are the few bytes that are left
    assert layer.expert_bytes == 3 * 2048 * 768 * 4.5 / 8
    assert work.expert_bytes == 3 * 8 * layer.expert_bytes
    products = work.expert_bytes + 3 * sum(matrix.nbytes for matrix in group) + work.outside[0].nbytes
    assert 0 <= work.bytes_per_token - products < 100_000


def test_latent_attention_counts_every_head() -> None:
    prepared = prepare("demo", plan="cpu", offline=True)
    work = decode_work(prepared)
    prepared.checkpoint.close()
    assert work.num_layers == sum(work.layers.values()) == 6
    assert sum(work.experts.values()) == 5  # the first layer is dense
    matrices = sum(count * sum(matrix.nbytes for matrix in group) for group, count in work.layers.items())
    products = work.expert_bytes + matrices + sum(matrix.nbytes for matrix in work.outside)
    assert 0.98 * work.bytes_per_token < products <= work.bytes_per_token


def test_the_parts_add_up() -> None:
    work = DecodeWork(Counter(), Counter(), (), 4, 1000, 3_000_000, 5_000_000)
    parts = estimate.divide(work, Fixed((0.0003, 0.0001, 0.0003)), Overhead(20e-6, 120e-6), 20.0)
    assert [part.name for part in parts] == ["experts", "attention and others", "overhead"]
    assert [part.bytes_per_token for part in parts] == [3_000_000, 2_000_000, 0]
    assert [part.seconds for part in parts] == pytest.approx([0.0003, 0.0004, 0.0002])
    assert [part.gigabytes_per_second for part in parts] == [pytest.approx(10.0), pytest.approx(5.0), None]
    assert [part.bandwidth_share for part in parts] == [pytest.approx(0.5), pytest.approx(0.25), None]


def test_the_estimate_of_a_preset(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(estimate, "Probe", lambda cold_bytes, seconds: Fixed((0.004, 0.003, 0.002)))
    monkeypatch.setattr(estimate, "measure_overhead", lambda vocab_size, seconds: Overhead(0.0004, 0.0002))
    found = estimate.estimate_decode(10.0, preset="qwen3-30b-a3b", weight_format="q2_k", num_layers=2)
    assert found.tokens_per_second == pytest.approx(100.0)  # 4 + 3 + 2 + 2 * 0.4 + 0.2 ms
    assert (found.model, found.weight_format) == ("qwen3-30b-a3b", "Q2_K")
    assert (found.num_layers, found.total_layers) == (2, 48)
    assert sum(part.bytes_per_token for part in found.parts) == found.bytes_per_token


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


@pytest.mark.parametrize("cold_bytes", [0, 1 << 21])
@pytest.mark.parametrize("gate", [None, Q4_K])
def test_products_are_measured_warm_and_cold(cold_bytes: int, gate: object) -> None:
    layer = ExpertLayer(gate, Q4_K, get_format("Q6_K"), 256, 256, num_experts=4, top_k=3)  # type: ignore[arg-type]
    group = (Matrix(Q4_K, 100, 256), Matrix(F32, 16, 256), Matrix(Q4_K, 256, 512))
    work = DecodeWork(Counter({layer: 2}), Counter({group: 2}), (), 2, 10, 1, 2)
    experts, others, outside = Probe(cold_bytes, 0.01).products(work)
    assert experts > 0
    assert others > 0
    assert outside == 0


def test_the_overhead_is_no_negative_time() -> None:
    overhead = measure_overhead(1000, 0.01)
    assert overhead.per_layer >= 0
    assert overhead.per_token >= 0
