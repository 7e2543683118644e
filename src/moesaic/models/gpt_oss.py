"""gpt-oss: biases everywhere, attention sinks, sliding window on every other layer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from transformers import PretrainedConfig

from moesaic.models.base import COMMON_KEYS, MOE_KEYS, Family, Key
from moesaic.models.gguf_metadata import GgufMetadata

__all__ = ["GptOss"]


class GptOss(Family):
    """GGUF keeps gate and up apart and untransposed, where the stock module interleaves them."""

    model_type = "gpt_oss"
    architecture = "gpt-oss"
    keys = (*COMMON_KEYS, *MOE_KEYS, Key("sliding_window", "attention.sliding_window", int))
    expert_count_field = "num_local_experts"
    aliases: ClassVar[Mapping[str, str]] = {"self_attn.sinks": "attn_sinks.weight"}

    def config_fields(self, metadata: GgufMetadata) -> dict[str, Any]:
        """The experts' width stands in its own key."""
        fields = super().config_fields(metadata)
        return fields | {"intermediate_size": metadata.integer("expert_feed_forward_length")}

    def rope_fields(self, metadata: GgufMetadata) -> dict[str, Any]:
        """The architecture does not round the bounds of YaRN's ramp."""
        return super().rope_fields(metadata) | {"truncate": False}

    def metadata(self, config: PretrainedConfig) -> dict[str, Any]:
        """Add the experts' width."""
        return super().metadata(config) | {f"{self.architecture}.expert_feed_forward_length": config.intermediate_size}
