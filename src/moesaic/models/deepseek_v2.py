"""DeepSeek-V2, V2-Lite and V2.5: MLA with a softmax router. In GGUF `deepseek2`, as V3.

llama.cpp stores MLA for absorption since 2025: `kv_b_proj` split into `attn_k_b` (transposed) and `attn_v_b`, with one
key-value head. Files from before hold `attn_kv_b` as it is.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from transformers import PretrainedConfig, PreTrainedModel

from moesaic.models.base import COMMON_KEYS, MOE_KEYS, Family, Key, OutputTensor
from moesaic.models.gguf_metadata import GgufMetadata
from moesaic.models.tensor_ref import JoinedRef, MlaRefs, TensorRef, whole
from moesaic.weights import TensorInfo

__all__ = ["DeepseekV2"]

_SOFTMAX, _SIGMOID = 1, 2
# The key holds 0.1 x mscale_all_dim for this architecture, for historical reasons (llama.cpp pull request 17945).
_LOG_MULTIPLIER = 0.1


class DeepseekV2(Family):
    """Files without sigmoid router and selection bias; whether experts are grouped stands in the metadata."""

    model_type = "deepseek_v2"
    architecture = "deepseek2"
    keys = (
        *(key for key in COMMON_KEYS if key.field != "num_key_value_heads"),
        *MOE_KEYS,
        Key("q_lora_rank", "attention.q_lora_rank", int, None),
        Key("kv_lora_rank", "attention.kv_lora_rank", int),
        Key("qk_rope_head_dim", "rope.dimension_count", int),
        Key("moe_intermediate_size", "expert_feed_forward_length", int),
        Key("n_shared_experts", "expert_shared_count", int),
        Key("first_k_dense_replace", "leading_dense_block_count", int),
        Key("routed_scaling_factor", "expert_weights_scale", float, 1.0),
        Key("norm_topk_prob", "expert_weights_norm", bool, False),
        Key("n_group", "expert_group_count", int, 1),
        Key("topk_group", "expert_group_used_count", int, 1),
    )
    expert_count_field = "n_routed_experts"
    head_dim_from_key_length = False
    gating = _SOFTMAX

    def claims(self, metadata: GgufMetadata) -> bool:
        """Files whose router is a softmax."""
        return not _has_sigmoid_router(metadata)

    def config_fields(self, metadata: GgufMetadata) -> dict[str, Any]:
        """Add the head dimensions, whose keys changed when the files began to hold MLA for absorption."""
        fields = super().config_fields(metadata)
        suffix = "_mla" if metadata.has("attention.key_length_mla") else ""
        key_length = metadata.integer(f"attention.key_length{suffix}")
        return (
            fields
            | {
                "num_key_value_heads": fields["num_attention_heads"],
                "qk_nope_head_dim": key_length - fields["qk_rope_head_dim"],
                "v_head_dim": metadata.integer(f"attention.value_length{suffix}"),
                "attention_bias": False,
            }
            | self.router_fields(fields)
        )

    def router_fields(self, fields: Mapping[str, Any]) -> dict[str, Any]:
        """How experts are chosen: by groups if there are several."""
        return {"topk_method": "greedy" if fields["n_group"] == 1 else "group_limited_greedy"}

    def rope_fields(self, metadata: GgufMetadata) -> dict[str, Any]:
        """Add YaRN's attention scale; files hold one value for `mscale` and `mscale_all_dim`, as all models do."""
        fields = super().rope_fields(metadata)
        if fields["rope_type"] == "yarn" and metadata.has("rope.scaling.yarn_log_multiplier"):
            mscale = float(f"{metadata.real('rope.scaling.yarn_log_multiplier') / _LOG_MULTIPLIER:.6g}")
            fields |= {"mscale": mscale, "mscale_all_dim": mscale}
        return fields

    def metadata(self, config: PretrainedConfig) -> dict[str, Any]:
        """Describe MLA as multi-query attention on the latent, as llama.cpp runs it."""
        prefix = self.architecture
        return super().metadata(config) | {
            f"{prefix}.attention.head_count_kv": 1,
            f"{prefix}.attention.key_length": config.kv_lora_rank + config.qk_rope_head_dim,
            f"{prefix}.attention.value_length": config.kv_lora_rank,
            f"{prefix}.attention.key_length_mla": config.qk_nope_head_dim + config.qk_rope_head_dim,
            f"{prefix}.attention.value_length_mla": config.v_head_dim,
            f"{prefix}.expert_gating_func": self.gating,
        }

    def rope_metadata(self, config: PretrainedConfig) -> dict[str, Any]:
        """Add YaRN's attention scale."""
        mscale = (config.rope_parameters or {}).get("mscale_all_dim")
        scale = {} if mscale is None else {"rope.scaling.yarn_log_multiplier": _LOG_MULTIPLIER * mscale}
        return super().rope_metadata(config) | scale

    def special_refs(self, model: PreTrainedModel, tensors: Mapping[str, TensorInfo]) -> dict[str, TensorRef]:
        """`kv_b_proj.weight` put together from its halves, where the file holds these."""
        refs: dict[str, TensorRef] = {}
        for layer in range(model.config.num_hidden_layers):
            k_b, v_b = _halves(layer, tensors)
            if k_b is not None and v_b is not None and f"blk.{layer}.attn_kv_b.weight" not in tensors:
                heads, latent, nope = k_b.shape
                shape = (heads * (nope + v_b.shape[1]), latent)
                refs[f"model.layers.{layer}.self_attn.kv_b_proj.weight"] = JoinedRef.of(
                    (whole(k_b), whole(v_b)), shape, _join_halves
                )
        return refs

    def mla_refs(self, model: PreTrainedModel, tensors: Mapping[str, TensorInfo]) -> dict[str, MlaRefs]:
        """The halves, one matrix per head."""
        refs: dict[str, MlaRefs] = {}
        for layer in range(model.config.num_hidden_layers):
            k_b, v_b = _halves(layer, tensors)
            if k_b is not None and v_b is not None:
                refs[f"model.layers.{layer}.self_attn"] = MlaRefs(_per_head(k_b), _per_head(v_b))
        return refs

    def special_outputs(
        self, config: PretrainedConfig, parameters: Mapping[str, TensorRef], mla: Mapping[str, MlaRefs]
    ) -> Sequence[OutputTensor]:
        """Write the halves."""
        outputs: list[OutputTensor] = []
        nope, value = config.qk_nope_head_dim, config.v_head_dim
        for layer in range(config.num_hidden_layers):
            module = f"model.layers.{layer}.self_attn"
            name = f"{module}.kv_b_proj.weight"
            halves = mla[module] if module in mla else _split(parameters[name], nope, value)
            for key, parts in (("attn_k_b", halves.k_b), ("attn_v_b", halves.v_b)):
                shape = (len(parts), *parts[0].shape)
                outputs.append(OutputTensor(f"blk.{layer}.{key}.weight", shape, parts, name))
        return outputs


