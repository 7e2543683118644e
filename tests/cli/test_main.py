"""The command line as a user meets it: help without heavy imports, exit codes, one clear message for each error."""

from __future__ import annotations

import argparse
import errno
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

import moesaic
from moesaic.cli.main import build_parser, main
from moesaic.cli.terminal import given_text, printable
from moesaic.errors import ConfigError, MoesaicError


def moesaic_command(*arguments: str, **options: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "moesaic.cli.main", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, **options)  # type: ignore[call-overload]


@pytest.mark.parametrize("line", ["--help", "--version", "run --help", "bench --help", "serve --help"])
def test_help_imports_nothing_heavy(line: str) -> None:
    code = (
        "import sys\nfrom moesaic.cli.main import main\n"
        f"try:\n    main({line.split()!r})\nexcept SystemExit as end:\n    assert end.code == 0\n"
        "heavy = {'torch', 'transformers', 'numpy', 'yaml', 'huggingface_hub', 'starlette', 'msgspec'}\n"
        "heavy &= sys.modules.keys()\n"
        "assert not heavy, heavy\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout


def test_version() -> None:
    assert moesaic_command("--version").stdout == f"moesaic {moesaic.__version__}\n"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("", "COMMAND"),
        ("fly", "invalid choice: 'fly'"),
        ("run demo hi --threads 0", "'0' is not a whole number of at least 1"),
        ("run demo hi --temperature -1", "temperature is -1.0"),
        ("run demo hi --raw --system S", "--system needs the chat template"),
        ("run demo hi there", "unrecognized arguments: there"),
        ("run demo --seed 1 hi there", "unrecognized arguments: hi there"),
        ("run demo --sed 1", "unrecognized arguments: --sed 1"),
        ("bench decode", "either MODEL or --synthetic"),
        ("bench decode --synthetic qwen9", "expected one of qwen3-30b-a3b"),
        ("bench decode --synthetic mixtral-8x7b --layers 33", "this model has 32 layers"),
    ],
)
def test_wrong_usage_ends_with_2_and_names_the_mistake(
    arguments: str, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    try:
        code = main(arguments.split())
    except SystemExit as end:  # argparse
        code = int(end.code or 0)
    captured = capsys.readouterr()
    assert (code, captured.out) == (2, "")
    assert words in captured.err


def test_the_process_ends_with_the_code() -> None:
    done = moesaic_command("run", "demo", "hi", "--top-p", "2")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "moesaic: top_p is 2.0: expected at least 0 and at most 1.\n"


def test_an_error_is_one_line_and_debug_shows_the_traceback(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    missing = str(tmp_path / "no-such-model")
    assert main(["plan", missing]) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert re.fullmatch(r"moesaic: .*no-such-model.*\n", captured.err)
    with pytest.raises(MoesaicError):
        main(["plan", missing, "--debug"])


def test_messages_cannot_steer_the_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    assert printable("a\x1b]0;title\x07b\x9b2Jc\r\n\té 你好 👩‍💻") == "a]0;titleb2Jc\n\té 你好 👩‍💻"
    assert main(["plan", "no\x1b[2Jmodel"]) == 1
    assert "\x1b" not in capsys.readouterr().err


def test_an_interrupt_ends_with_130(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def interrupted(arguments: object) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr("moesaic.cli.doctor.run", interrupted)
    assert main(["doctor"]) == 130
    assert "interrupted" in capsys.readouterr().err


@pytest.mark.parametrize(("redirection", "code"), [(">/dev/full", 1), (">&-", 0), (">&- 2>&-", 0)])
def test_output_that_cannot_be_written_is_an_error_and_closed_output_is_none(redirection: str, code: int) -> None:
    line = f"exec {sys.executable} -m moesaic.cli.main plan --synthetic list {redirection}"
    done = subprocess.run(["sh", "-c", line], capture_output=True, text=True, timeout=120, check=False)
    assert (done.returncode, done.stdout) == (code, "")
    assert "Traceback" not in done.stderr and "Exception ignored" not in done.stderr
    assert done.stderr.startswith("moesaic: No space left on device") == (code == 1)


def test_a_full_disk_is_named_with_its_file(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(arguments: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device", "big.gguf")

    monkeypatch.setattr("moesaic.cli.doctor.run", full)
    assert main(["doctor"]) == 1
    assert capsys.readouterr().err == "moesaic: big.gguf: No space left on device.\n"


def test_text_of_another_encoding_is_refused_before_a_model_is_loaded(tmp_path: Path) -> None:
    missing = str(tmp_path / "no-such-model")
    for arguments, where in ((["hi \udcff"], "PROMPT"), (["hi", "--system", "\udcff"], "--system")):
        done = moesaic_command("run", missing, *arguments)
        assert (done.returncode, done.stdout) == (2, "")
        assert done.stderr.startswith(f"moesaic: {where} is not UTF-8 text")
    piped = subprocess.run(
        [sys.executable, "-m", "moesaic.cli.main", "run", missing],
        input=b"hi \xff", capture_output=True, timeout=120, check=False,
    )  # fmt: skip
    assert piped.returncode == 2
    assert b"standard input is not utf-8 text" in piped.stderr.lower()


def test_utf8_is_understood_in_any_locale() -> None:
    assert given_text("你好".encode().decode("ascii", "surrogateescape"), "PROMPT") == "你好"
    assert given_text("é", "PROMPT") == "é"
    with pytest.raises(ConfigError, match=r"PROMPT is not UTF-8 text .* at position 1"):
        given_text("x\udcff", "PROMPT")
    with pytest.raises(ConfigError, match=r"PROMPT is not UTF-8 text .* at position 0"):
        given_text("\ud800", "PROMPT")


def test_presets_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "decode", "--synthetic", "list"]) == 0
    names = [line.split()[0] for line in capsys.readouterr().out.splitlines()]
    assert {
        "qwen3-30b-a3b",
        "deepseek-v3",
        "kimi-k2",
        "glm-4.5",
        "gpt-oss-120b",
        "qwen3-235b-a22b",
        "mixtral-8x7b",
    } == {*names}


def test_every_option_has_help() -> None:
    def check(command: argparse.ArgumentParser) -> None:
        for action in command._actions:
            assert action.help, (command.prog, action.dest)
            if isinstance(action, argparse._SubParsersAction):
                for inner in action.choices.values():
                    check(inner)

    parser = build_parser()
    commands = next(action for action in parser._actions if action.dest == "COMMAND" or action.choices)
    assert commands.choices is not None
    for command in commands.choices.values():
        check(command)


def test_doctor_as_json() -> None:
    done = moesaic_command("doctor", "--json")
    report = json.loads(done.stdout)
    assert report["active_isa"] in report["isas"]
    assert report["read_bandwidth"] > 0
    assert report["versions"]["torch"]
    assert report["hardware"]["num_cores"] >= 1
    assert done.returncode == int(any(problem["serious"] for problem in report["problems"]))
