"""Routing against the kernels of the CPU, which are tested against stock routers, and products against float64."""

from __future__ import annotations

from dataclasses import fields, replace

import pytest
import torch
from tests.kernels.triton.conftest import DEVICE

from moesaic.errors import KernelError
from moesaic.kernels import ops
from moesaic.kernels.block_parts import RouteOptions
from moesaic.kernels.triton.route import Request, route, router_logits

DEEPSEEK_V3 = RouteOptions(
    8, "sigmoid", group_score="sum_of_two", num_groups=8, topk_groups=4, normalize=True, sum_offset=1e-20, scale=2.5
)
CASES = {
    "softmax": (64, RouteOptions(6)),
    "normalized": (60, RouteOptions(4, normalize=True)),
    "of chosen": (32, RouteOptions(4, "softmax_of_chosen")),
    "deepseek v3": (256, DEEPSEEK_V3),
    "one group": (256, replace(DEEPSEEK_V3, num_groups=1, topk_groups=1)),
    "groups of one": (16, replace(DEEPSEEK_V3, num_groups=16, topk_groups=9)),
    "deepseek v2": (160, RouteOptions(6, scale=16.0, group_score="maximum", num_groups=8, topk_groups=3)),
    "want of experts": (8, RouteOptions(5, group_score="maximum", num_groups=4, topk_groups=1)),
    "minus infinity": (8, replace(DEEPSEEK_V3, top_k=5, num_groups=4, topk_groups=1)),
    "ernie": (64, RouteOptions(6, normalize=True, sum_minimum=0.9)),
    "one expert": (1, RouteOptions(1)),
    "all experts": (5, RouteOptions(5, "sigmoid")),
    "many": (512, RouteOptions(16, "sigmoid", normalize=True)),
}


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def on_cpu(logits, options):
    options = {field.name: getattr(options, field.name) for field in fields(options)}
    if options["bias"] is not None:
        options["bias"] = options["bias"].cpu()
    return ops.route(logits.cpu().contiguous(), **options)


def check(logits, options):
    actual = route(logits.to(DEVICE), options)
    weights, experts = on_cpu(logits, options)
    assert actual.experts.dtype == torch.int64 and actual.slots is None and actual.misses is None
    assert torch.equal(actual.experts.cpu(), experts)
    torch.testing.assert_close(actual.weights.cpu(), weights, rtol=3e-6, atol=1e-8, equal_nan=True)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("biased", [False, True])
def test_the_choice_of_the_cpu(case, biased):
    num_experts, options = CASES[case]
    if biased:
        options = replace(options, bias=torch.randn(num_experts, device=DEVICE) * 0.1)
    check(torch.randn(5, num_experts) * 2, options)


def test_ties_go_to_the_lower_index_and_nan_to_the_top():
    logits = torch.zeros(5, 20)
    logits[1, 7:9] = 1.0
    logits[2, 11] = torch.nan
    logits[3, ::2] = -0.0
    logits[4, 9], logits[4, 3] = torch.nan, -torch.nan
    for options in (RouteOptions(4, "sigmoid"), RouteOptions(4, "softmax_of_chosen"), RouteOptions(4)):
        check(logits, options)
    expected = [[0, 1, 2, 3], [7, 8, 0, 1], [11, 0, 1, 2], [0, 1, 2, 3], [3, 9, 0, 1]]
    assert route(logits.to(DEVICE), RouteOptions(4, "softmax_of_chosen")).experts.tolist() == expected
    check(torch.zeros(1, 32), replace(DEEPSEEK_V3, num_groups=8, topk_groups=3))


def test_strided_logits_and_no_tokens():
    wide = torch.randn(6, 100, device=DEVICE)
    assert torch.equal(
        route(wide[:, 20:50], RouteOptions(4)).experts, route(wide[:, 20:50].clone(), RouteOptions(4))[1]
    )
    assert route(wide[:0], RouteOptions(2)).weights.shape == (0, 2)


def test_experts_are_looked_up():
    logits = torch.randn(7, 40, device=DEVICE)
    slot_of_expert = torch.full((3, 40), -1, dtype=torch.int32, device=DEVICE)
    cached = torch.randperm(40, device=DEVICE)[:15]
    slot_of_expert[1, cached] = torch.arange(100, 115, dtype=torch.int32, device=DEVICE)
    routed = route(logits, RouteOptions(6), slot_of_expert=slot_of_expert[1])
    plain = route(logits, RouteOptions(6))
    assert torch.equal(routed.experts, plain.experts)
    assert torch.allclose(routed.weights, plain.weights, rtol=1e-6)  # another kernel, whose sums may be contracted
    assert routed.slots.dtype == torch.int32 and routed.misses.dtype == torch.int64
    assert torch.equal(routed.slots, slot_of_expert[1][routed.experts])
    assert torch.equal(routed.misses, torch.where(routed.slots >= 0, -1, routed.experts))
    assert 0 < int((routed.slots >= 0).sum()) < routed.slots.numel()


