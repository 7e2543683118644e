"""dots.llm1: attention as in Qwen3, experts and router as in DeepSeek-V3."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from moesaic.models.base import COMMON_KEYS, MOE_KEYS, Family, Key
from moesaic.models.gguf_metadata import GgufMetadata

__all__ = ["Dots1"]


class Dots1(Family):
    """Sigmoid router with bias, leading dense layers, shared experts; no layer attends through a window."""

    model_type = "dots1"
    architecture = "dots1"
    keys = (
        *COMMON_KEYS,
        *MOE_KEYS,
        Key("moe_intermediate_size", "expert_feed_forward_length", int),
        Key("n_shared_experts", "expert_shared_count", int),
        Key("first_k_dense_replace", "leading_dense_block_count", int),
        Key("routed_scaling_factor", "expert_weights_scale", float, 1.0),
        Key("norm_topk_prob", "expert_weights_norm", bool, False),
        Key("n_group", "expert_group_count", int, 1),
        Key("topk_group", "expert_group_used_count", int, 1),
    )
    constants: ClassVar[Mapping[str, Any]] = {"sliding_window": None}
    expert_count_field = "n_routed_experts"
    aliases: ClassVar[Mapping[str, str]] = {"mlp.gate.e_score_correction_bias": "exp_probs_b.bias"}

    def config_fields(self, metadata: GgufMetadata) -> dict[str, Any]:
        """Add whether projections have biases, which only the tensors say."""
        return super().config_fields(metadata) | {"attention_bias": metadata.has_tensor("blk.0.attn_q.bias")}
