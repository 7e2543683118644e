"""How a model's authors want it to be sampled: `generation_config.json`, or the `general.sampling.*` keys of a GGUF.

It knows no tokenizer and no user's options.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from transformers import GenerationConfig

from moesaic.errors import CheckpointError
from moesaic.weights import Checkpoint

__all__ = ["generation_config_for", "sampling_metadata"]

_FILE = "generation_config.json"
_MAX_FILE_BYTES = 1 << 20
# GGUF key (llama.cpp's and gguf's constants) -> field of a generation config, least and greatest value.
_KEYS: Mapping[str, tuple[str, float, float]] = MappingProxyType(
    {
        "general.sampling.temp": ("temperature", 0.0, 100.0),
        "general.sampling.top_k": ("top_k", 0, 1 << 31),
        "general.sampling.top_p": ("top_p", 0.0, 1.0),
        "general.sampling.min_p": ("min_p", 0.0, 1.0),
    }
)


def generation_config_for(checkpoint: Checkpoint, default: GenerationConfig | None = None) -> GenerationConfig:
    """The generation config of a checkpoint.

    Args:
        checkpoint: where to look.
        default: what the model's own config says (special tokens); a GGUF's keys are added to it, while a
            `generation_config.json` replaces it, as in transformers.

    Raises:
        CheckpointError: the file is no JSON object, or a key of the GGUF is not a number in its range.
    """
    stored = {} if default is None else default.to_diff_dict()
    if checkpoint.kind == "gguf":
        return GenerationConfig.from_dict(stored | _from_gguf(checkpoint))
    own = _from_folder(checkpoint) if checkpoint.kind == "safetensors" else {}
    return GenerationConfig.from_dict(own or stored)


def sampling_metadata(checkpoint: Checkpoint) -> dict[str, Any]:
    """What a checkpoint says about sampling as keys of a GGUF; a temperature of 0 says that it is not sampled."""
    config = generation_config_for(checkpoint)
    if config.do_sample is None:
        return {}
    if not config.do_sample:
        return {"general.sampling.temp": 0.0}
    values = {key: getattr(config, field) for key, (field, _, _) in _KEYS.items()}
    return {
        key: int(value) if key.endswith("top_k") else float(value) for key, value in values.items() if value is not None
    }


def _from_folder(checkpoint: Checkpoint) -> dict[str, Any]:
    file = checkpoint.path / _FILE
    if not file.is_file():
        return {}
    if file.stat().st_size > _MAX_FILE_BYTES:
        raise CheckpointError(file, f"has {file.stat().st_size} bytes: expected at most 1 MiB.")
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(file, f"is not JSON: {error}.") from error
    if not isinstance(values, dict):
        raise CheckpointError(file, "is not a JSON object.")
    return values


def _from_gguf(checkpoint: Checkpoint) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for key, (field, low, high) in _KEYS.items():
        value = checkpoint.metadata.get(key)
        if value is None:
            continue
        if (
            isinstance(value, bool)
            or not isinstance(value, int | float)
            or not low <= value <= high
            or math.isnan(value)
        ):
            raise CheckpointError(checkpoint.path, f"is {value}: expected a number from {low} to {high}.", tensor=key)
        values[field] = int(value) if field == "top_k" else float(value)
    if "temperature" in values:
        values["do_sample"] = values["temperature"] > 0
    if not values.get("do_sample", True):
        values = {"do_sample": False}
    return values
