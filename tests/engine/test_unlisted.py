"""Architectures that nobody listed: they run on the forwards of the model library, and give its numbers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tests.engine.pairs import relative_error
from tests.tiny_models import tiny_inputs
from transformers import AutoConfig, AutoModelForCausalLM

from moesaic.engine.loader import load, prepare
from moesaic.modules import FAMILIES

_COMMON: dict[str, Any] = {
    **{"vocab_size": 512, "hidden_size": 256, "intermediate_size": 512, "moe_intermediate_size": 256},
    **{"num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64},
    **{"max_position_embeddings": 512, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None},
}
_MLA: dict[str, Any] = {
    **{"kv_lora_rank": 256, "q_lora_rank": 256, "qk_nope_head_dim": 64, "qk_rope_head_dim": 32, "v_head_dim": 64},
    **{"n_routed_experts": 8, "num_experts_per_tok": 3, "n_group": 1, "topk_group": 1, "num_key_value_heads": 4},
}
_MODELS: dict[str, dict[str, Any]] = {
    "glm4_moe_lite": _MLA | {"n_shared_experts": 1},  # MLA
    "deepseek_v32": _MLA,  # MLA with an indexer, which reads a weight itself
    "lfm2_moe": {"num_experts": 4, "num_dense_layers": 1, "layer_types": ["conv", "full_attention", "conv"]},
    "afmoe": {"num_experts": 4, "num_experts_per_tok": 2},  # four norms a layer, a gate on attention
    "gemma3_text": {},  # no MoE; norms of 1 + weight, an embedding with a scale, windows
    "minimax": {"num_local_experts": 4},  # a cache of its own
}


@pytest.mark.parametrize("model_type", _MODELS)
def test_logits_and_tokens(model_type: str, tmp_path: Path) -> None:
    assert model_type not in FAMILIES
    torch.manual_seed(0)
    config = AutoConfig.for_model(model_type, **(_COMMON | _MODELS[model_type]))
    config._attn_implementation = "eager"
    stock = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in stock.parameters():
            if parameter.ndim < 2:
                parameter.add_(0.1 * torch.randn(parameter.shape))
    stock.save_pretrained(tmp_path)
    ours, ids = load(prepare(str(tmp_path)), progress=False), tiny_inputs(batch=2, length=9)
    with torch.no_grad():
        assert relative_error(ours(ids).logits, stock(ids).logits) < 1e-4
    arguments = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    assert torch.equal(ours.generate(ids, **arguments), stock.generate(ids, **arguments))
