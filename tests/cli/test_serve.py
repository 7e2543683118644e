"""`moesaic serve` before anything is loaded: keys, addresses, names."""

from __future__ import annotations

from pathlib import Path

import pytest

from moesaic.cli.main import main
from moesaic.cli.serve import read_keys
from moesaic.errors import ConfigError
from moesaic.server.loading import ModelOptions


@pytest.fixture(autouse=True)
def no_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MOESAIC_API_KEY", raising=False)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("--host 0.0.0.0", "give a key with --api-key, --api-key-file or MOESAIC_API_KEY"),
        ("--port 70000", "port 70000"),
        ("--api-key short", "8 to 512 printable"),
        ("--allow-host http://box", "allowed host 'http://box'"),
        ("--allow-origin box", "allowed origin 'box'"),
        ("--api-key-file /nowhere/keys", "/nowhere/keys cannot be read"),
        ("--on-engine-failure pray", "invalid choice: 'pray'"),
        ("--kv-cache much", "'much'"),
        ("--max-batch 0", "'0' is not a whole number"),
    ],
)
def test_wrong_usage_is_refused_before_anything_is_loaded(
    arguments: str, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    try:
        code = main(["serve", "no-such-model-anywhere", *arguments.split()])
    except SystemExit as end:
        code = int(str(end.code))
    assert code == 2
    assert words in capsys.readouterr().err


def test_keys_from_everywhere(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text("# of the team\n\nkey-in-file-1\n  key-in-file-2 \n", encoding="utf-8")
    assert read_keys(["given-key"], str(file), "from-environment") == [
        ("given-key", "--api-key"),
        ("key-in-file-1", str(file)),
        ("key-in-file-2", str(file)),
        ("from-environment", "MOESAIC_API_KEY"),
    ]
    assert read_keys([], None, None) == []


@pytest.mark.parametrize(("content", "words"), [(b"# nothing\n", "has no key"), (b"\xff\xfe", "not UTF-8")])
def test_a_file_without_keys_is_no_open_door(tmp_path: Path, content: bytes, words: str) -> None:
    file = tmp_path / "keys"
    file.write_bytes(content)
    with pytest.raises(ConfigError, match=words):
        read_keys([], str(file), None)


def test_the_key_of_the_environment_counts(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("MOESAIC_API_KEY", "bad key")
    assert main(["serve", "demo"]) == 2
    error = capsys.readouterr().err
    assert "8 to 512 printable" in error and "bad key" not in error


def test_names(tmp_path: Path) -> None:
    (tmp_path / "some-model-Q4.gguf").touch()
    (tmp_path / "folder").mkdir()
    assert ModelOptions(str(tmp_path / "some-model-Q4.gguf")).served_name == "some-model-Q4"
    assert ModelOptions(str(tmp_path / "folder")).served_name == "folder"
    assert ModelOptions("org/name:Q4_K_M").served_name == "org/name:Q4_K_M"
    assert ModelOptions("demo").served_name == "demo"
    assert ModelOptions("demo", "mine").served_name == "mine"
