"""Roles of every module that owns a tensor, on stock models of all families, against a table written by hand."""

from __future__ import annotations

import fnmatch

import pytest
import torch
from tests.tiny_models import FAMILIES, tiny_config
from transformers import AutoModelForCausalLM

from moesaic.placement import ROLES, module_roles

# First match wins; written from the model library's own names, not from the code under test.
EXPECTED = (
    ("model.embed_tokens", "embedding"),
    ("lm_head", "lm_head"),
    ("*norm", "norm"),  # input_layernorm, q_norm, kv_a_layernorm, linear_attn.norm, model.norm
    ("*.self_attn*", "attention"),
    ("*.linear_attn*", "attention"),
    ("*.experts*", "experts"),
    ("*.shared_expert*", "shared_experts"),  # also shared_expert_gate and shared_experts
    ("*.shared_mlp*", "shared_experts"),
    ("*.mlp.gate", "router"),
    ("*.mlp.gate.*", "router"),
    ("*.router", "router"),
    ("*.mlp*", "mlp"),
    ("*.block_sparse_moe*", "mlp"),
)


@pytest.mark.parametrize("family", FAMILIES)
def test_roles_of_a_stock_model(family: str) -> None:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(tiny_config(family))
    roles = module_roles(model)
    assert list(roles) == [name for name, _ in model.named_modules()]
    for name, module in model.named_modules():
        if module._parameters or module._buffers.keys() - module._non_persistent_buffers_set:
            expected = next(role for pattern, role in EXPECTED if fnmatch.fnmatchcase(name, pattern))
            assert roles[name] == expected, name
    assert set(roles.values()) <= set(ROLES)
    assert {"experts", "router", "attention", "norm", "embedding", "lm_head"} <= set(roles.values())


def test_containers_and_rotary_embeddings_have_no_role() -> None:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(tiny_config("deepseek_v3"))
    roles = module_roles(model)
    for name in ("", "model", "model.layers", "model.layers.0", "model.rotary_emb"):
        assert roles[name] == "other"


def test_a_dense_layer_is_an_mlp_and_has_no_router() -> None:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(tiny_config("deepseek_v3"))
    roles = module_roles(model)
    assert roles["model.layers.0.mlp"] == roles["model.layers.0.mlp.gate_proj"] == "mlp"
    assert "model.layers.0.mlp.experts" not in roles
