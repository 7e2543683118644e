"""The blocks of a decoder layer equal the functions that they put together, and those have oracles of their own."""

from __future__ import annotations

import pytest
import torch

from moesaic.errors import KernelError
from moesaic.kernels import (
    Activation,
    PackedExperts,
    PackedTensor,
    linear,
    linear_heads,
    linear_transposed_heads,
    moe_forward,
    ops,
)
from moesaic.kernels.blocks import (
    AttentionBlock,
    FeedForwardBlock,
    HeadLinears,
    LatentAttentionBlock,
    Linear,
    Norm,
    RouteOptions,
)
from moesaic.quant import get_format, quantize

HIDDEN, HEADS, KV_HEADS, DIM, PAIRS = 64, 6, 2, 32, 12


@pytest.fixture(autouse=True)
def isa(each_isa):
    """Every test of this module runs on each instruction set that this machine has."""
    return each_isa


def packed(rows, cols, num_matrices=1, name="Q8_0"):
    fmt = get_format(name)
    tensor = PackedTensor.empty(fmt, rows, cols, num_matrices)
    for index in range(num_matrices):
        tensor.pack_(index, quantize((torch.randn(rows, cols) * cols**-0.5).numpy(), fmt))
    return tensor


def attention_parts(head_norm="none", bias=False):
    def projection(rows, cols):
        return Linear(packed(rows, cols), torch.randn(rows) if bias else None)

    all_heads = head_norm == "all_heads"
    parts = {
        "norm": Norm(torch.randn(HIDDEN), 1e-5),
        "q": projection(HEADS * DIM, HIDDEN),
        "k": projection(KV_HEADS * DIM, HIDDEN),
        "v": projection(KV_HEADS * DIM, HIDDEN),
        "o": projection(HIDDEN, HEADS * DIM),
    }
    if head_norm != "none":
        parts["q_norm"] = Norm(torch.randn(HEADS * DIM if all_heads else DIM), 1e-6)
        parts["k_norm"] = Norm(torch.randn(KV_HEADS * DIM if all_heads else DIM), 1e-6)
    return parts


def separate_steps(parts, x, cos, sin, keys, values, num_past, mask, **options):
    """The attention block step by step; appends to keys and values."""
    batch, num_tokens, hidden = x.shape
    rows = x.reshape(-1, hidden)
    normed = ops.rms_norm(rows, parts["norm"].weight, parts["norm"].eps)
    q, k, v = (
        linear(normed, parts[name].weight, parts[name].bias).view(batch, num_tokens, -1, DIM).transpose(1, 2)
        for name in ("q", "k", "v")
    )
    norms = {}
    if "q_norm" in parts:
        norms = {"q_norm": parts["q_norm"].weight, "k_norm": parts["k_norm"].weight, "eps": parts["q_norm"].eps}
    ops.norm_and_rotate_(q, k, cos, sin, layout=options["rope_layout"], norm=options["head_norm"], **norms)
    end = num_past + num_tokens
    keys[:, :, num_past:end], values[:, :, num_past:end] = k, v
    attended = ops.attention(
        q,
        keys[:, :, :end],
        values[:, :, :end],
        scale=options["scale"],
        causal_offset=num_past if mask is None else None,
        mask=mask,
        sinks=options["sinks"],
    )
    out = linear(attended.view(rows.shape[0], -1), parts["o"].weight, parts["o"].bias)
    return x + options["residual_scale"] * out.view(x.shape)


