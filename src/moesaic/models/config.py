"""From a checkpoint to the Hugging Face config of its model.

It runs no code of the checkpoint: an architecture that transformers does not have is refused.
"""

from __future__ import annotations

from collections.abc import Mapping

from transformers import CONFIG_MAPPING, PretrainedConfig

from moesaic.errors import CheckpointError, UnsupportedModelError
from moesaic.models.families import family_of
from moesaic.models.gguf_metadata import GgufMetadata
from moesaic.weights import Checkpoint

__all__ = ["config_for", "config_from_dict"]

# Model types whose repositories bring their own code for an architecture that transformers has.
_SAME_ARCHITECTURE = {"kimi_k2": "deepseek_v3"}


def config_for(checkpoint: Checkpoint) -> PretrainedConfig:
    """The config of the checkpoint's model, checked against the number of its tensors.

    Raises:
        UnsupportedModelError: the architecture is unknown here or in transformers.
        CheckpointError: the metadata contradict the tensors or themselves.
    """
    if checkpoint.kind == "gguf":
        return _config_from_gguf(checkpoint)
    config = config_from_dict(checkpoint.metadata, checkpoint)
    num_layers = getattr(config, "num_hidden_layers", None)
    if type(num_layers) is not int or not 0 < num_layers <= len(checkpoint.tensors):
        raise CheckpointError(
            checkpoint.path,
            f"is {num_layers!r}: the file has only {len(checkpoint.tensors)} tensors.",
            tensor="num_hidden_layers",
        )
    return config


def _config_from_gguf(checkpoint: Checkpoint) -> PretrainedConfig:
    """The config that a GGUF's metadata describe, by the file's family."""
    metadata = GgufMetadata(checkpoint)
    family = family_of(metadata)
    fields = family.config_fields(metadata)
    try:
        return CONFIG_MAPPING[family.model_type](**fields)
    except Exception as error:  # validators of several libraries, and arithmetic on values that they let pass
        raise CheckpointError(checkpoint.path, f"the metadata are refused by transformers: {error}") from error


def config_from_dict(values: Mapping[str, object], checkpoint: Checkpoint) -> PretrainedConfig:
    """The config that a config.json describes.

    Raises:
        UnsupportedModelError: transformers has no such model type.
        CheckpointError: transformers refuses the values.
    """
    model_type = values.get("model_type")
    known = _SAME_ARCHITECTURE.get(str(model_type), str(model_type))
    if known not in CONFIG_MAPPING:
        raise UnsupportedModelError(
            f"{checkpoint.path}: config.json says model_type {model_type!r}, which this transformers does not have."
        )
    rest = {key: value for key, value in values.items() if key not in ("model_type", "auto_map", "quantization_config")}
    try:
        return CONFIG_MAPPING[known].from_dict(rest)
    except Exception as error:  # as above
        raise CheckpointError(checkpoint.path, f"config.json is refused by transformers: {error}") from error
