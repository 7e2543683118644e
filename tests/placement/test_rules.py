"""Placement files: what they mean, and that every defect is told with its file and line."""

from __future__ import annotations

from pathlib import Path

import pytest

from moesaic.errors import PlanError, RuleError
from moesaic.placement import TEMPLATES, load_plan
from moesaic.placement.rules import DEFAULT_RULE, parse_rules

GOOD = """\
description: a test
rules:
  - match: {name: "model.layers.3.*"}
    implementation: transformers
  - match:
      role: [attention, shared_experts]
    format: q8_0
  - match: {role: experts, class: "Qwen3*"}
    device: cpu
    format: {down: Q6_K, gate: keep}
  - match: {name: 're:.*\\.(q|k)_norm'}
    implementation: moesaic
"""


def test_first_match_wins_and_every_key_must_match() -> None:
    rules = parse_rules(GOOD, "test.yaml")
    assert rules.description == "a test"
    third = rules.find("model.layers.3.self_attn.q_proj", "attention", "Linear")
    assert (third.line, third.implementation) == (3, "transformers")
    attention = rules.find("model.layers.30.self_attn.q_proj", "attention", "Linear")
    assert (attention.line, attention.implementation, attention.format_of("q")) == (5, None, "Q8_0")
    experts = rules.find("model.layers.4.mlp.experts", "experts", "Qwen3MoeExperts")
    assert (experts.line, experts.device) == (8, "cpu")
    assert [experts.format_of(key) for key in ("gate", "up", "down")] == ["keep", "keep", "Q6_K"]
    assert rules.find("model.layers.4.mlp.experts", "experts", "MixtralExperts") is DEFAULT_RULE
    assert rules.find("model.layers.4.self_attn.q_norm", "norm", "RMSNorm").line == 11
    assert rules.find("model.layers.4.self_attn.q_norm.x", "norm", "RMSNorm") is DEFAULT_RULE


@pytest.mark.parametrize("name", TEMPLATES)
def test_templates_load_and_match_everything(name: str) -> None:
    rules = load_plan(name)
    assert rules.description
    assert rules.find("model.anything", "other", "Thing") is not DEFAULT_RULE


def test_devices_in_all_their_spellings() -> None:
    for word in ("gpu", "gpu:0", "cuda", "cuda:0", "hip:0", "rocm"):
        (rule,) = parse_rules(f"rules:\n  - match: {{role: mlp}}\n    device: {word}", "test.yaml").rules
        assert rule.device == "gpu"


@pytest.mark.parametrize(
    ("text", "may", "needs"),
    [
        ("cpu", False, False),
        ("auto", True, False),
        ("hybrid", True, True),
        ("layers", True, True),
        ("gpu", True, True),
        ("rules:\n  - match: {role: mlp}\n    device: cpu", True, False),
        ("strategy: cpu\nrules:\n  - match: {role: mlp}\n    device: cpu", False, False),
        ("strategy: hybrid\nrules:\n  - match: {role: mlp}\n    format: keep", True, True),
        ("strategy: hybrid\nrules:\n  - match: {name: '*'}\n    device: cpu", False, False),
    ],
)
def test_who_needs_a_gpu(text: str, may: bool, needs: bool) -> None:
    rules = load_plan(text) if text in TEMPLATES else parse_rules(text, "test.yaml")
    assert (rules.may_use_gpu, rules.needs_gpu) == (may, needs)
    assert rules.name == (text if text in TEMPLATES else "test.yaml")


