"""Slots of recurrent states: a sequence takes one with its first position and gives it back when it is forgotten."""

from __future__ import annotations

import pytest
import torch

from moesaic.errors import GenerationError, KernelError
from moesaic.kvcache.paged import BlockPool, PagedSequence
from moesaic.kvcache.states import SavedStates, StateLayer, StatePool, StateShape
from moesaic.kvcache.step_input import StepInput


@pytest.fixture
def pools():
    return BlockPool(8, 4), StatePool(2)


def test_slots_are_handed_out_once_and_come_back():
    states = StatePool(2)
    slots = {states.take(), states.take()}
    assert slots == {0, 1} and states.num_free == 0
    with pytest.raises(GenerationError, match="All 2 recurrent states are taken"):
        states.take()
    states.give_back(1)
    for wrong in (1, 2, -1):
        with pytest.raises(KernelError, match="given back"):
            states.give_back(wrong)
    assert states.take() == 1


def test_a_sequence_has_a_state_as_long_as_it_has_positions(pools):
    pool, states = pools
    sequence = PagedSequence(pool, states)
    sequence.append(0)
    assert (sequence.state_slot, states.num_free) == (-1, 2)
    sequence.append(5)
    slot = sequence.state_slot
    sequence.append(1)
    assert sequence.is_recurrent and sequence.state_slot == slot >= 0 and states.num_free == 1
    with pytest.raises(KernelError, match="cannot go back"):
        sequence.truncate(5)
    sequence.truncate(6)
    assert (sequence.length, sequence.state_slot) == (6, slot)
    sequence.free()
    assert (sequence.state_slot, states.num_free, pool.num_free) == (-1, 2, 8)


def test_without_a_free_state_nothing_is_appended(pools):
    pool, states = pools
    for _ in range(2):
        PagedSequence(pool, states).append(1)
    third = PagedSequence(pool, states)
    with pytest.raises(GenerationError, match="states are taken"):
        third.append(9)
    assert (third.length, third.blocks, pool.num_free) == (0, (), 6)


def test_a_step_has_the_slots_of_its_sequences(pools):
    pool, states = pools
    first, second, plain = PagedSequence(pool, states), PagedSequence(pool, states), PagedSequence(pool)
    step = StepInput.build([(second, 2), (first, 1), (plain, 1)], like=StepInput.empty(6, 5, 8))
    assert step.state_slots.dtype == torch.int64
    assert step.state_slots.tolist() == [second.state_slot, first.state_slot, -1, -1, -1]
    assert {first.state_slot, second.state_slot} == {0, 1}
    with pytest.raises(GenerationError, match="needed"):
        StepInput.build([(first, 1), (second, 99)])
    assert (first.length, second.length) == (1, 2)  # what no step has computed can be taken back
    first.free()
    with pytest.raises(GenerationError, match="needed"):
        StepInput.build([(first, 1), (second, 99)])
    assert (first.state_slot, states.num_free) == (-1, 1)


def test_memory_of_a_layer_and_copies():
    shape = StateShape(conv_width=3, conv_channels=10, heads=2, key_dim=4, value_dim=5)
    layer = StateLayer.empty(shape, 6)
    assert layer.conv.shape == (6, 3, 10) and layer.recurrent.shape == (6, 2, 4, 5)
    assert sum(x.numel() * x.element_size() for x in (layer.conv, layer.recurrent)) == 6 * shape.nbytes
    for part in (layer.conv, layer.recurrent):
        part.copy_(torch.arange(6.0).view(6, *[1] * (part.ndim - 1)).expand(part.shape))
    layer.copy(4, 1)
    for part in (layer.conv, layer.recurrent):
        assert part.flatten(1)[:, 0].tolist() == [0, 4, 2, 3, 4, 5]


def test_saved_states_come_back_and_others_stay():
    layers = [StateLayer.empty(StateShape(3, 6, 2, 4, 5), 4) for _ in range(2)]
    for number, states in enumerate(x for layer in layers for x in (layer.conv, layer.recurrent)):
        states.copy_(torch.arange(states.numel()).view(states.shape) + 1000 * number)
    before = [x.clone() for layer in layers for x in (layer.conv, layer.recurrent)]
    saved = SavedStates(layers, [3, 1])
    for layer in layers:
        layer.conv.fill_(-1.0)
        layer.recurrent.fill_(-1.0)
    saved.restore()
    for states, kept in zip((x for layer in layers for x in (layer.conv, layer.recurrent)), before, strict=True):
        assert torch.equal(states[[1, 3]], kept[[1, 3]]) and (states[[0, 2]] == -1.0).all()
