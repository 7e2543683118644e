"""Linear attention on states in slots, against a float64 loop that says what the gated delta rule is."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from tests.kernels.triton.conftest import DEVICE

from moesaic.errors import KernelError
from moesaic.kernels.triton.delta_rule import DeltaColumns, DeltaStep, causal_conv, gated_delta_rule, gated_norm_

TAPS, KEY_HEADS, HEADS, KEY_DIM, VALUE_DIM, SLOTS = 4, 2, 6, 12, 20, 5
CHANNELS = 2 * KEY_HEADS * KEY_DIM + HEADS * VALUE_DIM
WIDTH = 17 + CHANNELS + HEADS * VALUE_DIM + 2 * HEADS


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def random(*shape):
    return torch.randn(*shape, device=DEVICE)


def some_columns():
    """Every part somewhere else in a row of WIDTH."""
    free = torch.randperm(WIDTH // VALUE_DIM)[:HEADS] * VALUE_DIM
    used = {int(first) + i for first in free for i in range(VALUE_DIM)}
    rest = torch.tensor([i for i in range(WIDTH) if i not in used])
    rest = rest[torch.randperm(len(rest))]
    parts = rest[:CHANNELS], free, rest[CHANNELS : CHANNELS + HEADS], rest[CHANNELS + HEADS : CHANNELS + 2 * HEADS]
    return DeltaColumns(*(part.int() for part in parts)).to(torch.device(DEVICE))


def step_of(counts, starts, slots):
    """A step of sequences: their new tokens, their lengths before, their slots."""
    positions = [start + i for count, start in zip(counts, starts, strict=True) for i in range(count)]
    begins = [sum(counts[:i]) for i in range(len(counts) + 1)]
    return DeltaStep(
        torch.tensor(positions, device=DEVICE),
        torch.tensor(begins, dtype=torch.int32, device=DEVICE),
        torch.tensor(slots, device=DEVICE),
        max(counts),
    )


# New tokens, tokens before, slots: one token each with padding; a chunk beside a prompt; shorter than the convolution.
STEPS = [
    ([1, 1, 1, 1], [7, 0, 3, 0], [3, 1, 0, -1]),
    ([19, 2, 35], [5, 0, 0], [2, 0, 4]),
    ([2, 1, 3, 2], [2, 1, 40, 0], [0, 2, 1, -1]),
]


@pytest.mark.parametrize(("counts", "starts", "slots"), STEPS)
def test_convolution(counts, starts, slots):
    x, columns, weight = random(sum(counts), WIDTH), some_columns(), random(CHANNELS, TAPS)
    state = random(SLOTS, TAPS - 1, CHANNELS)
    before, first = state.clone(), 0
    out = causal_conv(x, columns.conv, weight, state, step_of(counts, starts, slots))
    for count, start, slot in zip(counts, starts, slots, strict=True):
        own = x[first : first + count, columns.conv.long()].double()
        past = before[slot].double() if start else torch.zeros_like(before[0]).double()
        inputs = torch.cat([past, own])
        sums = torch.stack([(inputs[t : t + TAPS] * weight.double().t()).sum(0) for t in range(count)])
        expected = torch.nn.functional.silu(sums) if slot >= 0 else torch.zeros_like(sums)
        assert (out[first : first + count] - expected).abs().max() < 1e-5
        if slot >= 0:
            assert torch.equal(state[slot].double(), inputs[-(TAPS - 1) :])
        first += count
    others = [slot for slot in range(SLOTS) if slot not in slots]
    assert torch.equal(state[others], before[others])


def loop(mixed, x, columns, rate, bias, state):
    """The rule for one sequence in float64, as the paper writes it; returns outputs and the last state."""
    mixed, x, state, outputs = mixed.double(), x.double(), state.double().clone(), []
    q, k, v = mixed.split([KEY_HEADS * KEY_DIM, KEY_HEADS * KEY_DIM, HEADS * VALUE_DIM], 1)
    for t in range(len(x)):
        row = torch.empty(HEADS, VALUE_DIM, dtype=torch.float64, device=DEVICE)
        for head in range(HEADS):
            group = head * KEY_HEADS // HEADS
            query, key = (part[t].view(KEY_HEADS, KEY_DIM)[group] for part in (q, k))
            query = query / (query.square().sum() + 1e-6).sqrt() / KEY_DIM**0.5
            key = key / (key.square().sum() + 1e-6).sqrt()
            beta = torch.sigmoid(x[t, columns.beta[head]])
            time = torch.nn.functional.softplus(x[t, columns.decay[head]] + bias[head].double())
            decayed = state[head] * torch.exp(-rate[head].double() * time)
            change = beta * (v[t].view(HEADS, VALUE_DIM)[head] - key @ decayed)
            state[head] = decayed + torch.outer(key, change)
            row[head] = query @ state[head]
        outputs.append(row.flatten())
    return torch.stack(outputs), state


@pytest.mark.parametrize(("counts", "starts", "slots"), STEPS)
def test_recurrence(counts, starts, slots):
    mixed, x, columns = random(sum(counts), CHANNELS), 3 * random(sum(counts), WIDTH), some_columns()
    rate, bias, state = random(HEADS).exp(), random(HEADS), random(SLOTS, HEADS, KEY_DIM, VALUE_DIM)
    x[0, columns.decay[0]] = 50.0  # where exp is too large
    before, first = state.clone(), 0
    out = gated_delta_rule(mixed, x, columns, rate, bias, state, step_of(counts, starts, slots))
    for count, start, slot in zip(counts, starts, slots, strict=True):
        rows = slice(first, first + count)
        first += count
        if slot < 0:
            assert not out[rows].any()
            continue
        past = before[slot] if start else torch.zeros_like(before[slot])
        expected, last = loop(mixed[rows], x[rows], columns, rate, bias, past)
        assert (out[rows] - expected).abs().max() < 1e-5
        assert (state[slot] - last).abs().max() < 1e-5
    others = [slot for slot in range(SLOTS) if slot not in slots]
    assert torch.equal(state[others], before[others])


def test_gated_norm():
    x, gates, columns, weight = random(5, HEADS * VALUE_DIM), random(5, WIDTH), some_columns(), random(VALUE_DIM)
    heads = x.double().view(5, HEADS, VALUE_DIM)
    picked = torch.stack([gates[:, c : c + VALUE_DIM] for c in columns.gate.tolist()], 1).double()
    normed = heads / (heads.square().mean(-1, keepdim=True) + 1e-3).sqrt() * weight.double()
    expected = (normed * torch.nn.functional.silu(picked)).flatten(1)
    assert gated_norm_(x, gates, columns.gate, weight, 1e-3) is x
    assert (x - expected).abs().max() < 1e-5


def test_wrong_arguments_are_refused():
    x, columns, step = random(2, WIDTH), some_columns(), step_of([2], [0], [0])
    weight, conv = random(CHANNELS, TAPS), random(SLOTS, TAPS - 1, CHANNELS)
    mixed, state, heads = random(2, CHANNELS), random(SLOTS, HEADS, KEY_DIM, VALUE_DIM), random(HEADS)
    int_slots = dataclasses.replace(step, state_slots=step.state_slots.int())
    bad = [
        ("x is", lambda: causal_conv(x.half(), columns.conv, weight, conv, step)),
        ("state has shape", lambda: causal_conv(x, columns.conv, weight, conv[:, 1:].contiguous(), step)),
        ("columns is", lambda: causal_conv(x, columns.conv.long(), weight, conv, step)),
        ("over 1 tokens", lambda: causal_conv(x, columns.conv, weight[:, :1].contiguous(), conv[:, :0], step)),
        ("state_slots is", lambda: causal_conv(x, columns.conv, weight, conv, int_slots)),
        ("positions is", lambda: causal_conv(x[:1], columns.conv, weight, conv, step)),
        ("share evenly", lambda: gated_delta_rule(mixed[:, 1:], x, columns, heads, heads, state, step)),
        ("rate has shape", lambda: gated_delta_rule(mixed, x, columns, heads[1:], heads, state, step)),
        ("state is", lambda: gated_delta_rule(mixed, x, columns, heads, heads, state.transpose(2, 3), step)),
        ("x has shape", lambda: gated_norm_(mixed, x, columns.gate, heads, 1e-3)),
    ]
    for message, call in bad:
        with pytest.raises(KernelError, match=message):
            call()
