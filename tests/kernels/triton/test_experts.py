"""Routed experts in slots on a GPU against float64, on values that `gguf.quants` or a definition gives."""

from __future__ import annotations

import mmap
from dataclasses import replace

import numpy as np
import pytest
import torch
from tests.kernels.oracle import packed, tokens
from tests.kernels.triton.conftest import DEVICE

from moesaic.errors import KernelError, UnsupportedFormatError
from moesaic.kernels.experts import Activation
from moesaic.kernels.triton import few_experts as subject
from moesaic.kernels.triton.experts import ExpertLayout, MatrixLayout
from moesaic.kernels.triton.few_experts import experts_decode, takes_pairs
from moesaic.kernels.triton.grouped_experts import ExpertBlocks, ExpertPairs, bring
from moesaic.quant import FORMATS

NUM_SLOTS, TOP_K = 3, 3
FLOAT_TOLERANCE = 5e-6  # of a chain of two sums of a few hundred products in float32
BFLOAT16_TOLERANCE = 2e-2  # on a GPU many tokens are multiplied as bfloat16


class Case:
    """NUM_SLOTS experts whose numbers are 10 times their slots', random tokens, and what comes out."""

    def __init__(
        self,
        formats,
        hidden,
        intermediate,
        kind="silu",
        num_tokens=3,
        gated=True,
        biased=False,
        by_matrix=False,
        seed=0,
    ):
        rng = np.random.default_rng(seed)
        shapes = ((intermediate, hidden), (intermediate, hidden), (hidden, intermediate))
        stacks = [
            packed(fmt, *shape, NUM_SLOTS, seed + i) for i, (fmt, shape) in enumerate(zip(formats, shapes, strict=True))
        ]
        biases = [rng.standard_normal((10 * NUM_SLOTS, shape[0])).astype(np.float32) for shape in shapes]
        sizes = [stack.matrix_bytes + 16 for stack, _ in stacks]
        matrices, end = [], 64
        for (stack, _), shape, bias, size in zip(stacks, shapes, biases, sizes, strict=True):
            on_device = torch.from_numpy(bias).to(DEVICE) if biased else None
            stride = size if by_matrix else sum(sizes)
            matrices.append(MatrixLayout(stack.format, end, stride, *shape, on_device))
            end += size * (NUM_SLOTS if by_matrix else 1)
        arena = torch.zeros(64 + NUM_SLOTS * sum(sizes), dtype=torch.uint8)
        for slot in range(NUM_SLOTS):
            for (stack, _), matrix in zip(stacks, matrices, strict=True):
                first = slot * matrix.stride + matrix.offset
                piece = stack.data[slot * stack.matrix_bytes : (slot + 1) * stack.matrix_bytes]
                arena[first : first + stack.matrix_bytes] = piece
        self.arena = arena.to(DEVICE)
        activation = Activation(kind, 1.5, 0.8)
        self.layout = ExpertLayout(matrices[0] if gated else None, matrices[1], matrices[2], activation)
        slots = rng.integers(-1, NUM_SLOTS, (num_tokens, TOP_K)).astype(np.int32)
        slots[-1] = -1
        self.slots, self.experts = torch.from_numpy(slots).to(DEVICE), torch.from_numpy(slots * 10).to(DEVICE)
        weights = rng.standard_normal((num_tokens, TOP_K)).astype(np.float32)
        self.weights = torch.from_numpy(weights).to(DEVICE)
        x = tokens(num_tokens, hidden)
        self.x = x.to(DEVICE)
        self.expected = np.zeros((num_tokens, hidden))
        values = [pair[1] for pair in stacks]
        for t in range(num_tokens):
            for k in range(TOP_K):
                if (slot := slots[t, k]) < 0:
                    continue
                bias = [b[10 * slot].astype(np.float64) * biased for b in biases]
                row = x[t].double().numpy()
                up = values[1][slot] @ row + bias[1]
                gate = values[0][slot] @ row + bias[0] if gated else up
                inner = activated(gate, up if gated else 1.0, kind)
                self.expected[t] += weights[t, k] * (values[2][slot] @ inner + bias[2])

    def arguments(self):
        return self.x, self.slots, self.experts, self.weights, self.arena, self.layout

    @property
    def table(self):
        """Expert 10 * n is in slot n."""
        table = torch.full((10 * NUM_SLOTS,), -1, dtype=torch.int32)
        table[::10] = torch.arange(NUM_SLOTS, dtype=torch.int32)
        return table.to(DEVICE)

    def pairs(self):
        return ExpertPairs(self.x, self.experts, self.weights, 10 * NUM_SLOTS, self.layout)

    def grouped(self, **options):
        pairs, table = self.pairs(), self.table
        pairs.multiply(self.arena, self.layout, NUM_SLOTS, pairs.blocks(table))
        return pairs.sum(table, **options)

    def error(self, result):
        return np.abs(result.cpu().double().numpy() - self.expected).max() / np.abs(self.expected).max()


