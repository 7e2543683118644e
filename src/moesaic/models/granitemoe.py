"""Granite 3 MoE: Mixtral's layout with four multipliers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from moesaic.models.base import COMMON_KEYS, MOE_KEYS, Key
from moesaic.models.gguf_metadata import GgufMetadata
from moesaic.models.mixtral import Mixtral

__all__ = ["GraniteMoe"]


class GraniteMoe(Mixtral):
    """Multipliers of embedding, attention, residual and logits stand in the metadata."""

    model_type = "granitemoe"
    architecture = "granitemoe"
    keys = (
        *COMMON_KEYS,
        *MOE_KEYS,
        Key("attention_multiplier", "attention.scale", float, 1.0),
        Key("embedding_multiplier", "embedding_scale", float, 1.0),
        Key("residual_multiplier", "residual_scale", float, 1.0),
        Key("logits_scaling", "logit_scale", float, 1.0),
    )
    head_dim_from_key_length = False
    aliases: ClassVar[Mapping[str, str]] = {"block_sparse_moe.router.weight": "ffn_gate_inp.weight"}

    def claims(self, metadata: GgufMetadata) -> bool:
        """Files with a shared expert are another model type of transformers."""
        return super().claims(metadata) and not metadata.has("expert_shared_feed_forward_length")
