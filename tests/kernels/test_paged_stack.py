"""Layers on a paged cache: the last one for last tokens alone, and latent attention in the cheaper of its two forms."""

from __future__ import annotations

import pytest
import torch

from moesaic.errors import KernelError
from moesaic.kernels import Activation, PackedExperts, PackedTensor, independent_rows
from moesaic.kernels.blocks import AttentionBlock, FeedForwardBlock, HeadLinears, LatentAttentionBlock, Linear, Norm
from moesaic.kernels.paged_stack import PagedStack
from moesaic.kernels.stack import DecoderStack
from moesaic.quant import get_format, quantize

HIDDEN, HEADS, KV_HEADS, DIM, NOPE, ROPE, LATENT, VALUE = 64, 6, 2, 32, 32, 16, 64, 48
BLOCK = 16


@pytest.fixture(autouse=True)
def isa(each_isa):
    """Every test of this module runs on each instruction set that this machine has."""
    return each_isa


def packed(rows, cols, num_matrices=1):
    fmt = get_format("F32")
    tensor = PackedTensor.empty(fmt, rows, cols, num_matrices)
    for index in range(num_matrices):
        tensor.pack_(index, quantize((torch.randn(rows, cols) * cols**-0.5).numpy(), fmt))
    return tensor


def grouped_query():
    sizes = {"q": (HEADS * DIM, HIDDEN), "k": (KV_HEADS * DIM, HIDDEN), "v": (KV_HEADS * DIM, HIDDEN)}
    parts = {name: Linear(packed(*shape), torch.randn(shape[0])) for name, shape in sizes.items()}
    norms = {"q_norm": Norm(torch.randn(DIM), 1e-6), "k_norm": Norm(torch.randn(DIM), 1e-6), "head_norm": "per_head"}
    output = Linear(packed(HIDDEN, HEADS * DIM))
    norm = Norm(torch.randn(HIDDEN), 1e-5)
    return AttentionBlock(**parts, **norms, o=output, norm=norm, head_dim=DIM, num_pairs=ROPE // 2, scale=0.2)


def latent(split):
    if split:
        k_b, v_b = (HeadLinears(packed(*shape, HEADS), slice(None)) for shape in ((LATENT, NOPE), (VALUE, LATENT)))
    else:
        kv_b = packed(HEADS * (NOPE + VALUE), LATENT)
        k_b, v_b = HeadLinears(kv_b, slice(0, NOPE)), HeadLinears(kv_b, slice(NOPE, NOPE + VALUE))
    return LatentAttentionBlock(
        norm=Norm(torch.randn(HIDDEN), 1e-5),
        q_a=None,
        q_a_norm=None,
        q_b=Linear(packed(HEADS * (NOPE + ROPE), HIDDEN)),
        kv_a=Linear(packed(LATENT + ROPE, HIDDEN)),
        kv_a_norm=Norm(torch.randn(LATENT), 1e-6),
        k_b=k_b,
        v_b=v_b,
        o=Linear(packed(HIDDEN, HEADS * VALUE)),
        num_heads=HEADS,
        nope_dim=NOPE,
        rope_dim=ROPE,
        scale=0.1,
        k_b_transposed=not split,
        rope_layout="interleaved_to_half",
    )


def feed_forward():
    gate, up, down = packed(96, HIDDEN), packed(96, HIDDEN), packed(HIDDEN, 96)
    experts = PackedExperts(gate, up, down, activation=Activation("silu"))
    return FeedForwardBlock(norm=Norm(torch.randn(HIDDEN), 1e-5), experts=experts)


class Step:
    """New tokens of sequences, (past, new) each, whose blocks lie in any order."""

    def __init__(self, sequences, dtype, shapes):
        past, new = zip(*sequences, strict=True)
        blocks = [-(-sum(each) // BLOCK) for each in sequences]
        order = torch.randperm(sum(blocks)).int()
        self.tables = torch.zeros(len(past), max(blocks), dtype=torch.int32)
        for row, part in zip(self.tables, order.split(blocks), strict=True):
            row[: len(part)] = part
        self.lengths = torch.tensor([sum(each) for each in sequences], dtype=torch.int32)
        self.starts = torch.tensor([0, *torch.tensor(new).cumsum(0)], dtype=torch.int32)
        positions = [torch.arange(p, p + n) for p, n in sequences]
        self.slots = torch.cat(
            [row[at // BLOCK].long() * BLOCK + at % BLOCK for row, at in zip(self.tables, positions, strict=True)]
        )
        self.x = torch.randn(len(self.slots), HIDDEN)
        angles = torch.rand(len(self.x), ROPE // 2)
        self.angles = angles.cos(), angles.sin()
        self.caches = [torch.randn(sum(blocks), BLOCK, *shape).to(dtype) for shape in shapes]

    def stack(self, *layers):
        """The layers on caches of their own, each of which is filled alike."""
        keys, values = [each.clone() for each in self.caches], None
        values = keys[1] if len(keys) == 2 else None
        pairs = [(keys[0], values)] + [
            (keys[0].clone(), None if values is None else values.clone()) for _ in layers[1:]
        ]
        return PagedStack(DecoderStack(list(layers)), pairs, [None] * len(layers)), pairs

    @property
    def where(self):
        return (*self.angles, self.slots, self.tables, self.lengths, self.starts)


LATENTS, KEYS = [(LATENT + ROPE,)], [(KV_HEADS, DIM)] * 2
MIXED = [(0, 80), (7, 3), (100, 90), (100, 32), (0, 1), (20, 65)]
EXPANDED = [True, False, True, False, False, True]


@pytest.mark.parametrize("split", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_latents_are_expanded_where_that_takes_fewer_products(split, dtype, isa):
    """Absorbed, which is what independent rows are, has tests of its own."""
    step, layer = Step(MIXED, dtype, LATENTS), (latent(split), feed_forward())
    expected, x = step.x.clone(), step.x.clone()
    with independent_rows(True):
        step.stack(layer)[0](expected, *step.where)
    stack, ((latents, _),) = step.stack(layer)
    stack(x, *step.where)
    by_tiles = isa == "amx" and dtype == torch.bfloat16
    torch.testing.assert_close(x, expected, rtol=0, atol=4e-2 if by_tiles else 2e-5)
    if split and not by_tiles:  # else queries of many tokens meet the transposed weights, and round otherwise
        rows = zip(x.split([n for _, n in MIXED]), expected.split([n for _, n in MIXED]), strict=True)
        assert [not torch.equal(a, b) for a, b in rows] == EXPANDED
    written = latents.flatten(0, 1)[step.slots]
    assert not torch.equal(written, step.caches[0].flatten(0, 1)[step.slots])


@pytest.mark.parametrize("kind", ["grouped query", "latent", "latent, split"])
@pytest.mark.parametrize("sequences", [MIXED, [(5, 20)], [(0, 1), (9, 2)]])
def test_the_last_layer_for_last_tokens_alone(kind, sequences, isa):
    step = Step(sequences, torch.bfloat16, KEYS if kind == "grouped query" else LATENTS)
    layers = [
        (grouped_query() if kind == "grouped query" else latent(kind.endswith("split")), feed_forward())
        for _ in range(2)
    ]
    whole, expected_caches = step.stack(*layers)
    expected, x = step.x.clone(), step.x.clone()
    with independent_rows(True):
        whole(expected, *step.where)
        stack, caches = step.stack(*layers)
        stack(x, *step.where, count=1)
        before = x.clone()
        last = stack.finish(x, *step.where)
    assert torch.equal(last, expected[step.starts[1:].long() - 1])
    assert torch.equal(x, before)
    for pair, expected_pair in zip(caches, expected_caches, strict=True):
        for part, expected_part in zip(pair, expected_pair, strict=True):
            assert part is None or torch.equal(part, expected_part)


def test_wrong_steps_are_refused():
    step = Step([(0, 5), (3, 2)], torch.float32, LATENTS)
    stack, _ = step.stack((latent(False), feed_forward()))
    cos, sin, slots, tables, lengths, starts = step.where
    for message, call in [
        ("no token", lambda: stack.finish(step.x, cos, sin, slots, tables, lengths + 2, torch.tensor([0, 7, 7]).int())),
        ("the step", lambda: stack.finish(step.x, cos, sin, slots, tables + 9, lengths, starts)),
        ("x is", lambda: stack.finish(step.x[:, 1:], *step.where)),
        ("cos", lambda: stack.finish(step.x, cos[1:], sin, slots, tables, lengths, starts)),
        ("slot_mapping", lambda: stack.finish(step.x, cos, sin, slots[1:], tables, lengths, starts)),
        ("layers 1 to 2", lambda: stack(step.x, *step.where, first=1, count=1)),
    ]:
        with pytest.raises(KernelError, match=message):
            call()
