"""Which weights are held in another form than their file's, and when they are not."""

from __future__ import annotations

import dataclasses

import pytest

from moesaic.placement import Hardware, Placement, Plan, forms
from moesaic.placement.forms import choose_forms
from moesaic.placement.hardware import NumaNode
from moesaic.placement.plan import Device

GIB = 1024**3
AS_FILE, RECODED = 50 * GIB, 58 * GIB


def experts(name: str, fmt: str, nbytes: int, device: Device = "cpu") -> Placement:
    return Placement(name, "experts", "Experts", "moesaic", device, {"gate": fmt, "down": fmt}, nbytes, nbytes // 10)


def plan_of(*entries: Placement) -> Plan:
    return Plan("auto.yaml", "Model", entries)


@pytest.fixture(autouse=True)
def _usual_instructions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(forms, "active_isa", lambda: "avx2")
    monkeypatch.setattr(forms, "binds_memory", lambda: False)


@pytest.fixture
def plan() -> Plan:
    return plan_of(
        experts("a", "IQ1_S", AS_FILE), experts("b", "Q4_K", GIB), experts("on_gpu", "IQ1_S", AS_FILE, device="gpu")
    )


@pytest.fixture
def other_forms() -> dict[str, Placement]:
    return {name: experts(name, "IQ1_S_TERNARY", RECODED) for name in ("a", "on_gpu")}


def with_available(hardware: Hardware, nbytes: int) -> Hardware:
    return dataclasses.replace(hardware, dram_total=2 * nbytes, dram_available=nbytes)


def test_auto_takes_what_fits_with_some_to_spare(
    plan: Plan, other_forms: dict[str, Placement], hardware: Hardware
) -> None:
    needed = dataclasses.replace(plan, entries=(other_forms["a"], *plan.entries[1:])).required_bytes()
    chosen = choose_forms(plan, other_forms, "auto", with_available(hardware, round(needed / 0.9) + 1))
    assert chosen.of("a") == other_forms["a"] and chosen.of("b") == plan.of("b")
    assert chosen.of("on_gpu") == plan.of("on_gpu")
    assert chosen.nbytes_on("cpu") == plan.nbytes_on("cpu") + RECODED - AS_FILE
    assert chosen.bytes_per_token == plan.bytes_per_token + RECODED // 10 - AS_FILE // 10
    (note,) = chosen.notes
    assert note.startswith("IQ1_S is held as ternary digits, which takes 8.00 GiB more")
    assert f"note: {note}" in chosen.table() and note in chosen.to_json()
    tight = choose_forms(plan, other_forms, "auto", with_available(hardware, round(needed / 0.9) - 1))
    assert tight.entries == plan.entries
    (note,) = tight.notes
    assert note.startswith(
        "IQ1_S is held as in the file: with ternary digits the plan would take 109.50 GiB, more than"
    )


def test_always_and_never(plan: Plan, other_forms: dict[str, Placement], hardware: Hardware) -> None:
    tiny = with_available(hardware, GIB)
    assert choose_forms(plan, other_forms, "always", tiny).of("a") == other_forms["a"]
    assert choose_forms(plan, other_forms, "never", with_available(hardware, 1000 * GIB)) is plan


def test_nothing_to_choose_is_no_note(plan: Plan, other_forms: dict[str, Placement], hardware: Hardware) -> None:
    assert choose_forms(plan, {}, "always", hardware) is plan
    on_gpu = plan_of(plan.of("on_gpu"))
    assert choose_forms(on_gpu, other_forms, "always", hardware) is on_gpu


def test_both_formats_are_named(hardware: Hardware) -> None:
    plan = plan_of(experts("a", "IQ1_S", 50), experts("b", "IQ1_M", 56))
    other = {"a": experts("a", "IQ1_S_TERNARY", 58), "b": experts("b", "IQ1_M_TERNARY", 64)}
    assert choose_forms(plan, other, "auto", hardware).notes[0].startswith("IQ1_M and IQ1_S are held as")


def test_not_where_it_is_no_faster_or_a_node_is_too_small(
    plan: Plan, other_forms: dict[str, Placement], hardware: Hardware, monkeypatch: pytest.MonkeyPatch
) -> None:
    large = with_available(hardware, 1000 * GIB)
    with monkeypatch.context() as patch:
        patch.setattr(forms, "active_isa", lambda: "generic")
        assert "portable code" in choose_forms(plan, other_forms, "auto", large).notes[0]
        assert choose_forms(plan, other_forms, "always", large).of("a") == other_forms["a"]
    nodes = tuple(NumaNode(number, (number,), 29 * GIB) for number in (0, 1))  # enough for 51 GiB, not for 59
    monkeypatch.setattr(forms, "binds_memory", lambda: True)
    chosen = choose_forms(plan, other_forms, "auto", dataclasses.replace(large, numa_nodes=nodes))
    assert chosen.entries == plan.entries and "a memory node would not hold its share" in chosen.notes[0]
