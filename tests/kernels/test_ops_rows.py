"""Norms, rotary positions and elementwise steps against float64 and against the functions of stock transformers."""

from __future__ import annotations

import pytest
import torch
from transformers.models.deepseek_v2 import modeling_deepseek_v2
from transformers.models.deepseek_v3 import modeling_deepseek_v3
from transformers.models.ernie4_5_moe import modeling_ernie4_5_moe
from transformers.models.glm4_moe import modeling_glm4_moe
from transformers.models.gpt_oss import modeling_gpt_oss

from moesaic import _native
from moesaic.errors import KernelError
from moesaic.kernels import ops

WIDTHS = [1, 15, 16, 33, 128, 2880, 5000]


@pytest.fixture(autouse=True)
def isa(each_isa):
    """Every test of this module runs on each instruction set that this machine has."""
    return each_isa


def close(actual, expected, tolerance=1e-6):
    assert actual.shape == expected.shape
    error = (actual.double() - expected.double()).abs().max().item()
    assert error <= tolerance * max(1.0, expected.double().abs().max().item())


def rms(x, weight, eps):
    x = x.double()
    return x / (x.pow(2).mean(-1, keepdim=True) + eps).sqrt() * weight.double()


@pytest.mark.parametrize("width", WIDTHS)
def test_rms_norm(width):
    x, weight = torch.randn(3, 2, width), torch.randn(width)
    close(ops.rms_norm(x, weight, 1e-5), rms(x, weight, 1e-5))
    close(ops.rms_norm(x, weight, 1e-5, weight_offset=1.0), rms(x, weight + 1.0, 1e-5))
    close(ops.rms_norm(x, None, 1e-5), rms(x, torch.ones(width), 1e-5))


@pytest.mark.parametrize("width", WIDTHS)
def test_rms_norm_adds_to_the_residual_first(width):
    x, weight, residual = torch.randn(40, width), torch.randn(width), torch.randn(40, width)
    total = residual.double() + 0.22 * x.double()
    out = torch.empty(40, width)
    assert ops.rms_norm(x, weight, 1e-6, residual=residual, residual_scale=0.22, out=out) is out
    close(residual, total)
    close(out, rms(total, weight, 1e-6), 3e-6)


def test_rms_norm_of_strided_rows_and_in_place():
    x, weight = torch.randn(50, 3, 64), torch.randn(64)
    expected = rms(x[:, 1], weight, 1e-6)
    rows = x[:, 1]
    close(ops.rms_norm(rows, weight, 1e-6), expected)
    ops.rms_norm(rows, weight, 1e-6, out=rows)
    close(x[:, 1], expected)


def test_many_rows_are_split_over_threads():
    x, weight = torch.randn(300, 1000), torch.randn(1000)
    close(ops.rms_norm(x, weight, 1e-6), rms(x, weight, 1e-6))


@pytest.mark.parametrize("width", WIDTHS)
def test_layer_norm(width):
    x, weight, bias = torch.randn(4, width) * 3 + 5, torch.randn(width), torch.randn(width)
    double = [t.double() for t in (weight, bias)]
    expected = torch.nn.functional.layer_norm(x.double(), (width,), *double, 1e-5)
    close(ops.layer_norm(x, weight, bias, 1e-5), expected, 1e-5)
    close(ops.layer_norm(x, weight, None, 1e-5), expected - bias.double(), 1e-5)


def angles(batch, num_tokens, num_pairs):
    """Cos and sin as transformers' rotary modules return them: [batch, tokens, 2 * num_pairs], halves equal."""
    t = torch.rand(batch, num_tokens, num_pairs) * 6
    both = torch.cat([t, t], -1)
    return both.cos(), both.sin()


def heads(batch, num_heads, num_tokens, dim):
    return torch.randn(batch, num_tokens, num_heads, dim).transpose(1, 2)


STOCK_ROPES = {
    "half": modeling_glm4_moe.apply_rotary_pos_emb,
    "interleaved": modeling_ernie4_5_moe.apply_rotary_pos_emb,
    "interleaved_to_half": modeling_deepseek_v3.apply_rotary_pos_emb_interleave,
}


