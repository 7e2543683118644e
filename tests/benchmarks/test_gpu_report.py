"""What the bench of a GPU makes of the rows that its processes leave."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import gpu
import gpu_parts

COMMON = {"model": "m", "format": "Q4_K", "layers": 4, "total_layers": 61, "vram_budget": 24 * 2**30}


def row(plan: str, rate: float, **more: Any) -> dict[str, Any]:
    measured = {"plan": plan, "what": "decode", "tokens": 32, "runs": [rate - 1, rate, rate + 1]}
    return COMMON | measured | {"tokens_per_second": rate, "layer_ms": 1.25, "command": f"moesaic bench {plan}"} | more


def test_subjects_are_read() -> None:
    assert gpu.parse_subject("deepseek-v3:Q2_K:4:8GiB", 5) == {
        "model": "deepseek-v3",
        "weight_format": "Q2_K",
        "layers": 4,
        "vram": 8 * 2**30,
    }
    assert gpu.parse_subject("qwen3-30b-a3b:Q4_K", 5)["layers"] is None
    assert gpu.parse_subject("qwen3-30b-a3b:Q4_K::8GiB", 5)["vram"] == 8 * 2**30
    assert gpu.parse_subject("qwen3-30b-a3b:Q4_K", 5)["vram"] == 5


def test_what_was_measured_again_counts_and_a_failure_hides_nothing(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    failed = COMMON | {"plan": "cpu", "what": "decode", "tokens": 32, "problem": "died"}
    rows = [row("hybrid", 10.0), row("cpu", 3.0), row("hybrid", 11.0), failed]
    path.write_text("".join(json.dumps(each) + "\n" for each in rows))
    assert [(each["plan"], each["tokens_per_second"]) for each in gpu.read_rows(path)] == [
        ("cpu", 3.0),
        ("hybrid", 11.0),
    ]


def test_ratios_are_of_the_whole_model() -> None:
    rows = [row("hybrid", 100.0, whole_tokens_per_second=8.0), row("layers 6/61", 50.0, whole_tokens_per_second=2.0)]
    assert gpu.ratios(rows) == ["- m Q4_K, decode 32: hybrid is 4.00 x layers"]
    rows += [row("hybrid+cache", 110.0, whole_tokens_per_second=12.0), row("cpu", 40.0)]
    assert gpu.ratios(rows) == [
        "- m Q4_K, decode 32: hybrid is 4.00 x layers, 0.20 x cpu",
        "- m Q4_K, decode 32: hybrid+cache is 6.00 x layers, 0.30 x cpu, 1.50 x hybrid",
    ]


def test_the_report_has_figures_problems_and_commands() -> None:
    problem = COMMON | {"plan": "cpu", "what": "prefill", "tokens": 8192, "problem": "not run | no time"}
    on_gpu = {"vram_reserved": 2**30, "vram_used": 2**31, "roofline_share": 0.85, "hit_rate": 0.125, "slots": 9}
    text = gpu.render([row("hybrid+cache", 10.0, **on_gpu), problem], "a machine")
    lines = [line for line in text.splitlines() if line.startswith("|")]
    assert len({line.count("|") for line in lines if "not run" not in line}) == 1
    assert "| 10.00 | 9.00-11.00 (3) | 1.250 |  | 85% |" in lines[2]
    assert lines[2].endswith("| 12.5% of 9 | 1.00, 2.00, 24.00 |")
    assert "not run / no time" in lines[3]
    assert "moesaic bench hybrid+cache" in text and "a machine" in text


def test_a_clock_behind_a_split_counts_decode_steps_only() -> None:
    class Tail:
        def __call__(self, hidden: torch.Tensor, sequence: object) -> torch.Tensor:
            return hidden + 1

        def logits(self, hidden: torch.Tensor) -> torch.Tensor:
            return hidden

    tail = gpu_parts.TimedTail(Tail())
    tail.start(1)
    assert torch.equal(tail(torch.zeros(16, 2), None), torch.ones(16, 2))  # type: ignore[arg-type]
    assert tail.layer_seconds == 0.0
    tail(torch.zeros(1, 2), None)  # type: ignore[arg-type]
    tail.logits(torch.zeros(1, 2))
    assert tail.layer_seconds > 0.0 and tail.head_calls == 1


def test_unknown_parts_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        gpu.main(["--out", str(tmp_path), "--parts", "decode,everything"])
    assert "everything" in capsys.readouterr().err
