"""OLMoE."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from transformers import PretrainedConfig

from moesaic.models.base import Family
from moesaic.models.gguf_metadata import GgufMetadata

__all__ = ["Olmoe"]


class Olmoe(Family):
    """Experts in every layer, norms over the whole of q and k; probabilities are not normalised."""

    model_type = "olmoe"
    architecture = "olmoe"
    constants: ClassVar[Mapping[str, Any]] = {"norm_topk_prob": False}
    head_dim_from_key_length = False

    def config_fields(self, metadata: GgufMetadata) -> dict[str, Any]:
        """Add the clamp of q, k and v, if there is one."""
        fields = super().config_fields(metadata)
        if metadata.has("attention.clamp_kqv"):
            fields["clip_qkv"] = metadata.real("attention.clamp_kqv")
        return fields

    def metadata(self, config: PretrainedConfig) -> dict[str, Any]:
        """Add the clamp of q, k and v, if there is one."""
        clamp = {} if config.clip_qkv is None else {f"{self.architecture}.attention.clamp_kqv": float(config.clip_qkv)}
        return super().metadata(config) | clamp
