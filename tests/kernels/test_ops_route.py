"""Routing against the routers of stock transformers and against sorting in float64."""

from __future__ import annotations

import pytest
import torch
from transformers.models.deepseek_v2 import modeling_deepseek_v2
from transformers.models.deepseek_v3 import modeling_deepseek_v3
from transformers.models.ernie4_5_moe import modeling_ernie4_5_moe
from transformers.models.gpt_oss import modeling_gpt_oss
from transformers.models.granitemoe import modeling_granitemoe
from transformers.models.minimax_m2 import modeling_minimax_m2
from transformers.models.qwen3_moe import modeling_qwen3_moe

from moesaic.errors import KernelError
from moesaic.kernels import ops

NUM_TOKENS, NUM_EXPERTS = 200, 64


@pytest.fixture(autouse=True)
def isa(each_isa):
    """Every test of this module runs on each instruction set that this machine has."""
    return each_isa


def stock(router_class, config_class, **config):
    """A stock router whose weight is the identity, so that its logits are its input."""
    sizes = {"hidden_size": NUM_EXPERTS, "num_experts": NUM_EXPERTS, "num_experts_per_tok": 6}
    for name in ("num_local_experts", "n_routed_experts", "moe_num_experts"):
        sizes[name] = NUM_EXPERTS
    router = router_class(config_class(**{**sizes, "moe_k": 6, **config}))
    router.weight.data = torch.eye(NUM_EXPERTS)
    return router


def same_choice(actual, expected):
    """Equal as sets of (expert, weight) per token; stock routers of one family do not sort."""
    weights, indices = actual
    expected_weights, expected_indices = expected
    assert indices.dtype == torch.int64 and weights.dtype == torch.float32
    order, expected_order = indices.argsort(-1), expected_indices.argsort(-1)
    assert torch.equal(indices.gather(1, order), expected_indices.gather(1, expected_order))
    expected_weights = expected_weights.gather(1, expected_order)
    torch.testing.assert_close(weights.gather(1, order), expected_weights, rtol=2e-6, atol=1e-7)


@pytest.fixture
def logits():
    return torch.randn(NUM_TOKENS, NUM_EXPERTS, generator=torch.Generator().manual_seed(5)) * 2


@pytest.fixture
def bias():
    return torch.randn(NUM_EXPERTS, generator=torch.Generator().manual_seed(6)) * 0.1


@pytest.mark.parametrize("normalize", [False, True])
def test_qwen3(logits, normalize):
    config = modeling_qwen3_moe.Qwen3MoeConfig
    router = stock(modeling_qwen3_moe.Qwen3MoeTopKRouter, config, norm_topk_prob=normalize)
    _, weights, indices = router(logits)
    same_choice(ops.route(logits, 6, normalize=normalize), (weights, indices))
    assert torch.equal(ops.route(logits, 6)[1], indices)  # sorted by weight there and here


def test_gpt_oss_and_granite(logits, bias):
    router = stock(modeling_gpt_oss.GptOssTopKRouter, modeling_gpt_oss.GptOssConfig)
    router.bias.data = bias
    _, weights, indices = router(logits)
    same_choice(ops.route(logits + bias, 6, score="softmax_of_chosen"), (weights, indices))
    router = stock(modeling_granitemoe.GraniteMoeTopKRouter, modeling_granitemoe.GraniteMoeConfig)
    first, weights, last = router(logits)
    indices = last if first.is_floating_point() else first  # transformers 5.17 returns them first
    same_choice(ops.route(logits, 6, score="softmax_of_chosen"), (weights, indices))


@pytest.mark.parametrize(("num_groups", "topk_groups"), [(1, 1), (8, 4), (4, 2), (32, 3)])
@pytest.mark.parametrize("normalize", [False, True])
def test_deepseek_v3(logits, bias, num_groups, topk_groups, normalize):
    router = stock(
        modeling_deepseek_v3.DeepseekV3TopkRouter,
        modeling_deepseek_v3.DeepseekV3Config,
        n_group=num_groups,
        topk_group=topk_groups,
        norm_topk_prob=normalize,
        routed_scaling_factor=2.5,
    )
    router.e_score_correction_bias.copy_(bias)
    _, weights, indices = router(logits)
    actual = ops.route(
        logits,
        6,
        score="sigmoid",
        bias=bias,
        group_score="sum_of_two",
        num_groups=num_groups,
        topk_groups=topk_groups,
        normalize=normalize,
        sum_offset=1e-20,
        scale=2.5,
    )
    same_choice(actual, (weights, indices))