@pytest.mark.parametrize("num_tokens", [1, 5])
@pytest.mark.parametrize("head_norm", ["none", "per_head", "per_head_after_rope", "all_heads"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_attention_block(num_tokens, head_norm, dtype):
    parts = attention_parts(head_norm, bias=True)
    options = {
        "scale": 0.2,
        "rope_layout": "interleaved",
        "head_norm": head_norm,
        "sinks": torch.randn(HEADS),
        "residual_scale": 0.7,
    }
    block = AttentionBlock(**parts, head_dim=DIM, num_pairs=PAIRS, **options)
    keys, values = (torch.randn(2, KV_HEADS, 40, DIM).to(dtype) for _ in range(2))
    expected_keys, expected_values = keys.clone(), values.clone()
    x, angles = torch.randn(2, num_tokens, HIDDEN), torch.rand(2, num_tokens, PAIRS)
    cos, sin = angles.cos(), angles.sin()
    actual = block(x, cos, sin, keys, values, 20)
    expected = separate_steps(parts, x, cos, sin, expected_keys, expected_values, 20, None, **options)
    torch.testing.assert_close(actual, expected, rtol=1e-6, atol=1e-6)
    assert torch.equal(keys, expected_keys) and torch.equal(values, expected_values)


def test_attention_block_with_a_mask_and_shared_angles():
    parts = attention_parts()
    options = {"scale": 0.2, "rope_layout": "half", "head_norm": "none", "sinks": None, "residual_scale": 1.0}
    block = AttentionBlock(**parts, head_dim=DIM, num_pairs=PAIRS, **options)
    cache = torch.randn(2, 2, 30, KV_HEADS, DIM).transpose(2, 3)  # not contiguous
    keys, values = cache[0], cache[1]
    expected_keys, expected_values = keys.clone(), values.clone()
    x, angles = torch.randn(2, 3, HIDDEN), torch.rand(1, 3, PAIRS)
    mask = torch.rand(2, 1, 3, 13) < 0.6
    cos, sin = angles.cos(), angles.sin()
    actual = block(x, cos, sin, keys, values, 10, mask)
    both = (cos.expand(2, -1, -1).contiguous(), sin.expand(2, -1, -1).contiguous())
    expected = separate_steps(parts, x, *both, expected_keys, expected_values, 10, mask, **options)
    torch.testing.assert_close(actual, expected, rtol=1e-6, atol=1e-6)
    assert torch.equal(keys, expected_keys)


NOPE, ROPE, LATENT, VALUE, RANK = 32, 16, 64, 40, 32


def latent_parts(low_rank, split):
    parts = {
        "norm": Norm(torch.randn(HIDDEN), 1e-5),
        "q_b": Linear(packed(HEADS * (NOPE + ROPE), RANK if low_rank else HIDDEN)),
        "kv_a": Linear(packed(LATENT + ROPE, HIDDEN), torch.randn(LATENT + ROPE)),
        "kv_a_norm": Norm(torch.randn(LATENT), 1e-6),
        "o": Linear(packed(HIDDEN, HEADS * VALUE, name="F32")),
    }
    if low_rank:
        parts["q_a"], parts["q_a_norm"] = Linear(packed(RANK, HIDDEN)), Norm(torch.randn(RANK), 1e-6)
    if split:
        parts["k_b"] = HeadLinears(packed(LATENT, NOPE, HEADS), slice(None))
        parts["v_b"] = HeadLinears(packed(VALUE, LATENT, HEADS), slice(None))
    else:
        kv_b = packed(HEADS * (NOPE + VALUE), LATENT)
        parts["k_b"], parts["v_b"] = HeadLinears(kv_b, slice(0, NOPE)), HeadLinears(kv_b, slice(NOPE, NOPE + VALUE))
    return parts


def separate_latent_steps(parts, split, x, cos, sin, latents, rotary_keys, num_past, mask, scale):
    """The latent attention block step by step; appends to the cache."""
    batch, num_tokens, _ = x.shape
    normed = ops.rms_norm(x.reshape(-1, HIDDEN), parts["norm"].weight, parts["norm"].eps)
    if "q_a" in parts:
        rank = linear(normed, parts["q_a"].weight)
        query = linear(ops.rms_norm(rank, parts["q_a_norm"].weight, parts["q_a_norm"].eps), parts["q_b"].weight)
    else:
        query = linear(normed, parts["q_b"].weight)
    query = query.view(batch, num_tokens, HEADS, NOPE + ROPE).transpose(1, 2)
    compressed = linear(normed, parts["kv_a"].weight, parts["kv_a"].bias)
    latent = ops.rms_norm(compressed[:, :LATENT], parts["kv_a_norm"].weight, parts["kv_a_norm"].eps)
    k_rope = compressed[:, LATENT:].contiguous().view(batch, 1, num_tokens, ROPE)
    q_rope = query[..., NOPE:]
    ops.norm_and_rotate_(q_rope, k_rope, cos, sin, layout="interleaved_to_half")
    end = num_past + num_tokens
    latents[:, 0, num_past:end], rotary_keys[:, :, num_past:end] = latent.view(batch, num_tokens, LATENT), k_rope
    rows = query[..., :NOPE].transpose(1, 2).flatten(0, 1)
    k_b, v_b = parts["k_b"], parts["v_b"]
    q_latent = linear_heads(rows, k_b.weight) if split else linear_transposed_heads(rows, k_b.weight, k_b.rows)
    mixed = ops.mla_attention(
        q_latent.view(batch, num_tokens, HEADS, LATENT).transpose(1, 2),
        q_rope,
        latents[:, 0, :end],
        rotary_keys[:, 0, :end],
        scale=scale,
        causal_offset=num_past if mask is None else None,
        mask=mask,
    )
    attended = linear_heads(mixed.transpose(1, 2).flatten(0, 1), v_b.weight, v_b.rows)
    return x + linear(attended.view(batch * num_tokens, -1), parts["o"].weight).view(x.shape)


@pytest.mark.parametrize("num_tokens", [1, 4])
@pytest.mark.parametrize("low_rank", [False, True])
@pytest.mark.parametrize("split", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_latent_attention_block(num_tokens, low_rank, split, dtype):
    parts = latent_parts(low_rank, split)
    block = LatentAttentionBlock(
        **parts,
        num_heads=HEADS,
        nope_dim=NOPE,
        rope_dim=ROPE,
        scale=0.1,
        k_b_transposed=not split,
        rope_layout="interleaved_to_half",
    )
    latents, rotary_keys = torch.randn(2, 1, 30, LATENT).to(dtype), torch.randn(2, 1, 30, ROPE).to(dtype)
    expected_latents, expected_keys = latents.clone(), rotary_keys.clone()
    x, angles = torch.randn(2, num_tokens, HIDDEN), torch.rand(2, num_tokens, ROPE // 2)
    cos, sin = angles.cos(), angles.sin()
    for mask in (None, torch.rand(2, 1, num_tokens, 10 + num_tokens) < 0.7):
        actual = block(x, cos, sin, latents, rotary_keys, 10, mask)
        expected = separate_latent_steps(parts, split, x, cos, sin, expected_latents, expected_keys, 10, mask, 0.1)
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)
        assert torch.equal(latents, expected_latents) and torch.equal(rotary_keys, expected_keys)


def experts(num_experts, intermediate=96):
    gate, up = packed(intermediate, HIDDEN, num_experts), packed(intermediate, HIDDEN, num_experts)
    return PackedExperts(gate, up, packed(HIDDEN, intermediate, num_experts), activation=Activation("silu"))


@pytest.mark.parametrize("num_tokens", [1, 9])
@pytest.mark.parametrize("shared", ["none", "plain", "gated"])
def test_feed_forward_block(num_tokens, shared):
    norm, routed = Norm(torch.randn(HIDDEN), 1e-5), experts(8)
    router = Linear(packed(8, HIDDEN, name="F32"), torch.randn(8))
    bias = torch.randn(8) * 0.1
    always = None if shared == "none" else experts(1, 32)
    gate = Linear(packed(1, HIDDEN, name="F32")) if shared == "gated" else None
    options = RouteOptions(3, "sigmoid", bias, "sum_of_two", 4, 2, True, 1e-20, 0.0, 2.5)
    block = FeedForwardBlock(
        norm=norm, experts=routed, router=router, route=options, shared=always, shared_gate=gate, residual_scale=0.5
    )
    x = torch.randn(2, num_tokens, HIDDEN)
    rows = x.reshape(-1, HIDDEN).clone()
    normed = ops.rms_norm(rows, norm.weight, norm.eps)
    logits = linear(normed, router.weight, router.bias)
    weights, index = ops.route(
        logits,
        3,
        score="sigmoid",
        bias=bias,
        group_score="sum_of_two",
        num_groups=4,
        topk_groups=2,
        normalize=True,
        sum_offset=1e-20,
        scale=2.5,
    )
    out = moe_forward(normed, index, weights, routed)
    if always is not None:
        weight = torch.ones(rows.shape[0], 1) if gate is None else torch.sigmoid(linear(normed, gate.weight))
        out += moe_forward(normed, torch.zeros(rows.shape[0], 1, dtype=torch.int64), weight, always)
    assert block(x) is x
    torch.testing.assert_close(x.view(-1, HIDDEN), rows + 0.5 * out, rtol=1e-5, atol=1e-6)


def test_feed_forward_block_of_a_dense_mlp():
    norm, mlp = Norm(torch.randn(HIDDEN), 1e-5), experts(1)
    x = torch.randn(4, HIDDEN)
    normed = ops.rms_norm(x, norm.weight, norm.eps)
    expected = x + moe_forward(normed, torch.zeros(4, 1, dtype=torch.int64), torch.ones(4, 1), mlp)
    torch.testing.assert_close(FeedForwardBlock(norm=norm, experts=mlp)(x), expected, rtol=1e-6, atol=1e-6)


def test_wrong_arguments_are_refused():
    parts = attention_parts()
    sizes = {"head_dim": DIM, "num_pairs": PAIRS, "scale": 1.0}
    block = AttentionBlock(**parts, **sizes)
    x, angles, cache = torch.randn(1, 2, HIDDEN), torch.rand(1, 2, PAIRS), torch.zeros(1, KV_HEADS, 8, DIM)
    norm, routed = Norm(torch.ones(HIDDEN), 1e-5), experts(4)
    router = Linear(packed(4, HIDDEN, name="F32"))
    bad = [
        ("whole heads", lambda: AttentionBlock(**parts, **{**sizes, "head_dim": 40})),
        ("columns", lambda: AttentionBlock(**{**parts, "o": parts["k"]}, **sizes)),
        ("rotary pairs", lambda: AttentionBlock(**parts, **{**sizes, "num_pairs": 17})),
        ("head_norm", lambda: AttentionBlock(**parts, **sizes, head_norm="per_head")),
        ("norm is", lambda: AttentionBlock(**{**parts, "norm": Norm(torch.ones(3), 0.0)}, **sizes)),
        ("room", lambda: block(x, angles, angles, cache, cache, 7)),
        ("room", lambda: block(x, angles, angles, cache, cache, -1)),
        ("keys is", lambda: block(x, angles, angles, cache[:, :1], cache, 0)),
        ("values is", lambda: block(x, angles, angles, cache, cache.bfloat16(), 0)),
        ("pairs", lambda: block(x, angles[..., :4], angles[..., :4], cache, cache, 0)),
        ("cos", lambda: block(x, angles[:, :1], angles, cache, cache, 0)),
        ("x is", lambda: block(x[..., :32], angles, angles, cache, cache, 0)),
        ("mask", lambda: block(x, angles, angles, cache, cache, 0, torch.ones(1, 1, 2, 1, dtype=torch.bool))),
        ("expected both", lambda: FeedForwardBlock(norm=norm, experts=routed)),
        ("expected both", lambda: FeedForwardBlock(norm=norm, experts=routed, router=router)),
        ("top_k", lambda: FeedForwardBlock(norm=norm, experts=routed, router=router, route=RouteOptions(5))),
        (
            "groups",
            lambda: FeedForwardBlock(norm=norm, experts=routed, router=router, route=RouteOptions(2, num_groups=3)),
        ),
        ("gate", lambda: FeedForwardBlock(norm=norm, experts=experts(1), shared_gate=router)),
    ]
    for message, call in bad:
        with pytest.raises(KernelError, match=message):
            call()
