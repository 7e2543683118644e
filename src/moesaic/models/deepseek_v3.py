"""DeepSeek-V3, R1, V3.1 and Kimi-K2: MLA with a sigmoid router, selection bias and expert groups."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from moesaic.models.deepseek_v2 import DeepseekV2
from moesaic.models.gguf_metadata import GgufMetadata

__all__ = ["DeepseekV3"]

_SIGMOID = 2
# Files from before October 2025 do not hold the groups. Of the published models those with 256 experts have these.
_UNNAMED_GROUPS = {256: (8, 4)}


class DeepseekV3(DeepseekV2):
    """Multi-token prediction layers are not run."""

    model_type = "deepseek_v3"
    constants: ClassVar[Mapping[str, Any]] = {"num_nextn_predict_layers": 0, "rope_interleave": True}
    aliases: ClassVar[Mapping[str, str]] = {"mlp.gate.e_score_correction_bias": "exp_probs_b.bias"}
    gating = _SIGMOID

    def claims(self, metadata: GgufMetadata) -> bool:
        """Files whose router is a sigmoid."""
        return not super().claims(metadata)

    def config_fields(self, metadata: GgufMetadata) -> dict[str, Any]:
        """Add the expert groups where an old file leaves them out."""
        fields = super().config_fields(metadata)
        if not metadata.has("expert_group_count"):
            n_group, topk_group = _UNNAMED_GROUPS.get(fields["n_routed_experts"], (1, 1))
            fields |= {"n_group": n_group, "topk_group": topk_group}
        return fields

    def router_fields(self, fields: Mapping[str, Any]) -> dict[str, Any]:
        """Nothing to choose: this class always has groups, if only one."""
        return {}