def test_minimax_m2(logits, bias):
    router = stock(modeling_minimax_m2.MiniMaxM2TopKRouter, modeling_minimax_m2.MiniMaxM2Config)
    _, weights, indices = router(logits, bias)
    same_choice(ops.route(logits, 6, score="sigmoid", bias=bias, normalize=True), (weights, indices))


@pytest.mark.parametrize(("method", "topk_groups"), [("greedy", 1), ("group_limited_greedy", 3)])
def test_deepseek_v2(logits, method, topk_groups):
    router = stock(
        modeling_deepseek_v2.DeepseekV2TopkRouter,
        modeling_deepseek_v2.DeepseekV2Config,
        topk_method=method,
        n_group=8,
        topk_group=topk_groups,
        routed_scaling_factor=1.5,
    )
    _, weights, indices = router(logits)
    groups = {} if method == "greedy" else {"group_score": "maximum", "num_groups": 8, "topk_groups": topk_groups}
    same_choice(ops.route(logits, 6, scale=1.5, **groups), (weights, indices))


@pytest.mark.parametrize("minimum", [1e-12, 0.9])
def test_ernie(logits, bias, minimum):
    config = modeling_ernie4_5_moe.Ernie4_5_MoeConfig
    router = stock(modeling_ernie4_5_moe.Ernie4_5_MoeTopKRouter, config, moe_norm_min=minimum)
    router.moe_statics.e_score_correction_bias.data = bias.view(1, -1)
    _, weights, indices = router(logits)
    same_choice(ops.route(logits, 6, bias=bias, normalize=True, sum_minimum=minimum), (weights, indices))


@pytest.mark.parametrize(("num_experts", "top_k"), [(1, 1), (5, 5), (17, 3), (256, 8), (512, 10)])
def test_odd_sizes_against_sorting(num_experts, top_k):
    logits = torch.randn(9, num_experts) * 3
    weights, indices = ops.route(logits, top_k)
    expected, order = torch.softmax(logits.double(), -1).sort(-1, descending=True)
    assert torch.equal(indices, order[:, :top_k])
    torch.testing.assert_close(weights.double(), expected[:, :top_k], rtol=2e-6, atol=1e-8)


def test_ties_go_to_the_lower_index_and_nan_to_the_top():
    logits = torch.zeros(3, 20)
    logits[1, 7:9] = 1.0
    logits[2, 11] = torch.nan
    indices = ops.route(logits, 4, score="sigmoid")[1]
    assert indices.tolist() == [[0, 1, 2, 3], [7, 8, 0, 1], [11, 0, 1, 2]]
    assert torch.isnan(ops.route(logits, 4, score="sigmoid")[0][2, 0])


def test_strided_logits_and_no_tokens():
    wide = torch.randn(6, 100)
    assert torch.equal(ops.route(wide[:, 20:50], 4)[1], ops.route(wide[:, 20:50].contiguous(), 4)[1])
    assert ops.route(torch.empty(0, 8), 2)[0].shape == (0, 2)


def test_wrong_arguments_are_refused():
    x = torch.randn(2, 12)
    bad = [
        ("top_k", lambda: ops.route(x, 13)),
        ("top_k", lambda: ops.route(x, 0)),
        ("groups", lambda: ops.route(x, 2, group_score="maximum", num_groups=5)),
        ("groups", lambda: ops.route(x, 2, group_score="maximum", num_groups=4, topk_groups=5)),
        ("score is", lambda: ops.route(x, 2, score="tanh")),
        ("bias is", lambda: ops.route(x, 2, bias=torch.ones(11))),
        ("logits is", lambda: ops.route(x.double(), 2)),
    ]
    for message, call in bad:
        with pytest.raises(KernelError, match=message):
            call()