def activated(gate, up, kind):
    g = torch.from_numpy(gate)
    if kind == "swiglu_oai":
        g = g.clamp(max=0.8)
        return (g * torch.sigmoid(1.5 * g)).numpy() * (np.clip(up, -0.8, 0.8) + 1)
    functions = {
        "silu": torch.nn.functional.silu,
        "gelu": torch.nn.functional.gelu,
        "gelu_tanh": lambda v: torch.nn.functional.gelu(v, approximate="tanh"),
        "relu": torch.relu,
        "relu2": lambda v: torch.relu(v) ** 2,
    }
    return functions[kind](g).numpy() * up


def grouped_tolerance():
    return BFLOAT16_TOLERANCE if DEVICE == "cuda" else FLOAT_TOLERANCE


@pytest.mark.parametrize("fmt", ["F32", "BF16", "Q8_0", "Q4_1", "NVFP4"])
def test_experts_of_formats_that_read_rows_in_different_orders(fmt):
    size = 40 if FORMATS[fmt].block_size == 1 else 64
    case = Case((fmt, fmt, fmt), size, size, num_tokens=2)
    assert case.error(experts_decode(*case.arguments())) < FLOAT_TOLERANCE
    assert case.error(case.grouped()) < grouped_tolerance()


def test_slots_lie_beyond_what_32_bits_count():
    """The last slot is 9 GiB from the first, as in the cache of a card with much memory: 2.4e9 words."""
    case = Case(("F32", "F32", "F32"), 16, 16, num_tokens=2)
    apart, parts = 9 << 29, (case.layout.gate, case.layout.up, case.layout.down)
    moved = [replace(part, stride=apart) for part in parts]
    layout = replace(case.layout, gate=moved[0], up=moved[1], down=moved[2])
    arena = spacious(layout.arena_bytes(NUM_SLOTS))
    for slot in range(NUM_SLOTS):
        for before, after in zip(parts, moved, strict=True):
            source = case.arena.narrow(0, before.offset + slot * before.stride, before.nbytes)
            arena.narrow(0, after.offset + slot * after.stride, after.nbytes).copy_(source)
    case.slots = torch.tensor([[2, 0, -1], [1, 2, 2]], dtype=torch.int32, device=DEVICE)
    case.experts = 10 * case.slots
    near = experts_decode(*case.arguments()), case.grouped()
    case.arena, case.layout = arena, layout
    assert torch.equal(experts_decode(*case.arguments()), near[0])
    assert torch.equal(case.grouped(), near[1])


def spacious(nbytes):
    """Memory of which only what is touched is there."""
    if DEVICE == "cuda":
        return torch.empty(nbytes, dtype=torch.uint8, device=DEVICE)
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0x4000)  # as Linux numbers it
    return torch.frombuffer(mmap.mmap(-1, nbytes, flags=flags), dtype=torch.uint8)