def _has_sigmoid_router(metadata: GgufMetadata) -> bool:
    """Old files do not name the router; those of V3 are known by its selection bias."""
    gating = metadata.integer("expert_gating_func", 0, least=0)
    if gating not in (0, _SOFTMAX, _SIGMOID):
        raise metadata.unsupported("expert_gating_func", gating, "1 (softmax) and 2 (sigmoid)")
    return gating == _SIGMOID or bool(metadata.layers_with("exp_probs_b.bias"))


def _halves(layer: int, tensors: Mapping[str, TensorInfo]) -> tuple[TensorInfo | None, TensorInfo | None]:
    """`k_b [heads, latent, nope]` and `v_b [heads, v, latent]`, if both are there in that form."""
    found = [tensors.get(f"blk.{layer}.attn_{half}.weight") for half in ("k_b", "v_b")]
    k_b, v_b = (info if info is not None and len(info.shape) == 3 else None for info in found)
    return k_b, v_b


def _join_halves(values: Sequence[torch.Tensor]) -> torch.Tensor:
    k_b, v_b = values  # [heads, latent, nope], [heads, v, latent]
    joined = torch.cat([k_b.transpose(1, 2), v_b], dim=1)
    return joined.reshape(-1, joined.shape[-1])


def _per_head(info: TensorInfo) -> tuple[TensorRef, ...]:
    return tuple(TensorRef(info.name, info.format, info.shape[1:], head) for head in range(info.shape[0]))


def _transpose(values: torch.Tensor) -> torch.Tensor:
    return values.T


def _split(kv_b: TensorRef, nope: int, value: int) -> MlaRefs:
    """The halves of a whole `kv_b_proj.weight [heads * (nope + v), latent]`."""
    starts = range(0, kv_b.shape[0], nope + value)
    return MlaRefs(
        tuple(kv_b.select(slice(start, start + nope), _transpose) for start in starts),
        tuple(kv_b.select(slice(start + nope, start + nope + value)) for start in starts),
    )
