"""MiniMax-M2."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from transformers import PretrainedConfig

from moesaic.models.base import Family
from moesaic.models.gguf_metadata import GgufMetadata

__all__ = ["MiniMaxM2"]

_SIGMOID = 2


class MiniMaxM2(Family):
    """Sigmoid router with a selection bias; rotary embedding on a part of each head."""

    model_type = "minimax_m2"
    architecture = "minimax-m2"
    expert_count_field = "num_local_experts"
    aliases: ClassVar[Mapping[str, str]] = {"mlp.e_score_correction_bias": "exp_probs_b.bias"}

    def config_fields(self, metadata: GgufMetadata) -> dict[str, Any]:
        """The experts' width stands in its own key."""
        fields = super().config_fields(metadata)
        return fields | {"intermediate_size": metadata.integer("expert_feed_forward_length")}

    def rope_fields(self, metadata: GgufMetadata) -> dict[str, Any]:
        """Add the rotated share of a head."""
        head_dim = metadata.integer("attention.key_length")
        share = metadata.integer("rope.dimension_count", head_dim) / head_dim
        return super().rope_fields(metadata) | {"partial_rotary_factor": share}

    def metadata(self, config: PretrainedConfig) -> dict[str, Any]:
        """Add the router's kind, the experts' width and the rotated dimensions."""
        share = config.rope_parameters.get("partial_rotary_factor", 1.0)
        return super().metadata(config) | {
            f"{self.architecture}.expert_feed_forward_length": config.intermediate_size,
            f"{self.architecture}.expert_gating_func": _SIGMOID,
            f"{self.architecture}.rope.dimension_count": int(config.head_dim * share),
        }
