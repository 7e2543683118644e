"""Qwen3-Next: gated DeltaNet layers between gated attention, many small experts.

llama.cpp's converter adds 1 to the norms' weights, stores `-exp(A_log)`, and sorts the fused linear-attention
projection, which groups q, k, v, z by key head, into `attn_qkv` (all q, all k, all v) and `attn_gate` (all z).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
import torch
from transformers import PretrainedConfig, PreTrainedModel

from moesaic.models.base import COMMON_KEYS, MOE_KEYS, Family, Key, OutputTensor, ValueMap
from moesaic.models.gguf_metadata import GgufMetadata
from moesaic.models.tensor_ref import JoinedRef, MlaRefs, TensorRef, whole
from moesaic.weights import TensorInfo

__all__ = ["Qwen3Next"]

_NORM = ValueMap(load=lambda stored: stored - 1.0, save=lambda value: value + 1.0)
_DECAY = ValueMap(load=lambda stored: torch.log(-stored), save=lambda value: -torch.exp(value))


class Qwen3Next(Family):
    """Which layers attend fully stands in the metadata; multi-token prediction layers are not run."""

    model_type = "qwen3_next"
    architecture = "qwen3next"
    keys = (
        *COMMON_KEYS,
        *MOE_KEYS,
        Key("moe_intermediate_size", "expert_feed_forward_length", int),
        Key("shared_expert_intermediate_size", "expert_shared_feed_forward_length", int),
        Key("linear_conv_kernel_dim", "ssm.conv_kernel", int),
        Key("linear_key_head_dim", "ssm.state_size", int),
        Key("linear_num_key_heads", "ssm.group_count", int),
        Key("linear_num_value_heads", "ssm.time_step_rank", int),
    )
    constants: ClassVar[Mapping[str, Any]] = {
        "norm_topk_prob": True,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "attention_bias": False,
    }
    aliases: ClassVar[Mapping[str, str]] = {"linear_attn.dt_bias": "ssm_dt.bias"}

    def config_fields(self, metadata: GgufMetadata) -> dict[str, Any]:
        """Add the value heads' width and the kind of each layer."""
        fields = super().config_fields(metadata)
        recurrent = metadata.flags("attention.recurrent_layers")
        if recurrent is None:
            interval = metadata.integer("full_attention_interval", 4)
            recurrent = [(layer + 1) % interval != 0 for layer in range(metadata.num_layers)]
        return fields | {
            "linear_value_head_dim": metadata.integer("ssm.inner_size") // fields["linear_num_value_heads"],
            "layer_types": ["linear_attention" if linear else "full_attention" for linear in recurrent],
        }

    def rope_fields(self, metadata: GgufMetadata) -> dict[str, Any]:
        """Add the rotated share of a head."""
        head_dim = metadata.integer("attention.key_length")
        share = metadata.integer("rope.dimension_count", head_dim // 4) / head_dim
        return super().rope_fields(metadata) | {"partial_rotary_factor": share}

    def metadata(self, config: PretrainedConfig) -> dict[str, Any]:
        """Add the linear layers and the rotated dimensions."""
        share = config.rope_parameters.get("partial_rotary_factor", 0.25)
        full = [layer for layer, kind in enumerate(config.layer_types) if kind == "full_attention"]
        own = {
            "ssm.inner_size": config.linear_value_head_dim * config.linear_num_value_heads,
            "attention.recurrent_layers": [kind == "linear_attention" for kind in config.layer_types],
            "full_attention_interval": full[0] + 1 if full else config.num_hidden_layers + 1,
            "rope.dimension_count": int(config.head_dim * share),
        }
        return super().metadata(config) | {f"{self.architecture}.{key}": value for key, value in own.items()}

    def value_map(self, parameter: str) -> ValueMap | None:
        """Norms are stored with 1 added, the decay as the rate itself."""
        if parameter.endswith(".A_log"):
            return _DECAY
        if parameter.endswith("norm.weight") and not parameter.endswith("linear_attn.norm.weight"):
            return _NORM
        return None

    def special_refs(self, model: PreTrainedModel, tensors: Mapping[str, TensorInfo]) -> dict[str, TensorRef]:
        """The fused projection of the linear layers, from its two sorted parts."""
        refs: dict[str, TensorRef] = {}
        for name, wanted in model.state_dict().items():
            if not name.endswith(".linear_attn.in_proj_qkvz.weight"):
                continue
            block = f"blk.{name.split('.')[2]}"
            parts = [tensors.get(f"{block}.{part}.weight") for part in ("attn_qkv", "attn_gate")]
            found = [whole(info) for info in parts if info is not None and len(info.shape) == 2]
            if len(found) == 2 and sum(ref.shape[0] for ref in found) == wanted.shape[0]:
                order = np.argsort(_sorted_rows(model.config))
                refs[name] = JoinedRef.of(found, tuple(wanted.shape)).select(order)
        return refs

    def special_outputs(
        self, config: PretrainedConfig, parameters: Mapping[str, TensorRef], mla: Mapping[str, MlaRefs]
    ) -> Sequence[OutputTensor]:
        """Sort the fused projection of the linear layers into two tensors."""
        rows = _sorted_rows(config)
        num_z = config.linear_num_value_heads * config.linear_value_head_dim
        outputs: list[OutputTensor] = []
        for layer in range(config.num_hidden_layers):
            name = f"model.layers.{layer}.linear_attn.in_proj_qkvz.weight"
            if name in parameters:
                for key, chosen in (("attn_qkv", rows[:-num_z]), ("attn_gate", rows[-num_z:])):
                    ref = parameters[name].select(chosen)
                    outputs.append(OutputTensor(f"blk.{layer}.{key}.weight", ref.shape, (ref,), name))
        return outputs


def _sorted_rows(config: PretrainedConfig) -> np.ndarray:
    """Rows of `in_proj_qkvz` in the order of `attn_qkv`, then `attn_gate`; int64 `[rows]`."""
    key, groups = config.linear_key_head_dim, config.linear_num_key_heads
    value = config.linear_num_value_heads // groups * config.linear_value_head_dim
    rows = np.arange(groups * 2 * (key + value), dtype=np.int64).reshape(groups, -1)
    parts = np.split(rows, [key, 2 * key, 2 * key + value], axis=1)  # q, k, v, z of each group
    return np.concatenate([part.reshape(-1) for part in parts])
