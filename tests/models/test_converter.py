"""Our GGUF export against llama.cpp's own converter, whose output for the same tiny models is recorded.

`converter_output.json` holds the metadata and, for every tensor, shape and CRC-32 of the bytes. Weights follow a fixed
pattern, so that the record does not depend on random generators.
"""

from __future__ import annotations

import json
import math
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.models.helpers import write_gguf
from tests.tiny_models import ALL_FAMILIES, fill_with_pattern, make_tiny_model

from moesaic.weights import open_checkpoint

RECORD: dict[str, Any] = json.loads((Path(__file__).parent / "converter_output.json").read_text())["families"]

# The converter divides by the number of key-value heads, which gives the width of the shared experts for the published
# models only; ours is the width itself.
DIFFERENT = {"ernie4_5-moe.expert_shared_feed_forward_length"}


@pytest.mark.parametrize("family", ALL_FAMILIES)
def test_export_equals_the_converter(family: str, tmp_path: Path) -> None:
    fill_with_pattern(make_tiny_model(family)).save_pretrained(tmp_path)
    ours = open_checkpoint(write_gguf(tmp_path / "model.gguf", tmp_path))
    record = RECORD[family]
    assert ours.metadata["general.architecture"] == record["architecture"]
    for key, expected in record["metadata"].items():
        found = ours.metadata.get(key)
        found = found.tolist() if isinstance(found, np.ndarray) else found
        close = isinstance(expected, float) and isinstance(found, float) and math.isclose(expected, found, rel_tol=1e-6)
        assert found == expected or close or key in DIFFERENT, key
    assert set(ours.tensors) == set(record["tensors"])
    for name, (shape, crc) in record["tensors"].items():
        assert list(ours.tensors[name].shape) == shape, name
        # The exponential of qwen3_next's decay may differ in its last bit between machines.
        assert zlib.crc32(ours.raw(name).tobytes()) == crc or name.endswith("ssm_a"), name
