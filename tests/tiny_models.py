"""Tiny random models of every family that the tests cover, made by stock transformers.

The dimensions are multiples of 256 where k-quants need it, small enough that a forward takes milliseconds. Every
parameter and persistent buffer is random (norm weights, biases, sinks, router biases too), so that a tensor that was
forgotten, swapped or permuted changes the logits. This module knows nothing of moesaic: it is the oracle's side.
"""

from __future__ import annotations

import zlib
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

__all__ = [
    "ALL_FAMILIES",
    "FAMILIES",
    "fill_with_pattern",
    "make_tiny_model",
    "save_large",
    "save_tiny",
    "tiny_config",
    "tiny_inputs",
]

_COMMON: dict[str, Any] = {
    "vocab_size": 512,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 128,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
}
_MLA: dict[str, Any] = {
    "num_key_value_heads": 4,
    "kv_lora_rank": 256,
    "q_lora_rank": 256,
    "qk_nope_head_dim": 64,
    "qk_rope_head_dim": 32,
    "v_head_dim": 64,
    "moe_intermediate_size": 256,
    "n_routed_experts": 8,
    "num_experts_per_tok": 3,
    "first_k_dense_replace": 1,
}

_FAMILIES: dict[str, dict[str, Any]] = {
    "deepseek_v2": _MLA
    | {
        "q_lora_rank": None,
        "n_shared_experts": 2,
        "topk_method": "group_limited_greedy",
        "n_group": 4,
        "topk_group": 2,
        "routed_scaling_factor": 2.0,
        "rope_parameters": _YARN | {"mscale": 0.707, "mscale_all_dim": 0.707},
    },
    "deepseek_v3": _MLA
    | {
        "n_shared_experts": 1,
        "n_group": 4,
        "topk_group": 2,
        "norm_topk_prob": True,
        "routed_scaling_factor": 2.5,
        "num_nextn_predict_layers": 0,
        "rope_parameters": _YARN | {"mscale": 1.0, "mscale_all_dim": 1.0},
    },
    "glm4_moe": {
        "head_dim": 64,
        "moe_intermediate_size": 256,
        "n_routed_experts": 8,
        "num_experts_per_tok": 3,
        "n_shared_experts": 1,
        "first_k_dense_replace": 1,
        "attention_bias": True,
        "use_qk_norm": True,
        "routed_scaling_factor": 1.5,
        "num_nextn_predict_layers": 0,
    },
    "qwen2_moe": {
        "moe_intermediate_size": 256,
        "shared_expert_intermediate_size": 512,
        "num_experts": 8,
        "num_experts_per_tok": 3,
    },
    "qwen3_moe": {
        "head_dim": 64,
        "moe_intermediate_size": 256,
        "num_experts": 8,
        "num_experts_per_tok": 3,
        "norm_topk_prob": True,
    },
    "qwen3_next": {
        "num_hidden_layers": 4,
        "head_dim": 64,
        "linear_key_head_dim": 32,
        "linear_value_head_dim": 32,
        "linear_num_key_heads": 4,
        "linear_num_value_heads": 8,
        "moe_intermediate_size": 256,
        "shared_expert_intermediate_size": 256,
        "num_experts": 8,
        "num_experts_per_tok": 3,
    },
    "gpt_oss": {
        "num_hidden_layers": 2,
        "intermediate_size": 256,
        "head_dim": 64,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "sliding_window": 8,
        "rope_parameters": _YARN | {"rope_theta": 150000.0, "truncate": False},
    },
    "mixtral": {
        "intermediate_size": 256,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
    },
    "minimax_m2": {
        "intermediate_size": 256,
        "head_dim": 64,
        "num_local_experts": 8,
        "num_experts_per_tok": 3,
        "rope_parameters": {"rope_type": "default", "rope_theta": 5000000.0, "partial_rotary_factor": 0.5},
    },
    "hunyuan_v1_moe": {
        "head_dim": 64,
        "intermediate_size": 256,
        "num_experts": 4,
        "moe_topk": 2,
        "tie_word_embeddings": True,
    },
    "olmoe": {
        "intermediate_size": 256,
        "num_experts": 8,
        "num_experts_per_tok": 3,
    },
    "ernie4_5_moe": {
        "moe_intermediate_size": 256,
        "moe_num_experts": 8,
        "moe_k": 3,
        "moe_num_shared_experts": 2,
        "moe_layer_start_index": 1,
        "tie_word_embeddings": True,
    },
    "granitemoe": {
        "intermediate_size": 256,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "embedding_multiplier": 3.0,
        "logits_scaling": 2.0,
        "residual_multiplier": 0.5,
        "attention_multiplier": 0.125,
        "tie_word_embeddings": True,
    },
}

