"""Qwen3-MoE."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from moesaic.models.base import COMMON_KEYS, MOE_KEYS, Family, Key
from moesaic.models.gguf_metadata import GgufMetadata

__all__ = ["Qwen3Moe"]


class Qwen3Moe(Family):
    """All layers have experts, except those listed in `mlp_only_layers`; probabilities are always normalised."""

    model_type = "qwen3_moe"
    architecture = "qwen3moe"
    keys = (*COMMON_KEYS, *MOE_KEYS, Key("moe_intermediate_size", "expert_feed_forward_length", int))
    constants: ClassVar[Mapping[str, Any]] = {"norm_topk_prob": True, "decoder_sparse_step": 1}

    def config_fields(self, metadata: GgufMetadata) -> dict[str, Any]:
        """Add which layers are dense and whether projections have a bias, which only the tensors say."""
        sparse = set(metadata.layers_with("ffn_gate_inp.weight"))
        return super().config_fields(metadata) | {
            "mlp_only_layers": [layer for layer in range(metadata.num_layers) if layer not in sparse],
            "attention_bias": metadata.has_tensor("blk.0.attn_q.bias"),
        }