def test_a_file_is_read(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(GOOD)
    assert len(load_plan(path).rules) == len(load_plan(str(path)).rules) == 4


@pytest.mark.parametrize(
    ("text", "line", "words"),
    [
        ("", 1, "empty"),
        ("rules: [", 1, "not valid YAML"),
        ("- match: {role: experts}", 1, "expected a mapping with description, strategy, ternary or rules"),
        ("description: x", 1, "no 'rules'"),
        ("rules: {}", 1, "expected a list"),
        ("rules:\n  - match: {role: expert}\n    format: keep", 2, "Did you mean 'experts'?"),
        ("rules:\n  - match: {role: experts}\n    formt: keep", 3, "Did you mean 'format'?"),
        ("rules:\n  - match: {roles: experts}\n    format: keep", 2, "Did you mean 'role'?"),
        ("rules:\n  - match: {role: experts}\n    format: Q4_KM", 3, "Did you mean 'Q4_K'?"),
        ("rules:\n  - match: {role: experts}\n    format: IQ1_S_TERNARY", 3, "'ternary' chooses: write 'keep'"),
        ("ternary: yes\nrules:\n  - match: {role: experts}\n    format: keep", 1, "expected auto, always or never"),
        ("rules:\n  - match: {role: experts}\n    format: {gat: Q4_K}", 3, "Did you mean 'gate'?"),
        ("rules:\n  - match: {role: experts}\n    format: {}", 3, "'format' is empty"),
        ("rules:\n  - match: {role: experts}\n    device: cuda:1", 3, "one GPU is used, number 0: write 'gpu'"),
        ("rules:\n  - match: {role: experts}\n    device: xpu", 3, "expected auto, cpu or gpu"),
        ("strategy: hybird\nrules:\n  - match: {role: experts}\n    format: keep", 1, "Did you mean 'hybrid'?"),
        ("rules:\n  - match: {role: experts}\n    format: keep\nstrategy: [auto]", 4, "strategy is a list"),
        ("rules:\n  - match: {role: experts}\n    device: disk", 3, "unknown device 'disk'"),
        ("rules:\n  - match: {role: experts}\n    implementation: mosaic", 3, "Did you mean 'moesaic'?"),
        ("rules:\n  - match: {role: experts}\n", 2, "only matches"),
        ("rules:\n  - match: {}\n    format: keep", 2, "'match' is empty"),
        ("rules:\n  - format: keep", 2, "no 'match'"),
        ("rules:\n  - match: {name: 're:('}\n    format: keep", 2, "not a regular expression"),
        ("rules:\n  - match: {name: [[a]]}\n    format: keep", 2, "a list: expected a word"),
        ("rules:\n  - match: {role: experts}\n    format: keep\n    format: keep", 4, "given twice"),
        ("rules:\n  - match: {role: mlp}\n    implementation: transformers\n    format: Q4_K", 4, "leave 'format' out"),
        ("rules: !!python/object/apply:os.system ['true']", 1, "a rule is 'true'"),  # never built
    ],
)
def test_a_defect_names_file_and_line(text: str, line: int, words: str) -> None:
    with pytest.raises(RuleError) as caught:
        parse_rules(text, "plan.yaml")
    assert (caught.value.file, caught.value.line) == ("plan.yaml", line)
    assert str(caught.value).startswith(f"plan.yaml:{line}: ")
    assert words in str(caught.value)


def test_hostile_files_end_in_one_error(tmp_path: Path) -> None:
    with pytest.raises(RuleError, match="not valid YAML"):
        parse_rules("[" * 100_000, "deep.yaml")
    with pytest.raises(RuleError, match="a rule is a list"):
        parse_rules("rules: [&a [x], &b [*a, *a, *a], &c [*b, *b, *b]]", "laughs.yaml")
    big = tmp_path / "big.yaml"
    big.write_bytes(b"#" * (1 << 20) + b"\nrules: []")
    with pytest.raises(RuleError, match="at most 1 MiB"):
        load_plan(big)
    binary = tmp_path / "binary.yaml"
    binary.write_bytes(b"\xff\xfe\x00rules")
    with pytest.raises(RuleError, match="not UTF-8"):
        load_plan(binary)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("hybird", "Did you mean 'hybrid'?"),
        ("atuo", "Did you mean 'auto'?"),
        ("nowhere.yaml", "no such placement file"),
    ],
)
def test_a_plan_that_cannot_be_found(name: str, words: str) -> None:
    with pytest.raises(PlanError, match=words):
        load_plan(name)