def test_padding_has_no_experts():
    logits = torch.randn(4, 16, device=DEVICE)
    slot_of_expert = torch.arange(-8, 8, dtype=torch.int32, device=DEVICE).clamp(min=-1)
    slot_mapping = torch.tensor([3, -1, 0, -1], device=DEVICE)
    routed = route(logits, RouteOptions(4), slot_of_expert=slot_of_expert, slot_mapping=slot_mapping)
    plain = route(logits, RouteOptions(4), slot_of_expert=slot_of_expert)
    for actual, expected, nothing in zip(routed, plain, (0.0, -1, -1, -1), strict=True):
        assert torch.equal(actual[[0, 2]], expected[[0, 2]])
        assert (actual[[1, 3]] == nothing).all()


@pytest.mark.parametrize("tokens", [1, 2, 3, 8, 9])
@pytest.mark.parametrize(("num_experts", "hidden"), [(32, 64), (17, 2880), (5, 4100)])
def test_the_product_is_exact(tokens, num_experts, hidden):
    x, weight, bias = (
        torch.randn(*s, device=DEVICE) for s in ((tokens, hidden + 4), (num_experts, hidden), (num_experts,))
    )
    x = x[:, :hidden]
    expected = x.double() @ weight.double().T
    scale = expected.abs().max()
    assert (router_logits(x, weight).double() - expected).abs().max() < 3e-6 * scale
    out = torch.empty(tokens, num_experts, device=DEVICE)
    assert router_logits(x, weight, bias, out=out) is out
    assert (out.double() - expected - bias.double()).abs().max() < 3e-6 * scale


def test_wrong_arguments_are_refused():
    x, index = torch.randn(2, 12, device=DEVICE), torch.zeros(12, dtype=torch.int32, device=DEVICE)
    options = RouteOptions(2)
    bad = [
        ("top_k", lambda: route(x, RouteOptions(13))),
        ("top_k", lambda: route(x, RouteOptions(0))),
        ("groups", lambda: route(x, RouteOptions(2, group_score="maximum", num_groups=5))),
        ("groups", lambda: route(x, RouteOptions(2, group_score="maximum", num_groups=4, topk_groups=5))),
        ("score is", lambda: route(x, RouteOptions(2, "tanh"))),
        ("bias is", lambda: route(x, RouteOptions(2, bias=x[0, :11]))),
        ("logits is", lambda: route(x.double(), options)),
        ("slot_of_expert is", lambda: route(x, options, slot_of_expert=index.long())),
        ("slot_mapping is", lambda: route(x, options, slot_mapping=index[:2])),
        ("weight is", lambda: router_logits(x, x[:, :11])),
        ("bias is", lambda: router_logits(x, x, x[0])),
        ("out is", lambda: router_logits(x, x, out=x)),
    ]
    for message, call in bad:
        with pytest.raises(KernelError, match=message):
            call()


def a_request(tokens, hidden, top_k, num_before, position):
    """A request to write, and a mailbox with room for two tokens more."""

    def zeros(*shape, dtype=torch.int64):
        return torch.zeros(shape, dtype=dtype, device=DEVICE)

    rows = tokens + 2
    return Request(
        zeros(rows, hidden, dtype=torch.float32),
        zeros(rows, top_k),
        zeros(rows, top_k),
        zeros(rows, top_k, dtype=torch.float32),
        zeros(1),
        torch.full((1,), num_before, device=DEVICE),
        zeros(1, dtype=torch.int32),
        position,
    )


@pytest.mark.parametrize("tokens", [1, 3])
@pytest.mark.parametrize("looks_up", [False, True])
def test_a_router_asks_the_cpu(tokens, looks_up):
    logits = torch.randn(tokens, 40, device=DEVICE)
    table = torch.arange(-25, 15, dtype=torch.int32, device=DEVICE).clamp(min=-1) if looks_up else None
    request = a_request(tokens, 8, 6, num_before=70, position=4)
    for repeat in (1, 2):  # the counter of programs is back where it was
        routed = route(logits, RouteOptions(6), slot_of_expert=table, request=request)
        plain = route(logits, RouteOptions(6), slot_of_expert=table)
        assert torch.equal(routed.experts, plain.experts)
        assert torch.allclose(routed.weights, plain.weights, rtol=1e-6)
        assert torch.equal(request.chosen[:tokens], plain.experts)
        assert torch.equal(request.weights[:tokens], routed.weights)
        assert torch.equal(request.experts[:tokens], plain.experts if plain.misses is None else plain.misses)
        assert request.requested.item() == 70 * repeat + 5 and not request.arrivals.item()
        assert not request.experts[tokens:].any() and not request.hidden.any()
        request.base.add_(70)


@pytest.mark.parametrize("tokens", [1, 2, 3, 4, 5, 8, 9])
@pytest.mark.parametrize(("num_experts", "hidden"), [(32, 64), (7, 2880)])
def test_what_goes_into_the_product_is_sent_to_the_cpu(tokens, num_experts, hidden):
    x, weight = torch.randn(tokens, hidden + 4, device=DEVICE)[:, :hidden], torch.randn(num_experts, hidden).to(DEVICE)
    box = torch.zeros(tokens + 1, hidden, device=DEVICE)
    assert torch.equal(router_logits(x, weight, box_hidden=box), router_logits(x, weight))
    assert torch.equal(box[:tokens], x) and not box[tokens:].any()
    for bad in (box[: tokens - 1], box.double(), box.t()):
        with pytest.raises(KernelError, match="box_hidden is"):
            router_logits(x, weight, box_hidden=bad)
