"""Checkpoints as publishers quantise them, against stock transformers with the values that they mean.

Bounds as in test_quantised_weights.py: FP8 products have float activations and differ by float32 rounding only, but
where tiles of bfloat16 compute them; those of 4 bits round activations to int8.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tests.engine.test_quantised_weights import BOUND, MLA_BOUND, error
from tests.published import save_published
from tests.tiny_models import tiny_inputs

from moesaic import _native
from moesaic.engine.loader import load, prepare
from moesaic.quant import get_format

FLOAT32 = 1e-4
BF16_TILES = 2e-2  # operands of 8 bits of precision

CASES = [
    ("deepseek_v3", "fp8-block", "FP8"),
    ("deepseek_v3", "int4-32-experts", "INT4_32_BF16"),
    ("deepseek_v3", "awq-64", "UINT4_64_F16"),
    ("qwen3_moe", "fp8-block", "FP8"),
    ("qwen3_moe", "fp8-channel", "FP8"),
    ("qwen3_moe", "fp8-tensor", "FP8"),
    ("qwen3_moe", "int4-128-asymmetric", "UINT4_128_F16"),
    ("qwen3_moe", "int4-channel", "INT4_128_BF16"),
    ("qwen3_moe", "gptq-128", "INT4_128_F16"),
    ("qwen3_moe", "gptq-64", "INT4_64_F16"),
    ("qwen3_moe", "gptq-32", "INT4_32_F16"),
    ("qwen3_moe", "gptq-asymmetric", "UINT4_128_F16"),
    ("qwen3_moe", "gptq-v2", "UINT4_64_F16"),
    ("qwen3_moe", "awq-128", "UINT4_128_F16"),
    ("qwen3_moe", "awq-32", "UINT4_32_F16"),
    ("mixtral", "awq-128", "UINT4_128_F16"),
    ("minimax_m2", "fp8-block", "FP8"),
    ("gpt_oss", "mxfp4", "MXFP4"),
]


@pytest.mark.parametrize(("family", "scheme", "fmt"), CASES)
def test_logits(family: str, scheme: str, fmt: str, tmp_path: Path) -> None:
    stock = save_published(tmp_path, family, scheme)
    prepared = prepare(str(tmp_path))
    experts = [entry for entry in prepared.plan.entries if entry.role == "experts"]
    assert experts
    assert all({entry.formats[part] for part in ("gate", "up", "down")} == {fmt} for entry in experts)
    attention = {
        name for entry in prepared.plan.entries if ".self_attn." in entry.module for name in entry.formats.values()
    }
    only_experts = scheme in ("int4-32-experts", "mxfp4")
    assert (fmt in attention) == (not only_experts)
    ours = load(prepared, progress=False)
    ids = tiny_inputs(batch=2, length=9)
    with torch.no_grad():
        found, expected = ours(ids).logits, stock(ids).logits
    if get_format(fmt).rounds_activations:
        bound = MLA_BOUND if family == "deepseek_v3" else BOUND
    else:
        bound = BF16_TILES if _native.bf16_from(get_format(fmt).ggml_type) else FLOAT32
    assert error(found, expected.double()) < bound


def test_plan_counts_the_packed_bytes(tmp_path: Path) -> None:
    """Experts of `[256, 256]` in INT4 of group 32 with bfloat16 scales: 18 bytes for 32 weights, no more."""
    save_published(tmp_path, "deepseek_v3", "int4-32-experts")
    plan = prepare(str(tmp_path)).plan
    experts = [entry for entry in plan.entries if entry.role == "experts"]
    assert [entry.nbytes for entry in experts] == [8 * 3 * 256 * 256 // 32 * 18] * 2
    assert [entry.bytes_per_token for entry in experts] == [3 * 3 * 256 * 256 // 32 * 18] * 2


def test_rows_that_128_does_not_divide(tmp_path: Path) -> None:
    """As the dense layer of GLM-4.5-Air, whose width is 10944 = 85.5 * 128."""
    stock = save_published(tmp_path, "qwen3_moe", "fp8-channel", moe_intermediate_size=96)
    prepared = prepare(str(tmp_path))
    formats = next(entry for entry in prepared.plan.entries if entry.role == "experts").formats
    assert formats == {"gate": "FP8", "up": "FP8", "down": "FP8_32"}
    ids = tiny_inputs(batch=1, length=5)
    with torch.no_grad():
        assert error(load(prepared, progress=False)(ids).logits, stock(ids).logits.double()) < FLOAT32
