"""From names to files: the demo, folders, files, and a hub on this computer with its cache."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.weights.fake_hub import fake_hub

from moesaic.errors import ModelNotFoundError
from moesaic.weights.hub import Hub
from moesaic.weights.resolve import quant_groups, resolve

SHARDS = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
REPOSITORIES: dict[str, dict[str, str]] = {
    "org/plain": {
        "config.json": "{}",
        "tokenizer.json": "{}",
        "model.safetensors.index.json": json.dumps({"weight_map": {"a": SHARDS[0], "b": SHARDS[1]}}),
        SHARDS[0]: "x",
        SHARDS[1]: "y",
        "original/consolidated.safetensors": "not wanted",
        "pytorch_model.bin": "not wanted",
    },
    "org/quants": {
        "Q4_K_M/big-Q4_K_M-00001-of-00002.gguf": "1",
        "Q4_K_M/big-Q4_K_M-00002-of-00002.gguf": "2",
        "big-UD-Q2_K_XL.gguf": "3",
        "big.Q8_0.gguf": "4",
        "mmproj-F16.gguf": "not a model",
    },
    "org/single": {"model-q4_0.gguf": "1", "tokenizer_config.json": "{}"},
    "org/torn": {"m-Q4_0-00001-of-00003.gguf": "1", "m-Q4_0-00003-of-00003.gguf": "3"},
    "org/empty": {"README.md": ""},
}


@pytest.fixture(scope="module")
def endpoint(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    root = tmp_path_factory.mktemp("hub")
    for repo, files in REPOSITORIES.items():
        for name, content in files.items():
            path = root / repo / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(content)
    with fake_hub(root) as url:
        yield url


def test_safetensors_repository(endpoint: str, tmp_path: Path) -> None:
    found = resolve("org/plain", hub=Hub(endpoint=endpoint, cache_dir=tmp_path))
    wanted = set(REPOSITORIES["org/plain"]) - {"original/consolidated.safetensors", "pytorch_model.bin"}
    assert {path.relative_to(found.checkpoint).as_posix() for path in found.checkpoint.rglob("*")} == wanted
    assert found.tokenizer == found.checkpoint
    offline = resolve("org/plain", hub=Hub(offline=True, cache_dir=tmp_path))
    assert offline.checkpoint == found.checkpoint


@pytest.mark.parametrize(
    ("tag", "file"),
    [
        ("Q4_K_M", "big-Q4_K_M-00001-of-00002.gguf"),
        ("q4_k_m", "big-Q4_K_M-00001-of-00002.gguf"),
        ("UD-Q2_K_XL", "big-UD-Q2_K_XL.gguf"),
        ("Q2_K_XL", "big-UD-Q2_K_XL.gguf"),
        ("Q8_0", "big.Q8_0.gguf"),
        ("big.Q8_0.gguf", "big.Q8_0.gguf"),
    ],
)
def test_quantisation_by_name(tag: str, file: str, endpoint: str, tmp_path: Path) -> None:
    hub = Hub(endpoint=endpoint, cache_dir=tmp_path)
    found = resolve(f"org/quants:{tag}", hub=hub)
    assert found.checkpoint.name == file and found.checkpoint.exists() and found.tokenizer is None
    if "00001" in file:
        assert found.checkpoint.with_name(file.replace("00001-of", "00002-of")).exists()
    assert resolve(f"org/quants:{tag}", hub=Hub(offline=True, cache_dir=tmp_path)).checkpoint == found.checkpoint


def test_the_only_gguf_needs_no_tag(endpoint: str, tmp_path: Path) -> None:
    found = resolve("org/single", hub=Hub(endpoint=endpoint, cache_dir=tmp_path))
    assert found.checkpoint.name == "model-q4_0.gguf" and found.tokenizer == found.checkpoint.parent


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("org/quants", "several models.*org/quants:Q4_K_M.*org/quants:UD-Q2_K_XL.*org/quants:Q8_0"),
        ("org/quants:Q3_K_M", "no GGUF named Q3_K_M; choose one of org/quants:Q4_K_M"),
        ("org/torn:Q4_0", "2 of 3 parts"),
        ("org/empty", "neither safetensors nor GGUF"),
        ("org/absent", "no such folder here and no such repository"),
        ("absent.gguf", "no such file"),
        ("some/absent.gguf", "no such file"),
        ("a/b/c", "no such file or folder"),
    ],
)
def test_what_cannot_be_found(model: str, message: str, endpoint: str, tmp_path: Path) -> None:
    with pytest.raises(ModelNotFoundError, match=message):
        resolve(model, hub=Hub(endpoint=endpoint, cache_dir=tmp_path))


def test_offline_takes_only_what_is_there(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFoundError, match="not in the cache; run once without --offline"):
        resolve("org/plain", hub=Hub(offline=True, endpoint="http://127.0.0.1:9", cache_dir=tmp_path))


def test_local_files_and_gguf_option(endpoint: str, tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    weights = tmp_path / "folder" / "w.gguf"
    weights.write_text("x")
    assert resolve(str(weights)).tokenizer is None
    (tmp_path / "folder" / "tokenizer.json").write_text("{}")
    assert resolve(str(tmp_path / "folder")).checkpoint == tmp_path / "folder"
    assert resolve(str(weights)).tokenizer == tmp_path / "folder"
    other = tmp_path / "other.gguf"
    other.write_text("x")
    assert resolve(str(tmp_path / "folder"), gguf=other).checkpoint == other
    assert resolve(str(tmp_path / "folder"), gguf=other).tokenizer == tmp_path / "folder"
    hub = Hub(endpoint=endpoint, cache_dir=tmp_path / "cache")
    with_hub = resolve("org/plain", gguf=other, hub=hub)
    assert with_hub.tokenizer is not None and [path.name for path in with_hub.tokenizer.iterdir()] == ["tokenizer.json"]
    with pytest.raises(ModelNotFoundError, match="no such file"):
        resolve("demo", gguf=tmp_path / "absent.gguf")


def test_labels_that_clash_get_their_names() -> None:
    groups = quant_groups(["a-Q4_0.gguf", "b-Q4_0.gguf", "c-IQ4_XS.gguf", "plain.gguf", "d-MXFP4_MOE.gguf"])
    assert set(groups) == {"a-Q4_0", "b-Q4_0", "IQ4_XS", "plain", "MXFP4_MOE"}