@pytest.mark.parametrize("layout", STOCK_ROPES)
@pytest.mark.parametrize("dim", [2, 64, 80, 96, 128])
def test_rope_is_that_of_transformers(layout, dim):
    q, k = heads(2, 5, 3, dim), heads(2, 1, 3, dim)
    cos, sin = angles(2, 3, dim // 2)
    expected_q, expected_k = STOCK_ROPES[layout](q, k, cos, sin)
    ops.rope_(q, k, cos[..., : dim // 2], sin[..., : dim // 2], layout=layout)
    close(q, expected_q)
    close(k, expected_k)


def test_partial_rope_leaves_the_rest():
    q, k = heads(1, 2, 4, 128), heads(1, 2, 4, 128)
    cos, sin = angles(1, 4, 32)
    expected_q, expected_k = modeling_glm4_moe.apply_rotary_pos_emb(q, k, cos, sin)
    assert torch.equal(expected_q[..., 64:], q[..., 64:])
    ops.rope_(q, k, cos[..., :32], sin[..., :32])
    close(q, expected_q)
    close(k, expected_k)


def test_rope_of_gpt_oss_and_of_complex_angles():
    q, k = heads(2, 4, 3, 64), heads(2, 2, 3, 64)
    cos, sin = (x[..., :32] for x in angles(2, 3, 32))
    expected_q, _ = modeling_gpt_oss.apply_rotary_pos_emb(q, k, cos, sin)
    rotated = q.clone()
    ops.rope_(rotated, None, cos, sin)
    close(rotated, expected_q)
    complex_angles = torch.complex(cos.contiguous(), sin.contiguous())
    expected_q, expected_k = modeling_deepseek_v2.apply_rotary_emb(q, k, complex_angles)
    ops.rope_(q, k, complex_angles.real, complex_angles.imag, layout="interleaved")
    close(q, expected_q)
    close(k, expected_k)


def test_one_row_of_angles_serves_the_batch():
    q = heads(3, 2, 5, 32)
    cos, sin = (x[..., :16] for x in angles(1, 5, 16))
    expected = q.clone()
    ops.rope_(expected, None, cos.expand(3, 5, 16).contiguous(), sin.expand(3, 5, 16).contiguous())
    ops.rope_(q, None, cos.contiguous(), sin.contiguous())
    assert torch.equal(q, expected)


@pytest.mark.parametrize("norm", ["per_head", "per_head_after_rope", "all_heads"])
@pytest.mark.parametrize("dim", [20, 128])
def test_head_norms(norm, dim):
    q, k = heads(2, 6, 3, dim), heads(2, 2, 3, dim)
    over_all = norm == "all_heads"
    q_norm, k_norm = torch.randn(6 * dim if over_all else dim), torch.randn(2 * dim if over_all else dim)
    cos, sin = angles(2, 3, dim // 2)
    expected = []
    for x, weight in ((q, q_norm), (k, k_norm)):
        x, weight = x.double(), weight.double() + 0.5
        if over_all:
            x = rms(x.transpose(1, 2).flatten(2), weight, 1e-6).view(2, 3, -1, dim).transpose(1, 2)
        if norm == "per_head":
            x = rms(x, weight, 1e-6)
        x, _ = modeling_glm4_moe.apply_rotary_pos_emb(x, x, cos.double(), sin.double())
        expected.append(rms(x, weight, 1e-6) if norm == "per_head_after_rope" else x)
    options = {"norm": norm, "q_norm": q_norm, "k_norm": k_norm, "eps": 1e-6, "weight_offset": 0.5}
    ops.norm_and_rotate_(q, k, cos[..., : dim // 2], sin[..., : dim // 2], **options)
    close(q, expected[0], 2e-6)
    close(k, expected[1], 2e-6)


@pytest.mark.parametrize("width", [1, 16, 37, 768])
@pytest.mark.parametrize("kind", ["silu", "gelu", "gelu_tanh", "sigmoid"])
def test_gated_activations(width, kind):
    gate_up = torch.randn(5, 2 * width) * 4
    gate, up = gate_up[:, :width], gate_up[:, width:]
    functions = {
        "silu": torch.nn.functional.silu,
        "gelu": torch.nn.functional.gelu,
        "gelu_tanh": lambda x: torch.nn.functional.gelu(x, approximate="tanh"),
        "sigmoid": torch.sigmoid,
    }
    close(ops.gated_activation(gate, up, kind), functions[kind](gate.double()) * up.double(), 1e-6)


@pytest.mark.parametrize("width", [1, 16, 37, 768])
def test_sums_and_gates(width):
    x, y, gate = torch.randn(4, width), torch.randn(4, width), torch.randn(4)
    close(ops.add_scaled_(x.clone(), y, 0.3), x.double() + 0.3 * y.double())
    close(ops.add_gated_(x.clone(), y, gate), x.double() + torch.sigmoid(gate.double())[:, None] * y.double())
    close(ops.sigmoid_mul_(x.clone(), y), x.double() * torch.sigmoid(y.double()))


@pytest.mark.parametrize("width", [1, 16, 1000, 3001])
def test_argmax(width):
    x = torch.randn(7, width)
    assert torch.equal(ops.argmax(x), x.argmax(-1))
    x[1] = -torch.inf
    x[2] = torch.inf
    x[3, width // 2 :] = x[3].max() + 1.0
    assert ops.argmax(x)[1:4].tolist() == [0, 0, width // 2]
    x[4, width // 3] = torch.nan
    assert ops.argmax(x)[4] == width // 3


def test_likeliest_tokens_and_where_there_are_none():
    logits = torch.randn(5, 100) - 3.0
    logits[1, 40], logits[2, 60], logits[3] = torch.nan, torch.inf, -torch.inf
    best = logits.argmax(-1).tolist()
    assert ops.likeliest(logits) == [best[0], -1, -1, -1, best[4]]


def test_argmax_of_few_wide_rows_by_all_threads():
    before = _native.num_threads()
    _native.set_num_threads(3)
    try:
        x = torch.randn(2, 100_003)
        assert torch.equal(ops.argmax(x), x.argmax(-1))
        for place in (0, 33_334, 70_000, 100_002):
            x[0, place:] = x[0].max() + 1.0
            x[1, place] = torch.nan
            assert ops.argmax(x).tolist() == [place, 0 if place else place]
    finally:
        _native.set_num_threads(before)


def test_wrong_arguments_are_refused():
    x, q = torch.randn(2, 8), heads(1, 2, 3, 8)
    cos, sin = (a[..., :4] for a in angles(1, 3, 4))
    bad = [
        ("x is", lambda: ops.rms_norm(x.double(), None, 0.0)),
        ("x is", lambda: ops.rms_norm(x.t(), None, 0.0)),
        ("weight is", lambda: ops.rms_norm(x, torch.ones(7), 0.0)),
        ("residual", lambda: ops.rms_norm(x, None, 0.0, residual=torch.ones(1, 8))),
        ("out", lambda: ops.rms_norm(x, None, 0.0, out=torch.ones(2, 7))),
        ("layout is 'neox'", lambda: ops.rope_(q, None, cos, sin, layout="neox")),
        ("cos", lambda: ops.rope_(q, None, cos[:, :2], sin, layout="half")),
        ("rotary pairs", lambda: ops.rope_(q[..., :6], None, cos, sin)),
        ("q_norm", lambda: ops.norm_and_rotate_(q, None, cos, sin, norm="per_head")),
        ("q_norm is", lambda: ops.norm_and_rotate_(q, None, cos, sin, norm="all_heads", q_norm=torch.ones(8))),
        ("k has", lambda: ops.rope_(q, q[..., :6], cos, sin)),
        ("up has", lambda: ops.gated_activation(x, x[:, :4])),
        ("gate is", lambda: ops.add_gated_(x, x, torch.ones(3))),
        ("x is", lambda: ops.argmax(x[:, :0])),
    ]
    for message, call in bad:
        with pytest.raises(KernelError, match=message):
            call()
