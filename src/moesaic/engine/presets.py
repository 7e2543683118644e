"""Dimensions of published models, for benches with random weights.

Only what decides speed and memory is here (dimensions, experts, heads, vocabulary), from the models' public
`config.json`. It knows no weights.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig

from moesaic.errors import ConfigError

__all__ = ["PRESETS", "Preset", "get_preset"]


@dataclass(frozen=True, slots=True)
class Preset:
    """Dimensions of one model.

    Attributes:
        description: for people.
        model_type: architecture in transformers.
        values: fields of its configuration.
    """

    description: str
    model_type: str
    values: Mapping[str, Any]

    @property
    def num_layers(self) -> int:
        """Layers of the real model."""
        return int(self.values["num_hidden_layers"])

    def config(self, num_layers: int | None = None) -> PretrainedConfig:
        """The configuration, with the first `num_layers` MoE layers only if that is given.

        A model that is cut to a few layers has no dense ones among them, so that its layers are those that most of
        the real model consists of.

        Raises:
            ConfigError: the model has fewer layers.
        """
        values = dict(self.values)
        if num_layers is not None and num_layers < self.num_layers:
            values["num_hidden_layers"] = num_layers
            if "first_k_dense_replace" in values:
                values["first_k_dense_replace"] = 0
        elif num_layers is not None and num_layers > self.num_layers:
            raise ConfigError(f"--layers {num_layers}: this model has {self.num_layers} layers.")
        config = AutoConfig.for_model(self.model_type, **values)
        config.architectures = [AutoModelForCausalLM._model_mapping[type(config)].__name__]
        return config


_DEEPSEEK_V3 = {
    "vocab_size": 129280,
    "hidden_size": 7168,
    "intermediate_size": 18432,
    "moe_intermediate_size": 2048,
    "num_hidden_layers": 61,
    "num_attention_heads": 128,
    "num_key_value_heads": 128,
    "q_lora_rank": 1536,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "n_routed_experts": 256,
    "n_shared_experts": 1,
    "num_experts_per_tok": 8,
    "n_group": 8,
    "topk_group": 4,
    "norm_topk_prob": True,
    "routed_scaling_factor": 2.5,
    "first_k_dense_replace": 3,
    "max_position_embeddings": 163840,
    "num_nextn_predict_layers": 0,
}
_QWEN3_30B = {
    "vocab_size": 151936,
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "moe_intermediate_size": 768,
    "num_hidden_layers": 48,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "norm_topk_prob": True,
    "max_position_embeddings": 40960,
}

PRESETS: Mapping[str, Preset] = MappingProxyType(
    {
        "qwen3-30b-a3b": Preset("48 layers, 128 experts of 768, top-8, GQA", "qwen3_moe", _QWEN3_30B),
        "qwen3-235b-a22b": Preset(
            "94 layers, 128 experts of 1536, top-8, GQA",
            "qwen3_moe",
            _QWEN3_30B
            | {
                "hidden_size": 4096,
                "intermediate_size": 12288,
                "moe_intermediate_size": 1536,
                "num_hidden_layers": 94,
                "num_attention_heads": 64,
            },
        ),
        "deepseek-v3": Preset("61 layers, 256 experts of 2048, top-8, MLA", "deepseek_v3", _DEEPSEEK_V3),
        "kimi-k2": Preset(
            "61 layers, 384 experts of 2048, top-8, MLA",
            "deepseek_v3",
            _DEEPSEEK_V3
            | {
                "vocab_size": 163840,
                "num_attention_heads": 64,
                "num_key_value_heads": 64,
                "n_routed_experts": 384,
                "n_group": 1,
                "topk_group": 1,
                "routed_scaling_factor": 2.827,
                "first_k_dense_replace": 1,
                "max_position_embeddings": 131072,
            },
        ),
        "glm-4.5": Preset(
            "92 layers, 160 experts of 1536, top-8, GQA",
            "glm4_moe",
            {
                "vocab_size": 151552,
                "hidden_size": 5120,
                "intermediate_size": 12288,
                "moe_intermediate_size": 1536,
                "num_hidden_layers": 92,
                "num_attention_heads": 96,
                "num_key_value_heads": 8,
                "head_dim": 128,
                "n_routed_experts": 160,
                "n_shared_experts": 1,
                "num_experts_per_tok": 8,
                "norm_topk_prob": True,
                "routed_scaling_factor": 2.5,
                "first_k_dense_replace": 3,
                "use_qk_norm": True,
                "attention_bias": True,
                "max_position_embeddings": 131072,
                "num_nextn_predict_layers": 0,
            },
        ),
        "gpt-oss-120b": Preset(
            "36 layers, 128 experts of 2880, top-4, GQA with sinks; formats with blocks of 32 or floats",
            "gpt_oss",
            {
                "vocab_size": 201088,
                "hidden_size": 2880,
                "intermediate_size": 2880,
                "num_hidden_layers": 36,
                "num_attention_heads": 64,
                "num_key_value_heads": 8,
                "head_dim": 64,
                "num_local_experts": 128,
                "num_experts_per_tok": 4,
                "sliding_window": 128,
                "max_position_embeddings": 131072,
            },
        ),
        "mixtral-8x7b": Preset(
            "32 layers, 8 experts of 14336, top-2, GQA",
            "mixtral",
            {
                "vocab_size": 32000,
                "hidden_size": 4096,
                "intermediate_size": 14336,
                "num_hidden_layers": 32,
                "num_attention_heads": 32,
                "num_key_value_heads": 8,
                "num_local_experts": 8,
                "num_experts_per_tok": 2,
                "max_position_embeddings": 32768,
            },
        ),
    }
)
"""Presets by the name that `moesaic bench --synthetic` takes."""


def get_preset(name: str) -> Preset:
    """The preset of this name.

    Raises:
        ConfigError: there is none; the message lists those there are.
    """
    found = PRESETS.get(name.lower())
    if found is None:
        raise ConfigError(f"'{name}' is no preset: expected one of {', '.join(PRESETS)}.")
    return found
