"""GLM-4.5, 4.6 and 4.7 (`glm4_moe`)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from transformers import PretrainedConfig

from moesaic.models.base import COMMON_KEYS, MOE_KEYS, Family, Key
from moesaic.models.gguf_metadata import GgufMetadata

__all__ = ["Glm4Moe"]

_SIGMOID = 2


class Glm4Moe(Family):
    """Sigmoid router with bias and groups, leading dense layers; multi-token prediction layers are not run."""

    model_type = "glm4_moe"
    architecture = "glm4moe"
    keys = (
        *COMMON_KEYS,
        *MOE_KEYS,
        Key("moe_intermediate_size", "expert_feed_forward_length", int),
        Key("n_shared_experts", "expert_shared_count", int),
        Key("first_k_dense_replace", "leading_dense_block_count", int),
        Key("routed_scaling_factor", "expert_weights_scale", float, 1.0),
        Key("norm_topk_prob", "expert_weights_norm", bool, True),
        Key("n_group", "expert_group_count", int, 1),
        Key("topk_group", "expert_group_used_count", int, 1),
    )
    constants: ClassVar[Mapping[str, Any]] = {"num_nextn_predict_layers": 0}
    expert_count_field = "n_routed_experts"
    aliases: ClassVar[Mapping[str, str]] = {"mlp.gate.e_score_correction_bias": "exp_probs_b.bias"}

    def config_fields(self, metadata: GgufMetadata) -> dict[str, Any]:
        """Add whether q and k are normed and have biases, which only the tensors say."""
        return super().config_fields(metadata) | {
            "use_qk_norm": metadata.has_tensor("blk.0.attn_q_norm.weight"),
            "attention_bias": metadata.has_tensor("blk.0.attn_q.bias"),
        }

    def rope_fields(self, metadata: GgufMetadata) -> dict[str, Any]:
        """Add the rotated share of a head."""
        head_dim = metadata.integer("attention.key_length")
        share = metadata.integer("rope.dimension_count", head_dim // 2) / head_dim
        return super().rope_fields(metadata) | {"partial_rotary_factor": share}

    def metadata(self, config: PretrainedConfig) -> dict[str, Any]:
        """Add the router's kind and the rotated dimensions."""
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        share = config.rope_parameters.get("partial_rotary_factor", 0.5)
        return super().metadata(config) | {
            f"{self.architecture}.expert_gating_func": _SIGMOID,
            f"{self.architecture}.rope.dimension_count": int(head_dim * share),
        }
