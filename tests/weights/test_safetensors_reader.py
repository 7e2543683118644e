"""The safetensors reader: what sound folders hold, and one typed error with the right names for every defect."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from moesaic.errors import CheckpointError, UnsupportedFormatError
from moesaic.weights import Checkpoint, open_checkpoint


def folder(tmp_path: Path, content: bytes, config: str = "{}") -> Path:
    (tmp_path / "config.json").write_text(config)
    (tmp_path / "model.safetensors").write_bytes(content)
    return tmp_path


def safetensors(header: object, data: bytes = b"", declared: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if declared is None else declared) + text + data


def entry(shape: list[object], offsets: list[object], dtype: object = "F32") -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


def test_reads_what_the_reference_library_writes(tmp_path: Path) -> None:
    torch.manual_seed(0)
    tensors = {
        "a": torch.randn(2, 3, 5),
        "b": torch.randn(7, 4).to(torch.bfloat16),
        "c": torch.randn(9).half(),
        "scalar": torch.tensor(2.5),
    }
    (tmp_path / "config.json").write_text('{"model_type": "x"}')
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    checkpoint = open_checkpoint(tmp_path)
    assert isinstance(checkpoint, Checkpoint) and checkpoint.kind == "safetensors"
    assert checkpoint.metadata == {"model_type": "x"}
    for name, values in tensors.items():
        info = checkpoint.tensors[name]
        assert info.shape == tuple(values.shape)
        assert info.format.name == {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}[values.dtype]
        stored = torch.from_numpy(checkpoint.raw(name).copy()).reshape(-1).view(values.dtype)
        assert torch.equal(stored, values.reshape(-1))
    assert checkpoint.raw("a").shape == (6, 20) and checkpoint.raw("scalar").shape == (1, 4)
    checkpoint.release("a")
    checkpoint.close()


def test_sharded_models(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    save_file({"a": torch.ones(2)}, tmp_path / "model-00001-of-00002.safetensors")
    save_file({"b": torch.ones(3), "stray": torch.ones(1)}, tmp_path / "model-00002-of-00002.safetensors")
    shards = {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": shards}))
    assert set(open_checkpoint(tmp_path).tensors) == {"a", "b"}

    index.write_text(json.dumps({"weight_map": shards | {"c": shards["a"]}}))
    with pytest.raises(CheckpointError, match=r"'c'.*not in this file"):
        open_checkpoint(tmp_path)
    index.write_text(json.dumps({"weight_map": shards | {"c": "model-00003-of-00002.safetensors"}}))
    with pytest.raises(CheckpointError, match=r"00003-of-00002.*cannot be opened"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize(
    "shard",
    [
        "../secret.safetensors",
        "/etc/passwd",
        "sub/x.safetensors",
        "..\\x.safetensors",
        "x.bin",
        7,
        None,
        "a\0.safetensors",
    ],
)
def test_the_index_cannot_leave_the_folder(shard: object, tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    save_file({"a": torch.ones(2)}, tmp_path / "secret.safetensors")
    (tmp_path / "model" / "config.json").write_text("{}")
    index = tmp_path / "model" / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": shard}}))
    with pytest.raises(CheckpointError, match=r"index\.json.*'a'.*plain"):
        open_checkpoint(tmp_path / "model")


DEFECTS: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "is empty"),
    "short": (b"\1\0\0", "header"),
    "header longer than the file": (safetensors({}, declared=1 << 20), "header of 1048576"),
    "header size overflow": (safetensors({}, declared=(1 << 64) - 1), "header of 18446744073709551615"),
    "not JSON": (safetensors(b"{nonsense"), "not valid JSON"),
    "not UTF-8": (safetensors(b'{"\xff": 1}'), "not valid JSON"),
    "not an object": (safetensors([1, 2]), "JSON list"),
    "deep": (safetensors(b"[" * 100_000 + b"]" * 100_000), "not valid JSON"),
    "key twice": (safetensors(b'{"a": 1, "a": 2}'), "'a' appears twice"),
    "huge number": (safetensors(b'{"a": {"dtype": "F32", "shape": [' + b"9" * 9999 + b"]}}"), "not valid JSON"),
    "not described": (safetensors({"a": 5}), "'a'.*int"),
    "no shape": (safetensors({"a": {"dtype": "F32", "data_offsets": [0, 4]}}, bytes(4)), "'a'.*shape None"),
    "negative size": (safetensors({"a": entry([-1], [0, 4])}, bytes(4)), "'a'.*expected sizes"),
    "boolean size": (safetensors({"a": entry([True], [0, 4])}, bytes(4)), "'a'.*expected sizes"),
    "fractional size": (safetensors({"a": entry([1.0], [0, 4])}, bytes(4)), "'a'.*expected sizes"),
    "many dimensions": (safetensors({"a": entry([1] * 99, [0, 4])}, bytes(4)), "'a'.*expected sizes"),
    "overflow": (safetensors({"a": entry([1 << 62] * 8, [0, 4])}, bytes(4)), "'a'.*needs"),
    "beyond 64 bits": (safetensors({"a": entry([1 << 64], [0, 4])}, bytes(4)), "'a'.*expected sizes"),
    "no elements": (safetensors({"a": entry([0], [0, 0])}), "'a'.*needs 0 bytes"),
    "three offsets": (safetensors({"a": entry([1], [0, 4, 8])}, bytes(8)), "'a'.*expected sizes"),
    "one offset": (safetensors({"a": entry([1], [0])}, bytes(8)), "'a'.*expected sizes"),
    "reversed": (safetensors({"a": entry([1], [4, 0])}, bytes(8)), "'a'.*lies at"),
    "outside": (safetensors({"a": entry([1], [4, 8])}, bytes(4)), "'a'.*lies at"),
    "far outside": (safetensors({"a": entry([1], [1 << 62, (1 << 62) + 4])}, bytes(4)), "'a'.*lies at"),
    "other size": (safetensors({"a": entry([3], [0, 8])}, bytes(8)), "'a'.*needs 12 bytes but has 8"),
    "overlap": (safetensors({"a": entry([2], [0, 8]), "b": entry([1], [4, 8])}, bytes(8)), "'b'.*overlaps.*'a'"),
    "unprintable name": (safetensors({"a\nb": entry([1], [0, 4])}, bytes(4)), "printable"),
    "lone surrogate": (safetensors(b'{"\\ud800": {}}'), "printable"),
}


@pytest.mark.parametrize("defect", DEFECTS)
def test_defects(defect: str, tmp_path: Path) -> None:
    content, message = DEFECTS[defect]
    with pytest.raises(CheckpointError, match=message) as caught:
        open_checkpoint(folder(tmp_path, content))
    assert "model.safetensors" in str(caught.value), "the message names the file"


@pytest.mark.parametrize("dtype", ["I32", "F8_E4M3", "U8", "F64", "", 5, None])
def test_dtypes_that_cannot_be_read_are_named(dtype: object, tmp_path: Path) -> None:
    size = {"F8_E4M3": 8, "U8": 8, "F64": 1}.get(str(dtype), 2)
    content = safetensors({"x.weight": entry([size], [0, 8], dtype)}, bytes(8))
    with pytest.raises(UnsupportedFormatError, match=r"x\.weight.*dtype.*F32, F16, BF16"):
        open_checkpoint(folder(tmp_path, content))


@pytest.mark.parametrize("config", ["", "[]", "{", '"x"'])
def test_config_must_be_an_object(config: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"config\.json"):
        open_checkpoint(folder(tmp_path, safetensors({"a": entry([1], [0, 4])}, bytes(4)), config))


def test_several_files_need_an_index(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    for name in ("a", "b"):
        save_file({name: torch.ones(2)}, tmp_path / f"{name}.safetensors")
    with pytest.raises(CheckpointError, match=r"2 \.safetensors files but no model\.safetensors\.index\.json"):
        open_checkpoint(tmp_path)


def test_views_are_of_the_file(tmp_path: Path) -> None:
    values = np.arange(6, dtype=np.float32)
    path = folder(tmp_path, safetensors({"a": entry([2, 3], [0, 24])}, values.tobytes()))
    view = open_checkpoint(path).raw("a")
    assert not view.flags.owndata and not view.flags.writeable
    assert view.tobytes() == values.tobytes()