def test_every_projection_may_have_a_format_of_its_own():
    case = Case(("Q5_1", "F32", "BF16"), 64, 48, num_tokens=2)
    assert case.error(experts_decode(*case.arguments())) < FLOAT_TOLERANCE
    assert case.error(case.grouped()) < grouped_tolerance()


@pytest.mark.parametrize("kind", ["silu", "gelu", "gelu_tanh", "relu", "relu2", "swiglu_oai"])
@pytest.mark.parametrize("gated", [True, False])
def test_activations_and_biases(kind, gated):
    if kind == "swiglu_oai" and not gated:
        return
    case = Case(("F32", "F32", "F32"), 16, 24, kind=kind, num_tokens=2, gated=gated, biased=True)
    assert case.error(experts_decode(*case.arguments())) < FLOAT_TOLERANCE
    assert case.error(case.grouped()) < grouped_tolerance()


def test_blocks_of_many_pairs_and_sums_into_an_output():
    case = Case(("F32", "F32", "F32"), 16, 24, num_tokens=40)
    out = torch.ones(40, 16, device=DEVICE)
    result = case.grouped(out=out, accumulate=True)
    assert result is out
    assert case.error(out - 1) < grouped_tolerance()


def test_each_of_many_pairs_by_itself():
    case = Case(("Q8_0", "Q4_1", "F32"), 32, 64, num_tokens=17, biased=True)
    assert case.error(experts_decode(*case.arguments())) < FLOAT_TOLERANCE


@pytest.mark.parametrize(
    ("num_tokens", "top_k", "num_experts", "expected"),
    [
        (8, 2, 4, True),  # what a step of few tokens is made for
        (9, 2, 4, False),
        (32, 8, 128, True),
        (64, 8, 128, True),
        (65, 8, 128, False),
        (32, 1, 1, False),  # a dense MLP
        (204, 10, 512, True),
        (205, 10, 512, False),  # more than a call takes
    ],
)
def test_pairs_are_sorted_where_experts_have_many(num_tokens, top_k, num_experts, expected):
    assert takes_pairs(num_tokens, top_k, num_experts) == expected


def test_tokens_without_an_expert_in_a_slot_are_zero():
    case = Case(("F32", "F32", "F32"), 32, 48, num_tokens=2)
    case.slots.fill_(-1)
    nan = torch.full((2, 32), float("nan"), device=DEVICE)
    assert not experts_decode(*case.arguments(), out=nan).any()
    case.experts.fill_(-1)
    assert not case.grouped().any()
    case.experts.fill_(10 * NUM_SLOTS)
    assert not case.grouped(out=nan).any()


def test_slots_far_from_the_beginning_are_reached():
    """Units of 16 bytes times slots would not fit into 32 bits if slots were far apart: addresses are 64 bits wide."""
    case = Case(("F32", "F32", "F32"), 32, 48)
    apart = (5 << 30) // (NUM_SLOTS - 1)
    far = torch.empty(NUM_SLOTS * apart, dtype=torch.uint8, device=DEVICE)  # pages that nobody touches are not there
    near = case.layout.up.stride
    for slot in range(NUM_SLOTS):
        for part in (case.layout.gate, case.layout.up, case.layout.down):
            end = part.offset + part.nbytes
            far[slot * apart + part.offset : slot * apart + end] = case.arena[slot * near + part.offset :][
                : part.nbytes
            ]
    gate, up, down = (replace(part, stride=apart) for part in (case.layout.gate, case.layout.up, case.layout.down))
    case.arena, case.layout = far, replace(case.layout, gate=gate, up=up, down=down)
    assert case.error(experts_decode(*case.arguments())) < FLOAT_TOLERANCE
    assert case.error(case.grouped()) < grouped_tolerance()


def test_matrices_of_a_kind_may_lie_side_by_side():
    case = Case(("Q8_0", "F32", "Q4_1"), 32, 64, num_tokens=2, by_matrix=True)
    assert case.layout.gate.stride < case.layout.up.stride
    assert case.error(experts_decode(*case.arguments())) < FLOAT_TOLERANCE
    assert case.error(case.grouped()) < grouped_tolerance()


