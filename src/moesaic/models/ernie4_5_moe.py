"""ERNIE 4.5 MoE."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from transformers import PretrainedConfig

from moesaic.models.base import COMMON_KEYS, Family, Key
from moesaic.models.gguf_metadata import GgufMetadata

__all__ = ["Ernie45Moe"]


class Ernie45Moe(Family):
    """Softmax router with a selection bias, leading dense layers, shared experts."""

    model_type = "ernie4_5_moe"
    architecture = "ernie4_5-moe"
    keys = (
        *COMMON_KEYS,
        Key("moe_k", "expert_used_count", int),
        Key("moe_intermediate_size", "expert_feed_forward_length", int),
        Key("moe_num_shared_experts", "expert_shared_count", int, 0),
        Key("moe_layer_start_index", "leading_dense_block_count", int, 0),
        Key("moe_layer_interval", "interleave_moe_layer_step", int, 1),
    )
    expert_count_field = "moe_num_experts"
    head_dim_from_key_length = False
    aliases: ClassVar[Mapping[str, str]] = {"mlp.gate.moe_statics.e_score_correction_bias": "exp_probs_b.bias"}

    def config_fields(self, metadata: GgufMetadata) -> dict[str, Any]:
        """Add whether projections have biases, which only the tensors say."""
        return super().config_fields(metadata) | {"use_bias": metadata.has_tensor("blk.0.attn_q.bias")}

    def metadata(self, config: PretrainedConfig) -> dict[str, Any]:
        """Add the width of the shared experts together."""
        width = config.moe_intermediate_size * config.moe_num_shared_experts
        return super().metadata(config) | {f"{self.architecture}.expert_shared_feed_forward_length": width}
