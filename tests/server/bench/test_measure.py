"""`moesaic bench serve` as a whole, on the demo model and on random weights."""

from __future__ import annotations

import json
from typing import Any

import pytest
from tests.server.served import served
from tests.tiny_models import tiny_config

from moesaic.cli.bench_serve import render
from moesaic.cli.main import main
from moesaic.engine import presets
from moesaic.engine.presets import PRESETS, Preset
from moesaic.engine.serving.bench.bound import Bound
from moesaic.engine.serving.bench.figures import LoadFigures
from moesaic.server.bench.measure import ServeResult

SHORT = ["--tokens", "6", "--prompt-tokens", "5-9", "--requests", "2", "--json"]


def result_of(capsys: pytest.CaptureFixture[str], *arguments: str) -> Any:
    assert main(["bench", "serve", *arguments]) == 0
    return json.loads(capsys.readouterr().out)


def test_random_weights_directly_and_over_http(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    small = tiny_config("qwen3_moe", num_hidden_layers=3)
    fields = {key: getattr(small, key) for key in PRESETS["qwen3-30b-a3b"].values}
    monkeypatch.setattr(presets, "PRESETS", {"tiny": Preset("for this test", "qwen3_moe", fields)})
    subject = ("--synthetic", "tiny", "--format", "Q8_0", "--layers", "2", "--users", "1,3", "--http")
    result = result_of(capsys, *subject, *SHORT, "--tokens", "60")  # long enough that all three decode at a time
    figures = result["figures"]
    assert [(each["via"], each["users"]) for each in figures] == [
        ("engine", 1),
        ("engine", 3),
        ("http", 1),
        ("http", 3),
    ]
    for each in figures:
        assert (each["requests"], each["failed"]) == (2 * each["users"], 0)
        assert each["generated_tokens"] == 120 * each["users"]
        assert each["cached_tokens"] == 0
        assert 0 < each["itl_p50"] <= each["itl_p99"] <= each["itl_max"] and each["decode_tokens_per_second"] > 0
    (bound,) = result["bounds"]
    experts, top_k = fields["num_experts"], fields["num_experts_per_tok"]
    assert bound["expected_distinct"] == pytest.approx(experts * (1 - (1 - top_k / experts) ** 3))
    assert top_k <= bound["distinct"] <= min(experts, 3 * top_k)
    one, three = (each["decode_tokens_per_second"] for each in figures[:2])
    assert bound["measured"] == three and bound["tokens_per_second"] == pytest.approx(bound["gain"] * one)
    assert "2 of 3 layers" in result["subject"]


def test_a_server_by_its_address(capsys: pytest.CaptureFixture[str]) -> None:
    with served("demo", MOESAIC_API_KEY="a-key-for-the-tests") as server:
        server.wait_ready()
        keyed = ["--url", server.url, "--api-key", "a-key-for-the-tests"]
        result = result_of(capsys, *keyed, "--rate", "20", "--arrivals", "fixed", *SHORT)
        assert main(["bench", "serve", "--url", server.url, "--api-key", "another-key"]) == 2
        assert "answers 401" in capsys.readouterr().err
    (figures,) = result["figures"]
    assert (figures["via"], figures["rate"], figures["users"]) == ("http", 20, None)
    assert (figures["requests"], figures["failed"], figures["generated_tokens"]) == (2, 0, 12)
    assert result["subject"] == f"demo at {server.url}" and result["bounds"] == []


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("", "needs one of --url URL, MODEL and --synthetic"),
        ("demo --synthetic qwen3-30b-a3b", "needs one of"),
        ("--url http://127.0.0.1:9 --http", "there is one already"),
        ("demo --users 2 --rate 3", "exclude each other"),
        ("demo --tokens 9-3", "'9-3' is no length"),
        ("--url http://127.0.0.1:9", "nothing answers at"),
        ("demo --users 0", "'0' is not a whole number"),
        ("demo --rate 0", "'0' is not a number above 0"),
    ],
)
def test_wrong_usage(arguments: str, words: str, capsys: pytest.CaptureFixture[str]) -> None:
    try:
        code = main(["bench", "serve", *arguments.split()])
    except SystemExit as end:
        code = int(str(end.code))
    assert code == 2
    assert words in capsys.readouterr().err


def test_the_table() -> None:
    one = LoadFigures("engine", 1, None, 2, 0, (), 2.0, 20, 0, 10, 9.0, 9.5, 50.0, 60.0, 70.0, 1.0, 5.0, 20.0)
    more = LoadFigures(
        "engine", 8, None, 9, 1, (("429: busy\x1b", 1),), 2.0, 20, 8, 10, None, None, 1, 2, 3, 1, 5, 36.0
    )
    text = render(ServeResult("m", "10", "5", (one, more), (Bound(8, None, 51.6, 2e9, 2.25, 45.0, 36.0, 0.8),)))
    lines = text.splitlines()
    assert len({len(line) for line in lines[3:6]}) == 1  # columns
    assert "1 user " in lines[4] and lines[4].split()[-9:-4] == ["50.0", "60.0", "70.0", "1.00", "5.0"]
    assert "8 users" in lines[5] and lines[5].endswith("8 of 20") and " - " in lines[5]
    assert "failed 1 times: 429: busy" in text and "\x1b" not in text
    assert "51.6 if they were random; 2.000 GB a step; bound 45.0 tok/s (2.25 x one user), reached 36.0 (80%)" in text
