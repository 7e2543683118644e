"""Linear attention on states in slots, against a float64 loop that says what the gated delta rule is."""

from __future__ import annotations

import pytest
import torch

from moesaic import _native
from moesaic.errors import KernelError
from moesaic.kernels.block_parts import Norm
from moesaic.kernels.delta_net import DeltaNet

TAPS, SLOTS, EPS = 4, 5, 1e-5
# Key heads, heads, key_dim, value_dim: odd sizes; whole vectors; those of Qwen3-Next with fewer heads.
SIZES = [(2, 6, 13, 20), (1, 2, 32, 48), (2, 4, 128, 128)]
# New tokens, tokens before, slots: one token each; a chunk beside a prompt; shorter than the convolution.
STEPS = [
    ([1, 1, 1], [7, 0, 3], [3, 1, 0]),
    ([19, 2, 35], [5, 0, 0], [2, 0, 4]),
    ([2, 1, 3], [2, 1, 40], [0, 2, 1]),
]


@pytest.fixture(autouse=True)
def isa(each_isa):
    """Every test of this module runs on each instruction set that this machine has."""
    return each_isa


class Layer:
    """Random weights and states of a layer, its parts anywhere in a row, and the same in float64."""

    def __init__(self, sizes, in_order=False):
        generator = torch.Generator().manual_seed(0)
        self.random = lambda *shape: torch.randn(*shape, generator=generator)
        self.key_heads, self.heads, self.key_dim, self.value_dim = sizes
        self.channels = 2 * self.key_heads * self.key_dim + self.heads * self.value_dim
        gated = self.heads * self.value_dim
        self.width = 17 + self.channels + gated + 2 * self.heads
        rest = torch.arange(gated, self.width)
        if not in_order:
            rest = rest[torch.randperm(len(rest), generator=generator)]
        ends = self.channels, self.channels + self.heads, self.channels + 2 * self.heads
        self.conv, self.beta, self.decay = rest[: ends[0]], rest[ends[0] : ends[1]], rest[ends[1] : ends[2]]
        self.gate = torch.randperm(self.heads, generator=generator) * self.value_dim
        self.weight, self.norm = self.random(self.channels, TAPS), self.random(self.value_dim)
        self.rate, self.bias = self.random(self.heads).exp(), self.random(self.heads)
        self.conv_state = self.random(SLOTS, TAPS - 1, self.channels)
        self.state = self.random(SLOTS, self.heads, self.key_dim, self.value_dim)

    def op(self, **changes):
        arguments = {
            "width": self.width,
            "conv_columns": self.conv.int(),
            "gate_columns": self.gate.int(),
            "beta_columns": self.beta.int(),
            "decay_columns": self.decay.int(),
            "conv_weight": self.weight,
            "rate": self.rate,
            "step_bias": self.bias,
            "norm": Norm(self.norm, EPS),
            "key_dim": self.key_dim,
            "value_dim": self.value_dim,
        }
        return DeltaNet(**(arguments | changes))

    def expected(self, x, past, state):
        """Of one sequence in float64: outputs, last inputs of the convolution, state; as the paper writes it."""
        x, weight = x.double(), self.weight.double()
        inputs = torch.cat([past.double(), x[:, self.conv]])
        sums = torch.stack([(inputs[t : t + TAPS] * weight.t()).sum(0) for t in range(len(x))])
        mixed, state, outputs = torch.nn.functional.silu(sums), state.double().clone(), []
        width = self.key_heads * self.key_dim
        q, k, v = mixed.split([width, width, self.heads * self.value_dim], 1)
        for t in range(len(x)):
            for head in range(self.heads):
                group = head * self.key_heads // self.heads
                query, key = (part[t].view(self.key_heads, -1)[group] for part in (q, k))
                query = query / (query.square().sum() + 1e-6).sqrt() / self.key_dim**0.5
                key = key / (key.square().sum() + 1e-6).sqrt()
                time = torch.nn.functional.softplus(x[t, self.decay[head]] + self.bias[head].double())
                decayed = state[head] * torch.exp(-self.rate[head].double() * time)
                change = torch.sigmoid(x[t, self.beta[head]]) * (v[t].view(self.heads, -1)[head] - key @ decayed)
                state[head] = decayed + torch.outer(key, change)
                out = query @ state[head]
                out = out / (out.square().mean() + EPS).sqrt() * self.norm.double()
                gate = x[t, self.gate[head] : self.gate[head] + self.value_dim]
                outputs.append(out * torch.nn.functional.silu(gate))
        return torch.cat(outputs).view(len(x), -1), inputs[-(TAPS - 1) :], state


