"""Mixtral: in GGUF the `llama` architecture with experts, with interleaved rotary pairs."""

from __future__ import annotations

from typing import Any

import numpy as np
from transformers import PretrainedConfig

from moesaic.models.base import Family, split_head_order
from moesaic.models.gguf_metadata import GgufMetadata

__all__ = ["Mixtral"]


class Mixtral(Family):
    """`llama` files that have experts; dense ones are no business of ours."""

    model_type = "mixtral"
    architecture = "llama"
    expert_count_field = "num_local_experts"

    def claims(self, metadata: GgufMetadata) -> bool:
        """Only files with routed experts."""
        return metadata.has("expert_count") and metadata.integer("expert_count", least=0) > 0

    def config_fields(self, metadata: GgufMetadata) -> dict[str, Any]:
        """Add `head_dim`, which older files give as the number of rotary dimensions."""
        fields = super().config_fields(metadata)
        if "head_dim" not in fields and metadata.has("rope.dimension_count"):
            fields["head_dim"] = metadata.integer("rope.dimension_count")
        return fields

    def metadata(self, config: PretrainedConfig) -> dict[str, Any]:
        """Add the number of rotary dimensions."""
        return super().metadata(config) | {f"{self.architecture}.rope.dimension_count": _head_dim(config)}

    def row_order(self, parameter: str, config: PretrainedConfig) -> np.ndarray | None:
        """Rows of q and k are interleaved for llama.cpp's rotary embedding."""
        if ".q_proj." in parameter:
            return split_head_order(config.num_attention_heads, _head_dim(config))
        if ".k_proj." in parameter:
            return split_head_order(config.num_key_value_heads, _head_dim(config))
        return None


def _head_dim(config: PretrainedConfig) -> int:
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)