def test_experts_may_come_one_after_the_other():
    """The last slot is used for one expert after the other, in calls whose blocks were counted on the CPU."""
    case = Case(("F32", "F32", "F32"), 16, 24, num_tokens=40, biased=True)
    pairs, everyone = case.pairs(), case.table
    num_pairs = np.bincount(case.experts.cpu().numpy().clip(min=0).ravel(), minlength=10 * NUM_SLOTS)
    num_pairs[0] -= int((case.experts < 0).sum())
    matrices, all_slots = (case.layout.gate, case.layout.up, case.layout.down), case.arena.clone()
    for slot in range(NUM_SLOTS):
        for part in matrices:
            to, of = (part.offset + s * part.stride for s in (NUM_SLOTS - 1, slot))
            case.arena[to : to + part.nbytes] = all_slots[of : of + part.nbytes]
        table = torch.full_like(everyone, -1)
        table[10 * slot] = NUM_SLOTS - 1
        own = np.where(np.arange(len(num_pairs)) == 10 * slot, num_pairs, 0)
        first = ExpertBlocks.counts(own, pairs.block_size)
        assert first.tolist() == pairs.blocks(table).first.tolist()
        on_device = torch.zeros(len(first), dtype=torch.int32, device=DEVICE)
        source = torch.from_numpy(first)
        bring(source.pin_memory() if DEVICE == "cuda" else source, on_device)
        pairs.multiply(case.arena, case.layout, NUM_SLOTS, ExpertBlocks(table, on_device, int(first[-1])))
    assert case.error(pairs.sum(everyone)) < grouped_tolerance()


def test_wrong_calls_are_refused(monkeypatch):
    case = Case(("F32", "F32", "F32"), 32, 48)
    x, slots, experts, weights, arena, layout = case.arguments()
    with pytest.raises(KernelError, match=r"x is .* expected float32 \[tokens, 32\]"):
        experts_decode(x[:, :31], slots, experts, weights, arena, layout)
    with pytest.raises(KernelError, match=r"slots is .* expected int32"):
        experts_decode(x, slots.long(), experts, weights, arena, layout)
    with pytest.raises(KernelError, match="room for"):
        replace(layout.up, stride=layout.up.nbytes - 16)
    with pytest.raises(KernelError, match=r"experts is .* expected int32 or int64"):
        ExpertPairs(x, weights, weights, 30, layout)
    pairs = case.pairs()
    with pytest.raises(KernelError, match="the arena has"):
        pairs.multiply(arena, layout, NUM_SLOTS + 1, pairs.blocks(case.table))
    with pytest.raises(KernelError, match=r"table is .* expected int32 \[30\]"):
        pairs.blocks(case.table[1:])
    with pytest.raises(KernelError, match="use ExpertPairs"):
        monkeypatch.setattr(subject, "MAX_PAIRS", 2)
        experts_decode(x, slots, experts, weights, arena, layout)
    with pytest.raises(KernelError, match="down is 48 x 32: expected 32 x 48"):
        ExpertLayout(None, layout.up, replace(layout.up), layout.activation)
    with pytest.raises(KernelError, match="swiglu_oai needs a gate"):
        ExpertLayout(None, layout.up, layout.down, Activation("swiglu_oai"))
    with pytest.raises(KernelError, match="multiple of 16"):
        MatrixLayout(FORMATS["F32"], 8, 1024, 16, 16, None)


def test_formats_without_kernels_are_refused(monkeypatch):
    monkeypatch.setattr("moesaic.kernels.triton.formats._FORMATS", {"F32": None})
    with pytest.raises(UnsupportedFormatError, match="Q4_K has no kernels on a GPU: expected one of F32"):
        part = MatrixLayout(FORMATS["Q4_K"], 0, 1 << 20, 256, 256, None)
        ExpertLayout(None, part, part, Activation("silu"))
