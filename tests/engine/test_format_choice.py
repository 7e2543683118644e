"""Formats of a quantised file's tensors, by role, rule and row length."""

from __future__ import annotations

import pytest

from moesaic.engine.format_choice import choose_format
from moesaic.placement.rules import DEFAULT_RULE, parse_rules
from moesaic.quant import get_format

BF16 = get_format("BF16")


def chosen(role: str, shape: tuple[int, ...], wanted: str, projection: str = "weight") -> str:
    return choose_format(role, projection, shape, BF16, get_format(wanted), DEFAULT_RULE).format.name


@pytest.mark.parametrize(
    ("role", "shape", "projection", "wanted", "expected"),
    [
        ("experts", (8, 512, 256), "gate", "Q4_K", "Q4_K"),
        ("attention", (512, 256), "weight", "Q2_K", "Q2_K"),
        ("mlp", (512, 256), "weight", "BF16", "BF16"),
        # small and decisive: never quantised
        ("norm", (256,), "weight", "Q4_K", "F32"),
        ("router", (64, 256), "weight", "Q4_K", "F32"),
        ("router", (64, 256), "weight", "BF16", "F32"),
        ("attention", (256,), "bias", "Q4_K", "F32"),
        ("experts", (8, 512), "gate_bias", "Q4_K", "F32"),
        ("attention", (512, 4), "weight", "Q8_0", "F32"),  # a convolution over four steps
        ("shared_experts", (1, 256), "weight", "Q4_K", "F32"),  # a gate of one row
        # every token passes them
        ("embedding", (1000, 256), "weight", "Q4_K", "Q6_K"),
        ("lm_head", (1000, 256), "weight", "Q2_K", "Q6_K"),
        ("lm_head", (1000, 256), "weight", "Q8_0", "Q8_0"),
        ("embedding", (1000, 256), "weight", "F16", "F16"),
    ],
)
def test_choice_by_role(role: str, shape: tuple[int, ...], projection: str, wanted: str, expected: str) -> None:
    assert chosen(role, shape, wanted, projection) == expected


@pytest.mark.parametrize(
    ("role", "cols", "wanted", "expected"),
    [
        ("mlp", 288, "Q2_K", "Q4_0"),
        ("mlp", 288, "Q3_K", "Q4_0"),
        ("experts", 288, "Q4_K", "Q5_0"),
        ("mlp", 288, "Q5_K", "Q5_1"),
        ("mlp", 288, "Q6_K", "Q8_0"),
        ("mlp", 288, "IQ4_XS", "IQ4_NL"),
        ("embedding", 288, "Q4_K", "Q8_0"),
        ("attention", 128, "Q4_K", "Q8_0"),  # MLA's k_b
        ("mlp", 100, "Q4_K", "F16"),
        ("attention", 100, "Q8_0", "F16"),
    ],
)
def test_rows_that_are_no_whole_number_of_blocks(role: str, cols: int, wanted: str, expected: str) -> None:
    choice = choose_format(role, "weight", (64, cols), BF16, get_format(wanted), DEFAULT_RULE)
    assert choice.format.name == expected
    assert choice.note is not None
    assert f"rows of {cols} weights" in choice.note
    assert f"{expected} instead of" in choice.note


def test_rules_win_over_roles_but_not_over_vectors() -> None:
    text = """
rules:
  - match: {role: [lm_head, norm, attention]}
    format: Q4_0
  - match: {role: experts}
    format: {gate: keep, up: Q5_K, down: Q6_K}
"""
    by_role, experts = parse_rules(text, "rules.yaml").rules
    q4_k = get_format("Q4_K")
    assert choose_format("lm_head", "weight", (1000, 256), BF16, q4_k, by_role).format.name == "Q4_0"
    assert choose_format("norm", "weight", (256,), BF16, q4_k, by_role).format.name == "F32"
    assert choose_format("attention", "bias", (256,), BF16, q4_k, by_role).format.name == "F32"
    formats = [choose_format("experts", key, (8, 512, 256), BF16, q4_k, experts) for key in ("gate", "up", "down")]
    assert [choice.format.name for choice in formats] == ["BF16", "Q5_K", "Q6_K"]
    unfit = choose_format("experts", "down", (8, 512, 288), BF16, q4_k, experts)
    assert unfit.format.name == "Q8_0"
    assert unfit.note is not None
