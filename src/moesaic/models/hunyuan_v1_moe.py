"""Hunyuan-A13B (`hunyuan_v1_moe`)."""

from __future__ import annotations

from typing import Any

from transformers import PretrainedConfig

from moesaic.errors import UnsupportedModelError
from moesaic.models.base import COMMON_KEYS, Family
from moesaic.models.gguf_metadata import GgufMetadata

__all__ = ["HunYuanMoEV1"]


class HunYuanMoEV1(Family):
    """One shared MLP beside the experts, all of one width; NTK-scaled rotary base is already in the file's base."""

    model_type = "hunyuan_v1_moe"
    architecture = "hunyuan-moe"
    keys = COMMON_KEYS

    def config_fields(self, metadata: GgufMetadata) -> dict[str, Any]:
        """Experts and the shared MLP must have the one width that transformers' class has."""
        fields = super().config_fields(metadata)
        width, shared = (metadata.integer(f"expert_{kind}feed_forward_length") for kind in ("", "shared_"))
        if width != shared:
            raise metadata.unsupported("expert_shared_feed_forward_length", shared, f"the experts' width, {width}")
        return fields | {
            "intermediate_size": width,
            "moe_topk": metadata.integer("expert_used_count"),
            "attention_bias": metadata.has_tensor("blk.0.attn_q.bias"),
        }

    def metadata(self, config: PretrainedConfig) -> dict[str, Any]:
        """Add what a config may hold as a list of equal values per layer."""
        top_k = config.moe_topk if isinstance(config.moe_topk, int) else config.moe_topk[0]
        if not isinstance(config.moe_topk, int) and set(config.moe_topk) != {top_k}:
            raise UnsupportedModelError("hunyuan_v1_moe: a GGUF holds one moe_topk for all layers, the config several.")
        return super().metadata(config) | {
            f"{self.architecture}.expert_used_count": top_k,
            f"{self.architecture}.expert_feed_forward_length": config.intermediate_size,
            f"{self.architecture}.expert_shared_feed_forward_length": config.intermediate_size,
            f"{self.architecture}.expert_shared_count": 1,
        }

    def rope_metadata(self, config: PretrainedConfig) -> dict[str, Any]:
        """A fixed `alpha` ("dynamic" NTK scaling) is folded into the base, as llama.cpp's converter does."""
        rope = config.rope_parameters or {}
        alpha = rope.get("alpha")
        if rope.get("rope_type") != "dynamic" or not alpha:
            return super().rope_metadata(config)
        dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        return {"rope.freq_base": float(rope["rope_theta"] * alpha ** (dim / (dim - 2))), "rope.scaling.type": "none"}
