"""The streaming writer: its files open in llama.cpp's reader package, and nothing half-written is left behind."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
import pytest

from moesaic.errors import CheckpointError
from moesaic.quant.formats import get_format
from moesaic.weights import GgufWriter, open_checkpoint


def test_files_open_in_the_reference_reader(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    matrix = rng.standard_normal((6, 256), np.float32)
    blocks = gguf.quants.quantize(matrix, gguf.GGMLQuantizationType.Q8_0)
    metadata = {
        "test.count": 7,
        "test.negative": -7,
        "test.large": 1 << 40,
        "test.rate": 0.25,
        "test.flag": False,
        "test.name": "öäü",
        "test.words": ["a", "b"],
        "test.mixed": [1, -1],
        "test.types": np.array([1, 2, 3], np.int32),
        "test.empty": [],
    }
    with GgufWriter(tmp_path / "m.gguf", "test") as writer:
        writer.add_metadata(metadata)
        writer.declare("q", get_format("Q8_0"), (2, 3, 256))
        writer.declare("odd", get_format("F32"), (3,))
        writer.declare("f", get_format("F32"), (6, 256))
        writer.write("q", blocks[:2])
        writer.write("q", blocks[2:])
        writer.write("odd", np.array([1, 2, 3], np.float32).view(np.uint8))
        writer.write("f", matrix.view(np.uint8))
    assert [path.name for path in tmp_path.iterdir()] == ["m.gguf"]

    reader = gguf.GGUFReader(tmp_path / "m.gguf")
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    assert tensors["q"].shape.tolist() == [256, 3, 2] and tensors["q"].tensor_type == gguf.GGMLQuantizationType.Q8_0
    assert np.array_equal(tensors["q"].data.reshape(6, -1), blocks)
    assert np.array_equal(tensors["f"].data, matrix)
    assert tensors["odd"].data.tolist() == [1, 2, 3]
    contents = {name: field.contents() for name, field in reader.fields.items() if name.startswith("test.")}
    expected = {key: value for key, value in metadata.items() if key != "test.empty"} | {"test.types": [1, 2, 3]}
    assert contents == expected
    ours = open_checkpoint(tmp_path / "m.gguf")
    assert np.array_equal(ours.raw("q"), blocks)
    assert ours.metadata["test.large"] == 1 << 40


def test_an_error_leaves_nothing(tmp_path: Path) -> None:
    target = tmp_path / "m.gguf"
    target.write_bytes(b"the old file")
    with pytest.raises(ValueError, match="stop"), GgufWriter(target, "test") as writer:
        writer.declare("a", get_format("F32"), (4,))
        writer.write("a", np.zeros(8, np.uint8))
        raise ValueError("stop")
    with pytest.raises(CheckpointError, match=r"'a'.*not written to its end"), GgufWriter(target, "test") as writer:
        writer.declare("a", get_format("F32"), (4,))
        writer.write("a", np.zeros(8, np.uint8))
    assert [path.name for path in tmp_path.iterdir()] == ["m.gguf"]
    assert target.read_bytes() == b"the old file"