def step_of(counts, starts, slots):
    positions = [start + i for count, start in zip(counts, starts, strict=True) for i in range(count)]
    begins = [sum(counts[:i]) for i in range(len(counts) + 1)]
    return torch.tensor(positions), torch.tensor(begins, dtype=torch.int32), torch.tensor(slots)


@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize(("counts", "starts", "slots"), STEPS)
def test_sequences_of_a_step(sizes, counts, starts, slots):
    layer = Layer(sizes, in_order=sizes[2] == 32)
    x = 2 * layer.random(sum(counts), layer.width)
    x[0, layer.decay[0]] = 50.0  # where exp is too large
    conv, state, first = layer.conv_state.clone(), layer.state.clone(), 0
    out = layer.op()(x, conv, state, *step_of(counts, starts, slots))
    for count, start, slot in zip(counts, starts, slots, strict=True):
        past, before = layer.conv_state[slot], layer.state[slot]
        if start == 0:
            past, before = torch.zeros_like(past), torch.zeros_like(before)
        rows = slice(first, first + count)
        first += count
        expected, last_inputs, last_state = layer.expected(x[rows], past, before)
        assert (out[rows] - expected).abs().max() < 1e-4
        assert torch.equal(conv[slot].double(), last_inputs)
        assert (state[slot] - last_state).abs().max() < 2e-5
    others = [slot for slot in range(SLOTS) if slot not in slots]
    assert torch.equal(conv[others], layer.conv_state[others])
    assert torch.equal(state[others], layer.state[others])


@pytest.mark.parametrize("threads", [1, 3])
def test_neither_cuts_nor_others_change_a_bit(threads):
    layer = Layer(SIZES[2])
    op, x = layer.op(), layer.random(70, layer.width)
    before = _native.num_threads()
    _native.set_num_threads(threads)
    conv, state = layer.conv_state.clone(), layer.state.clone()
    whole = op(x, conv, state, *step_of([70], [0], [2]))
    for cuts in ([1] * 70, [3, 67], [64, 5, 1]):
        conv2, state2, rows, at = layer.conv_state.clone(), layer.state.clone(), [], 0
        for count in cuts:
            others = [layer.random(n, layer.width) for n in (1, 4)]
            step = step_of([1, count, 4], [5, at, 0], [0, 3, 1])
            out = op(torch.cat([others[0], x[at : at + count], others[1]]), conv2, state2, *step)
            rows.append(out[1 : 1 + count])
            at += count
        assert torch.equal(torch.cat(rows), whole)
        assert torch.equal(state2[3], state[2])
        assert torch.equal(conv2[3], conv[2])
    _native.set_num_threads(before)


def test_what_does_not_go_together_is_refused():
    layer = Layer(SIZES[0])
    for changes in (
        {"key_dim": 11},
        {"key_dim": 1000},
        {"width": 20},
        {"rate": layer.rate[1:]},
        {"norm": Norm(layer.norm[1:], EPS)},
        {"beta_columns": -layer.beta.int()},
    ):
        with pytest.raises(KernelError):
            layer.op(**changes)
    op, x = layer.op(), layer.random(3, layer.width)
    for counts, slots in (([3], [SLOTS]), ([3], [-1]), ([2], [0]), ([3, 0], [0, 1])):
        _, begins, where = step_of(counts, [0] * len(counts), slots)
        with pytest.raises(KernelError, match="do not go together"):
            op(x, layer.conv_state, layer.state, torch.arange(3), begins, where)
    with pytest.raises(KernelError, match="recurrent"):
        op(x, layer.conv_state, layer.state[1:], *step_of([3], [0], [0]))
    with pytest.raises(KernelError, match="positions"):
        op(x, layer.conv_state, layer.state, torch.arange(3).int(), *step_of([3], [0], [0])[1:])
