"""What the comparison on a GPU makes of the lines that its programs print."""

from __future__ import annotations

import sys
from pathlib import Path

import compare_gpu

PRINTS = """
import json, sys, time
print("loading", flush=True)
print(json.dumps({"what": "decode", "tokens": 32, "runs": [9.0, 10.0, 12.0]}), flush=True)
time.sleep(60 if sys.argv[1] == "slow" else 0)
sys.exit(3 if sys.argv[1] == "fails" else 0)
"""


def test_what_a_program_printed_before_it_failed_is_kept(tmp_path: Path) -> None:
    program = tmp_path / "program.py"
    program.write_text(PRINTS)
    measured = {"what": "decode", "tokens": 32, "runs": [9.0, 10.0, 12.0]}
    for how, problem in (("well", None), ("fails", "exit status 3; see log.txt"), ("slow", "ended after 2 s")):
        rows = compare_gpu.rows_of(
            [sys.executable, str(program), how], 2.0 if how == "slow" else 20.0, tmp_path / "log.txt"
        )
        assert rows == [measured, *([{"problem": problem}] if problem else [])]


def test_the_better_micro_batch_counts_and_ratios_are_of_medians() -> None:
    common = {"subject": "m:Q4_K:3", "bytes": 2_000_000_000, "what": "prefill", "tokens": 2048}
    rows = [
        common | {"program": "Moesaic", "way": "hybrid, no cache", "runs": [900.0, 1000.0, 5000.0]},
        common | {"program": "llama.cpp", "ubatch": 2048, "runs": [390.0, 410.0]},
        common | {"program": "llama.cpp", "ubatch": 512, "runs": [100.0, 200.0]},
        {"subject": "m:Q4_K:3", "bytes": 2_000_000_000, "program": "llama.cpp", "problem": "ended after 9 s"},
    ]
    text = compare_gpu.render(rows, "a machine")
    assert "| prefill of 2,048 | 1,000.0 | 400.0 | 2.50 x |" in text
    assert "- llama.cpp: ended after 9 s" in text and "2.0 GB" in text
