"""Metadata that lie: whatever a GGUF's keys or a config.json say, only typed errors come out, and quickly."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

import numpy as np
import pytest
from tests.models.helpers import write_gguf
from tests.tiny_models import FAMILIES, save_tiny
from transformers import PreTrainedModel

from moesaic.errors import MoesaicError
from moesaic.models import build_meta_model, build_weight_map, config_for
from moesaic.weights import Checkpoint, Rows, open_checkpoint

SECONDS = 20.0
EXTREMES: tuple[object, ...] = (
    0, 1, -1, 3, 7, 1 << 20, (1 << 31) - 1, 1 << 31, (1 << 64) - 1, 0.0, -1.5, 1e38, math.inf, math.nan,
    True, False, "", "yarn", "x" * 1000, np.arange(3), ("a", "b"), None, [], {}, [1] * 5, {"a": 1},
)  # fmt: skip


class Altered:
    """A checkpoint with other metadata."""

    def __init__(self, base: Checkpoint, metadata: Mapping[str, object]) -> None:
        self.base, self.metadata = base, metadata
        self.path, self.kind, self.tensors = base.path, base.kind, base.tensors

    def raw(self, name: str, rows: Rows | None = None) -> np.ndarray:
        return self.base.raw(name, rows)

    def release(self, name: str) -> None:
        self.base.release(name)

    def close(self) -> None:
        self.base.close()


def map_safely(checkpoint: Checkpoint, built: dict[str, PreTrainedModel] | None = None) -> str:
    """What came out; any error outside the tree of ours fails the test, as does a long time.

    `built` has models by their configs, so that equal ones are built once; nobody changes them.
    """
    start = time.process_time()
    try:
        config = config_for(checkpoint)
        if built is None:
            model = build_meta_model(config)
        elif (model := built.get(key := repr(config.to_dict()))) is None:
            model = built[key] = build_meta_model(config)
        build_weight_map(model, checkpoint)
        return "sound"
    except MoesaicError as error:
        return type(error).__name__
    finally:
        assert time.process_time() - start < SECONDS


@pytest.mark.parametrize("family", ["mixtral", "deepseek_v3", "qwen3_next", "gpt_oss", "hunyuan_v1_moe", "qwen2_moe"])
def test_gguf_metadata(family: str, tmp_path: Path) -> None:
    save_tiny(tmp_path, family)
    sound = open_checkpoint(write_gguf(tmp_path / "model.gguf", tmp_path))
    assert map_safely(sound) == "sound"
    rng = np.random.default_rng(FAMILIES.index(family))
    for key in sound.metadata:
        without = {other: value for other, value in sound.metadata.items() if other != key}
        map_safely(Altered(sound, MappingProxyType(without)))
        for index in rng.choice(len(EXTREMES), 5, replace=False):
            map_safely(Altered(sound, MappingProxyType(without | {key: EXTREMES[index]})))


@pytest.mark.parametrize("family", ["deepseek_v3", "gpt_oss", "granitemoe"])
def test_config_json(family: str, tmp_path: Path) -> None:
    save_tiny(tmp_path, family)
    sound = open_checkpoint(tmp_path)
    rng = np.random.default_rng(FAMILIES.index(family))
    for key in sound.metadata:
        for index in rng.choice(len(EXTREMES), 3, replace=False):
            value = EXTREMES[index]
            map_safely(Altered(sound, dict(sound.metadata) | {key: "x" if isinstance(value, np.ndarray) else value}))


@pytest.mark.parametrize("family", ["mixtral", "deepseek_v3", "qwen3_next", "gpt_oss"])
def test_gguf_tensors_of_other_shapes(family: str, tmp_path: Path) -> None:
    """A tensor that is lost, or has the description of another one, is noticed before anything is read."""
    save_tiny(tmp_path, family)
    sound = open_checkpoint(write_gguf(tmp_path / "model.gguf", tmp_path))
    names = list(sound.tensors)
    rng, built = np.random.default_rng(0), dict[str, PreTrainedModel]()
    for name in names:
        altered = Altered(sound, sound.metadata)
        altered.tensors = {other: info for other, info in sound.tensors.items() if other != name}
        map_safely(altered, built)
        altered.tensors = dict(sound.tensors) | {name: sound.tensors[names[rng.integers(len(names))]]}
        map_safely(altered, built)
