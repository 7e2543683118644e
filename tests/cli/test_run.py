"""`moesaic run`, `plan`, `quantize` and `bench` on a tiny model, as processes and through `main`."""

from __future__ import annotations

import io
import json
import os
import re
import sys
from pathlib import Path

import pytest
import torch
from tests.cli.test_chat import PROMPT, Terminal
from tests.cli.test_main import moesaic_command
from tests.tiny_models import tiny_config
from transformers import AutoModelForCausalLM, AutoTokenizer

from moesaic.cli.main import main
from moesaic.engine import presets
from moesaic.engine.presets import PRESETS, Preset
from moesaic.placement import Hardware, hardware
from moesaic.placement.hardware import NumaNode
from moesaic.weights import resolve

RATES = re.compile(
    r"\[prefill \d+ tokens at [\d.]+ tok/s, decode \d+ tokens( at [\d.]+ tok/s)?(, length limit reached)?\]"
)
GIB = 1024**3


def stock_greedy_text(folder: Path, text: str, count: int) -> str:
    """Greedy decoding by the stock model without a cache: the oracle."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    start = len(ids)
    while len(ids) < start + count and ids[-1] != tokenizer.eos_token_id:
        with torch.no_grad():
            ids.append(int(model(torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
    return str(tokenizer.decode(ids[start:], skip_special_tokens=True))


def test_run_answers_like_the_stock_model(tiny_folder: Path) -> None:
    done = moesaic_command("run", str(tiny_folder), "Hello", "--temperature", "0", "--max-tokens", "8", "--system", "S")
    assert done.returncode == 0, done.stderr
    expected = stock_greedy_text(tiny_folder, "<system>S<|end|><user>Hello<|end|><assistant>", 8)
    assert done.stdout == expected + "\n"
    assert RATES.fullmatch(done.stderr.splitlines()[-1]), done.stderr


def test_run_reads_the_prompt_from_standard_input(
    tiny_folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    options = ("--raw", "--json", "--temperature", "0", "--max-tokens", "6")
    monkeypatch.setattr("sys.stdin", io.StringIO("abc\n"))
    assert main(["run", str(tiny_folder), "-", *options, "--threads", "2"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["text"] == stock_greedy_text(tiny_folder, "abc", 6)
    assert (report["prompt_tokens"], report["generated_tokens"]) == (3, 6)
    assert report["finish_reason"] == "length"
    assert report["prefill_tokens_per_second"] > 0
    assert report["decode_tokens_per_second"] > 0
    assert report["seed"] is None
    assert main(["run", str(tiny_folder), "abc", *options, "--threads", "1"]) == 0
    assert json.loads(capsys.readouterr().out)["text"] == report["text"]


def test_run_samples_with_a_seed(tiny_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    texts = []
    for seed in ("7", "7", "8"):
        assert main(["run", str(tiny_folder), "x", "--json", "--max-tokens", "12", "--top-p", "1", "--seed", seed]) == 0
        report = json.loads(capsys.readouterr().out)
        assert report["seed"] == int(seed)
        texts.append(report["text"])
    assert texts[0] == texts[1] != texts[2]


def test_a_prompt_longer_than_the_context_is_refused(tiny_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", str(tiny_folder), "x" * 600, "--raw"]) == 1
    assert "the prompt has 600 tokens, but the model's context is 512" in capsys.readouterr().err


def test_a_conversation_in_the_terminal(tiny_folder: Path, tmp_path: Path) -> None:
    env = os.environ | {"XDG_STATE_HOME": str(tmp_path), "TERM": "dumb", "INPUTRC": "/dev/null"}
    command = [
        sys.executable,
        "-m",
        "moesaic.cli.main",
        "run",
        str(tiny_folder),
        "--temperature",
        "0",
        "--max-tokens",
        "5",
    ]
    terminal = Terminal(command, env)
    try:
        terminal.expect(PROMPT)
        assert "[prefill " in terminal.ask("first")
        assert " more cached)" in terminal.ask("second")
        assert terminal.leave() == 0
    finally:
        terminal.close()


def test_plan_prints_the_table(tiny_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", str(tiny_folder)]) == 0
    printed = capsys.readouterr().out
    assert re.search(
        r"^model\.layers\.\[0-2\]\.mlp\.experts +3 +experts +moesaic +cpu +F32 +18\.0 MiB +6\.8 MiB$", printed, re.M
    )
    assert "fits: " in printed


def test_plan_as_json_with_rules(tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rules = tmp_path / "rules.yaml"
    rules.write_text("rules:\n  - match: {role: experts}\n    format: Q4_K\n")
    assert main(["plan", str(tiny_folder), "--plan", str(rules), "--json"]) == 0
    entries = {entry["module"]: entry for entry in json.loads(capsys.readouterr().out)["entries"]}
    assert entries["model.layers.0.mlp.experts"]["formats"] == {"gate": "Q4_K", "up": "Q4_K", "down": "Q4_K"}


def test_an_error_in_a_placement_file_names_its_line(
    tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rules = tmp_path / "rules.yaml"
    rules.write_text("rules:\n  - match: {role: expert}\n    format: Q4_K\n")
    assert main(["plan", str(tiny_folder), "--plan", str(rules)]) == 1
    assert capsys.readouterr().err.startswith(f"moesaic: {rules}:2: unknown role 'expert'")


def test_a_model_that_does_not_fit_is_refused_before_loading(
    tiny_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    small = Hardware("Small CPU", 1, 1, None, GIB, GIB // 8, False, (NumaNode(0, (0,), GIB),))
    monkeypatch.setattr(hardware, "detect_hardware", lambda **_: small)
    monkeypatch.setattr("moesaic.engine.loader.detect_hardware", lambda **_: small)
    monkeypatch.setattr("moesaic.engine.loader.build_modules", lambda *_: pytest.fail("loaded"))
    assert main(["plan", str(tiny_folder)]) == 1
    captured = capsys.readouterr()
    assert "total: " in captured.out
    assert re.search(r"needs .* GiB too little", captured.err)
    assert main(["run", str(tiny_folder), "hi"]) == 1
    assert "GiB too little" in capsys.readouterr().err


def test_quantize_names_the_formats_that_it_can_write(tiny_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["quantize", str(tiny_folder), "out.gguf", "--format", "Q9"]) == 1
    said = capsys.readouterr().err
    assert "'Q9' is no weight format: expected one of F32, " in said
    assert not any(name in said for name in ("IQ1_S", "FP8", "INT4"))


def test_quantize_and_run_the_file(tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "tiny-q8_0.gguf"
    assert main(["quantize", str(tiny_folder), str(output), "--format", "q8_0", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["formats"]["Q8_0"]["tensors"] > 0
    assert report["nbytes"] < report["source_nbytes"] / 2
    run = [
        "run",
        str(output),
        "--tokenizer",
        str(tiny_folder),
        "hi",
        "--temperature",
        "0",
        "--max-tokens",
        "4",
        "--json",
    ]
    assert main(run) == 0
    assert json.loads(capsys.readouterr().out)["generated_tokens"] == 4
    assert main(["plan", str(output)]) == 0
    assert "Q8_0" in capsys.readouterr().out


@pytest.mark.parametrize("what", ["decode", "prefill"])
def test_bench_of_a_model(what: str, tiny_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["bench", what, str(tiny_folder), "--tokens", "4", "--prompt-tokens", "8", "--repeat", "2", "--json"]
    assert main(arguments) == 0
    result = json.loads(capsys.readouterr().out)
    assert len(result["runs"]) == 2
    assert min(result["runs"]) <= result["tokens_per_second"] <= max(result["runs"])
    assert (result["num_layers"], result["total_layers"], result["weight_format"]) == (3, 3, "F32")
    assert result["extrapolated_tokens_per_second"] is None
    assert 0 < result["python_share"] < 1
    assert 0 < result["layer_share"] < 1
    if what == "decode":
        expected = result["tokens_per_second"] * result["bytes_per_token"] / 1e9
        assert result["gigabytes_per_second"] == pytest.approx(expected)
        assert result["bandwidth_share"] == pytest.approx(expected / result["read_bandwidth"])
    else:
        assert result["gigabytes_per_second"] is None


def test_bench_of_random_weights_extrapolates(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    small = tiny_config("deepseek_v3", num_hidden_layers=6).to_dict()
    fields = {key: small[key] for key in PRESETS["deepseek-v3"].values}
    monkeypatch.setattr(presets, "PRESETS", {"tiny": Preset("for this test", "deepseek_v3", fields)})
    bench = ["bench", "decode", "--synthetic", "tiny", "--format", "Q8_0", "--tokens", "4", "--repeat", "1"]
    assert main([*bench, "--layers", "2", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert (result["num_layers"], result["total_layers"], result["weight_format"]) == (2, 6, "Q8_0")
    slower = 1 - result["layer_share"] + 3 * result["layer_share"]
    assert result["extrapolated_tokens_per_second"] == pytest.approx(result["tokens_per_second"] / slower)
    prefill = ["bench", "prefill", *bench[2:6], "--prompt-tokens", "40", "--repeat", "1", "--json"]
    for layers, is_known in ((1, False), (2, True)):  # of the last layer, a prompt needs little
        assert main([*prefill, "--layers", str(layers)]) == 0
        result = json.loads(capsys.readouterr().out)
        assert (result["extrapolated_tokens_per_second"] is not None) == is_known
    assert result["extrapolated_tokens_per_second"] < result["tokens_per_second"]
    assert main([*bench, "--prompt-tokens", "600"]) == 1
    assert "context is 512" in capsys.readouterr().err
    assert main([*bench, "--layers", "1"]) == 0
    assert "extrapolated (not measured) to all 6 layers" in capsys.readouterr().out


def test_the_demo_and_its_tokenizer_for_another_file(capsys: pytest.CaptureFixture[str]) -> None:
    weights = str(resolve("demo").checkpoint)
    for arguments in (["demo"], ["demo", "--gguf", weights]):
        assert main(["run", *arguments, "What is 1234 + 4321?", "--json"]) == 0
        report = json.loads(capsys.readouterr().out)
        assert (report["text"], report["finish_reason"]) == ("1234 + 4321 = 5555", "stop")
        assert report["seed"] is None  # the file says that it is not to be sampled
