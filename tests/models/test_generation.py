"""Sampling settings from a folder's generation_config.json and from a GGUF's keys, and back into keys."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from transformers import GenerationConfig

from moesaic.errors import CheckpointError
from moesaic.models import generation_config_for, sampling_metadata


@dataclass
class Source:
    """As much of a checkpoint as the settings need."""

    kind: str
    path: Path = Path("model.gguf")
    metadata: dict[str, Any] = field(default_factory=dict)


def gguf(**values: Any) -> Source:
    return Source("gguf", metadata={f"general.sampling.{key}": value for key, value in values.items()})


def folder(path: Path, text: str) -> Source:
    (path / "generation_config.json").write_text(text)
    return Source("safetensors", path)


def test_a_folder_replaces_the_default(tmp_path: Path) -> None:
    source = folder(tmp_path, '{"do_sample": true, "temperature": 0.6, "top_k": 20, "eos_token_id": [7, 8]}')
    config = generation_config_for(source, GenerationConfig(eos_token_id=3))
    assert (config.do_sample, config.temperature, config.top_k, config.eos_token_id) == (True, 0.6, 20, [7, 8])
    assert sampling_metadata(source) == {"general.sampling.temp": 0.6, "general.sampling.top_k": 20}


def test_keys_of_a_gguf_are_added_to_the_default() -> None:
    config = generation_config_for(gguf(temp=0.5, top_p=0.9, top_k=40, min_p=0.05), GenerationConfig(eos_token_id=3))
    assert config.do_sample is True
    assert (config.temperature, config.top_p, config.top_k, config.min_p) == (0.5, 0.9, 40, 0.05)
    assert config.eos_token_id == 3


def test_temperature_0_means_no_sampling(tmp_path: Path) -> None:
    config = generation_config_for(gguf(temp=0.0, top_k=40))
    assert (config.do_sample, config.temperature, config.top_k) == (False, None, None)
    assert sampling_metadata(folder(tmp_path, '{"do_sample": false, "top_p": 0.9}')) == {"general.sampling.temp": 0.0}


def test_nothing_said_stays_nothing(tmp_path: Path) -> None:
    default = GenerationConfig(eos_token_id=3)
    for source in (gguf(), Source("safetensors", tmp_path), Source("synthetic")):
        config = generation_config_for(source, default)
        assert (config.do_sample, config.temperature, config.eos_token_id) == (None, None, 3)
        assert sampling_metadata(source) == {}


@pytest.mark.parametrize("text", ["[1]", "{", "\xff", "[" * 100_000, " " * (1 << 20) + "{}"])
def test_a_damaged_file_is_told(text: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"generation_config\.json"):
        generation_config_for(folder(tmp_path, text))


@pytest.mark.parametrize(
    "values", [{"temp": "hot"}, {"temp": float("nan")}, {"top_p": 1.5}, {"top_k": -1}, {"min_p": True}]
)
def test_a_bad_key_is_told(values: dict[str, Any]) -> None:
    with pytest.raises(CheckpointError, match=r"general\.sampling\."):
        generation_config_for(gguf(**values))
