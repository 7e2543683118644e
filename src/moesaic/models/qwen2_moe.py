"""Qwen1.5-MoE and Qwen2-MoE."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from moesaic.models.base import COMMON_KEYS, MOE_KEYS, Family, Key
from moesaic.models.gguf_metadata import GgufMetadata

__all__ = ["Qwen2Moe"]


class Qwen2Moe(Family):
    """A gated shared expert beside the routed ones; probabilities are not normalised."""

    model_type = "qwen2_moe"
    architecture = "qwen2moe"
    keys = (
        *COMMON_KEYS,
        *MOE_KEYS,
        Key("moe_intermediate_size", "expert_feed_forward_length", int),
        Key("shared_expert_intermediate_size", "expert_shared_feed_forward_length", int),
    )
    constants: ClassVar[Mapping[str, Any]] = {"norm_topk_prob": False, "decoder_sparse_step": 1}
    head_dim_from_key_length = False

    def config_fields(self, metadata: GgufMetadata) -> dict[str, Any]:
        """Add which layers are dense and whether q, k and v have a bias, which only the tensors say."""
        sparse = set(metadata.layers_with("ffn_gate_inp.weight"))
        return super().config_fields(metadata) | {
            "mlp_only_layers": [layer for layer in range(metadata.num_layers) if layer not in sparse],
            "qkv_bias": metadata.has_tensor("blk.0.attn_q.bias") or metadata.has_tensor("blk.0.attn_qkv.bias"),
        }
