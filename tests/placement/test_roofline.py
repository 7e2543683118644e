"""The decode speed that bandwidths allow, on plans of a few numbers."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from moesaic.placement import Plan
from moesaic.placement.roofline import HANDOFF_SECONDS, Bandwidths, decode_roofline

GB = 10**9


def entry(module: str, role: str, device: str, read: float) -> SimpleNamespace:
    return SimpleNamespace(module=module, role=role, device=device, bytes_per_token=int(read * GB))


def plan_of(*entries: SimpleNamespace) -> Plan:
    return Plan("test", "Test", entries)  # type: ignore[arg-type]


ON_CPU = plan_of(entry("l.0.mlp.experts", "experts", "cpu", 2), entry("l.0.attn", "attention", "cpu", 3))
HYBRID = plan_of(
    entry("l.0.attn", "attention", "gpu", 30),
    entry("l.0.mlp.experts", "experts", "cpu", 2),
    entry("l.0.mlp.shared.up", "shared_experts", "gpu", 4),
    entry("l.0.mlp.shared.down", "shared_experts", "gpu", 4),
    entry("l.1.mlp.experts", "experts", "cpu", 1),
    entry("l.1.mlp.shared.up", "shared_experts", "gpu", 20),
)


def test_a_plan_on_the_cpu() -> None:
    found = decode_roofline(ON_CPU, Bandwidths(dram=10.0))
    assert found is not None
    assert (found.dram_seconds, found.vram_seconds, found.overlap_seconds) == (0.5, 0.0, 0.0)
    assert found.tokens_per_second == pytest.approx(2.0)
    assert decode_roofline(ON_CPU, Bandwidths(vram=10.0)) is None


def test_only_shared_experts_overlap() -> None:
    found = decode_roofline(HYBRID, Bandwidths(dram=10.0, vram=100.0))
    assert found is not None
    assert found.dram_seconds == pytest.approx(0.3)
    assert found.vram_seconds == pytest.approx(0.58)
    assert found.overlap_seconds == pytest.approx(0.08 + 0.1)  # each layer: the shorter of the two
    assert found.handoff_seconds == 2 * HANDOFF_SECONDS
    assert found.tokens_per_second == pytest.approx(1 / (0.7 + 2e-5))


def test_what_a_cache_holds_is_read_by_the_gpu_meanwhile() -> None:
    found = decode_roofline(HYBRID, Bandwidths(dram=10.0, vram=100.0), hit_rate=0.5)
    assert found is not None
    assert found.dram_seconds == pytest.approx(0.15)
    assert found.vram_seconds == pytest.approx(0.58 + 0.015)
    assert found.overlap_seconds == pytest.approx(0.09 + 0.05)  # 8 GB shared and 1 GB cached; 0.5 GB from DRAM
    split = plan_of(entry("l.0.attn", "attention", "gpu", 30), entry("l.1.mlp.experts", "experts", "cpu", 2))
    assert decode_roofline(split, Bandwidths(10.0, 100.0), 0.5) == decode_roofline(split, Bandwidths(10.0, 100.0))


def test_an_unknown_bandwidth_is_left_out() -> None:
    found = decode_roofline(HYBRID, Bandwidths(dram=10.0))
    assert found is not None
    assert (found.vram_seconds, found.tokens_per_second) == (None, pytest.approx(1 / (0.3 + 2e-5)))
    assert decode_roofline(HYBRID, Bandwidths()) is None