FAMILIES: tuple[str, ...] = tuple(_FAMILIES)
"""The `model_type`s that the project promises, in the order of the issue."""

# Families added later; they are tested where checkpoints are mapped, not in every test over all families.
_FAMILIES["dots1"] = {
    "head_dim": 64,
    "moe_intermediate_size": 256,
    "n_routed_experts": 8,
    "num_experts_per_tok": 3,
    "n_shared_experts": 2,
    "first_k_dense_replace": 1,
    "norm_topk_prob": True,
    "routed_scaling_factor": 2.5,
    "sliding_window": None,
}
ALL_FAMILIES: tuple[str, ...] = tuple(_FAMILIES)
"""Every `model_type` that GGUF files can be of."""


def tiny_config(model_type: str, **overrides: Any) -> PretrainedConfig:
    """The tiny configuration of a family; `overrides` replace single fields."""
    config = AutoConfig.for_model(model_type, **(_COMMON | _FAMILIES[model_type] | overrides))
    config.architectures = [AutoModelForCausalLM._model_mapping[type(config)].__name__]
    return config


def _randomise(name: str, tensor: torch.Tensor, generator: torch.Generator) -> None:
    """Fill one parameter so that activations stay near 1 and no tensor is trivially 0 or 1."""
    noise = torch.randn(tensor.shape, generator=generator)
    if name.endswith("A_log"):
        value = noise.abs().mul(0.5)
    elif name.endswith("norm.weight") or name.endswith("layernorm.weight") or name.endswith("_norm.weight"):
        value = noise.mul(0.2).add(1.0)
    elif tensor.ndim < 2:
        value = noise.mul(0.1)
    else:
        value = noise.div(tensor.shape[-1] ** 0.5)
    tensor.copy_(value)


def make_tiny_model(
    model_type: str, seed: int = 0, dtype: torch.dtype = torch.float32, **overrides: Any
) -> PreTrainedModel:
    """A stock eager model of the family with random weights, in eval mode; equal seeds give equal weights."""
    config = tiny_config(model_type, **overrides)
    config._attn_implementation = "eager"
    model = AutoModelForCausalLM.from_config(config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in sorted(model.state_dict(keep_vars=True).items()):
            if torch.is_floating_point(tensor):
                _randomise(name, tensor, generator)
        model.tie_weights()
    return model.to(dtype).eval()


def save_tiny(
    folder: Path, model_type: str, seed: int = 0, dtype: torch.dtype = torch.float32, **overrides: Any
) -> PreTrainedModel:
    """Save a tiny model into `folder` as transformers writes it (the original checkpoint names); return the model."""
    model = make_tiny_model(model_type, seed, dtype, **overrides)
    model.save_pretrained(folder)
    return model


def save_large(folder: Path, model_type: str, **overrides: Any) -> None:
    """Save a model of some hundred megabytes in bfloat16, in no time: its weights repeat a thousand random numbers."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(tiny_config(model_type, **overrides), dtype=torch.bfloat16)
    model = model.to_empty(device="cpu")
    numbers = torch.randn(1009, generator=torch.Generator().manual_seed(0)).mul(0.03).to(torch.bfloat16)
    for tensor in model.state_dict().values():
        tensor.copy_(numbers.repeat(tensor.numel() // len(numbers) + 1)[: tensor.numel()].view(tensor.shape))
    model.save_pretrained(folder)


def tiny_inputs(batch: int = 2, length: int = 13, seed: int = 0, vocab_size: int = 512) -> torch.Tensor:
    """Random token ids `[batch, length]`, none of them a special one."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, vocab_size, (batch, length), generator=generator)


def fill_with_pattern(model: PreTrainedModel) -> PreTrainedModel:
    """Replace all weights by numbers that depend on names and positions only, the same on every version and machine."""
    with torch.no_grad():
        for name, tensor in model.state_dict(keep_vars=True).items():
            if torch.is_floating_point(tensor):
                steps = torch.arange(tensor.numel()) * 40503 + zlib.crc32(name.encode())
                tensor.copy_(((steps % 65521).to(torch.float64) / 65536 - 0.5).reshape(tensor.shape))
        model.tie_weights()
    return model
