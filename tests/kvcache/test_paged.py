"""The paged cache: blocks are handed out once and come back, and a step says where its tokens lie."""

from __future__ import annotations

import pytest
import torch

from moesaic.errors import GenerationError, KernelError
from moesaic.kvcache.paged import BlockPool, KvShape, PagedSequence, PoolLayer, pool_bytes
from moesaic.kvcache.pool_memory import pool_layers
from moesaic.kvcache.step_input import StepInput


def test_blocks_are_handed_out_once_and_come_back():
    pool = BlockPool(5, 16)
    first, second = pool.take(2), pool.take(3)
    assert sorted(first + second) == [0, 1, 2, 3, 4] and pool.num_free == 0
    with pytest.raises(GenerationError, match=r"1 blocks of 16 positions are needed and 0 of 5 are free"):
        pool.take(1)
    pool.give_back(first)
    assert sorted(pool.take(2)) == sorted(first)
    assert [pool.blocks_for(n) for n in (0, 1, 16, 17)] == [0, 1, 1, 2]


def test_a_block_is_free_when_its_last_holder_gives_it_back():
    pool = BlockPool(2, 16)
    blocks = pool.take(1)
    pool.hold(blocks)
    pool.give_back(blocks)
    assert pool.num_free == 1
    pool.give_back(blocks)
    assert pool.num_free == 2
    for wrong in (pool.give_back, pool.hold):
        with pytest.raises(KernelError, match="nobody"):
            wrong(blocks)


def test_a_sequence_grows_block_by_block():
    pool = BlockPool(40, 4)
    pool.take(3)
    sequence, slots = PagedSequence(pool), []
    for count in (3, 1, 0, 2, 9, 100):
        slots += sequence.append(count).tolist()
    assert sequence.length == 115 and len(sequence.blocks) == 29
    assert sequence.table.dtype == torch.int32 and tuple(sequence.table.tolist()) == sequence.blocks
    assert slots == [sequence.blocks[i // 4] * 4 + i % 4 for i in range(115)]
    assert len(set(slots)) == 115 and min(slots) >= 12


def test_truncating_frees_what_is_empty_and_positions_are_written_again():
    pool = BlockPool(8, 4)
    sequence = PagedSequence(pool)
    slots = sequence.append(11)
    sequence.truncate(5)
    assert sequence.length == 5 and pool.num_free == 6
    assert torch.equal(sequence.append(6), slots[5:])
    with pytest.raises(KernelError, match="truncate"):
        sequence.truncate(12)
    sequence.free()
    assert sequence.length == 0 and sequence.blocks == () and pool.num_free == 8


def test_a_full_pool_leaves_the_sequence_as_it_was():
    pool = BlockPool(2, 4)
    sequence = PagedSequence(pool)
    sequence.append(3)
    with pytest.raises(GenerationError):
        sequence.append(6)
    assert sequence.length == 3 and pool.num_free == 1
    assert len(sequence.append(5)) == 5


def test_memory_of_a_layer():
    heads = PoolLayer.empty(KvShape(2, 8, 6), 5, 16, torch.float16)
    assert heads.keys.shape == (5, 16, 2, 8) and heads.values.shape == (5, 16, 2, 6)
    latent = PoolLayer.empty(KvShape.latent(12, 4), 5, 16)
    assert latent.keys.shape == (5, 16, 16) and latent.values is None and latent.keys.dtype == torch.bfloat16
    tensors = heads.keys, heads.values, latent.keys
    shapes = [KvShape(2, 8, 6), KvShape.latent(12, 4)]
    assert pool_bytes(shapes, 5, 16, torch.bfloat16) == sum(x.numel() * x.element_size() for x in tensors)
    with pytest.raises(KernelError, match="float64"):
        PoolLayer.empty(KvShape(1, 8, 8), 1, 1, torch.float64)


@pytest.fixture
def sequences():
    pool = BlockPool(20, 4)
    pair = PagedSequence(pool), PagedSequence(pool)
    pair[0].append(6)
    pair[1].append(1)
    return pair


def test_a_step_of_several_sequences(sequences):
    first, second = sequences
    step = StepInput.build([(first, 3), (second, 1)])
    assert step.positions.tolist() == [6, 7, 8, 1]
    expected = [first.blocks[p // 4] * 4 + p % 4 for p in (6, 7, 8)] + [second.blocks[0] * 4 + 1]
    assert step.slot_mapping.tolist() == expected
    assert step.seq_lens.tolist() == [9, 2] and step.query_start.tolist() == [0, 3, 4]
    assert step.block_tables[0].tolist() == list(first.blocks)
    assert step.block_tables[1, 0] == second.blocks[0] and step.block_tables.shape == (2, 3)
    assert [x.dtype for x in (step.positions, step.slot_mapping)] == [torch.int64] * 2
    assert {x.dtype for x in (step.block_tables, step.seq_lens, step.query_start)} == {torch.int32}
    assert StepInput.build([(first, 1)], max_blocks=7).block_tables.shape == (1, 7)


def test_padding_to_the_buffers_of_a_graph(sequences):
    first, second = sequences
    fixed = StepInput.empty(5, 5, 6)
    assert fixed.query_start.tolist() == [0, 1, 2, 3, 4, 5] and fixed.slot_mapping.tolist() == [-1] * 5
    addresses = [x.data_ptr() for x in (fixed.positions, fixed.block_tables, fixed.query_start)]
    StepInput.build([(first, 1), (second, 1)], like=fixed).copy_into(fixed)
    assert fixed.positions.tolist() == [6, 1, 0, 0, 0]
    assert fixed.slot_mapping.tolist()[2:] == [-1] * 3 and min(fixed.slot_mapping.tolist()[:2]) >= 0
    assert fixed.seq_lens.tolist() == [7, 2, 0, 0, 0] and fixed.query_start.tolist() == [0, 1, 2, 3, 4, 5]
    assert addresses == [x.data_ptr() for x in (fixed.positions, fixed.block_tables, fixed.query_start)]
    step = StepInput.build([(second, 2)], like=StepInput.empty(8, 3, 6))
    assert step.query_start.tolist() == [0, 2, 5, 8]
    with pytest.raises(KernelError, match="build with like"):
        step.copy_into(fixed)


def test_a_step_that_does_not_fit_changes_nothing(sequences):
    first, second = sequences
    lengths, free = [s.length for s in sequences], first.pool.num_free
    wrong = [
        (KernelError, "does not fit", lambda: StepInput.build([(first, 4)], like=StepInput.empty(3, 1, 6))),
        (KernelError, "does not fit", lambda: StepInput.build([(first, 4)], max_blocks=2)),
        (KernelError, "no sequence of padding", lambda: StepInput.build([(first, 2)], like=StepInput.empty(3, 1, 6))),
        (KernelError, "at least one", lambda: StepInput.build([(first, 1), (second, 0)])),
        (KernelError, "at least one", lambda: StepInput.build([])),
        (GenerationError, "needed", lambda: StepInput.build([(first, 2), (second, 99)])),
    ]
    for error, message, call in wrong:
        with pytest.raises(error, match=message):
            call()
        assert [s.length for s in sequences] == lengths and first.pool.num_free == free


class Store:
    """Memory for up to `most` blocks, some at a time."""

    def __init__(self, most: int) -> None:
        self.most, self.asked = most, []

    def extend(self, num_blocks: int) -> int:
        self.asked.append(num_blocks)
        if num_blocks > self.most:
            raise GenerationError("there is no memory")
        return min(self.most, -(-num_blocks // 3) * 3)


def test_blocks_get_memory_when_they_are_taken():
    store = Store(7)
    pool = BlockPool(10, 16, store, num_backed=3)
    assert (pool.num_free, pool.num_free_backed, pool.end) == (10, 3, 0)
    assert pool.take(2) == [0, 1] and store.asked == []
    assert pool.take(2) == [2, 3] and store.asked == [4]
    assert (pool.num_backed, pool.num_free, pool.num_free_backed, pool.end) == (6, 6, 2, 4)
    pool.give_back([0, 1])
    assert pool.take(1) == [0]  # the lowest, so that the last become free
    with pytest.raises(GenerationError, match="no memory"):
        pool.take(6)
    assert (pool.num_backed, pool.num_free, pool.end) == (6, 7, 4)
    assert pool.take(4) == [1, 4, 5, 6] and pool.num_backed == 7
    pool.give_back([6, 5])
    assert pool.end == 5
    with pytest.raises(GenerationError, match="7 blocks of 16 positions are needed and 5 of 10 are free"):
        pool.take(7)


def test_layers_share_one_piece_of_memory_block_after_block():
    shapes = [KvShape(2, 8, 6), KvShape.latent(12, 4), KvShape(1, 16, 16)]
    memory = torch.zeros(pool_bytes(shapes, 5, 4, torch.float32) + 64, dtype=torch.uint8)[64:]
    layers = pool_layers(shapes, memory, 5, 4, torch.float32)
    own = [PoolLayer.empty(shape, 5, 4, torch.float32) for shape in shapes]
    numbers = iter(range(1, 1000))
    for layer, expected in zip(layers, own, strict=True):
        for name in ("keys", "values"):
            ours, theirs = getattr(layer, name), getattr(expected, name)
            assert (ours is None) == (theirs is None)
            if ours is not None:
                assert ours.shape == theirs.shape and ours.stride()[1:] == theirs.stride()[1:]
                ours.fill_(next(numbers))
    for index in range(5):  # whole blocks follow each other
        size = memory.numel() // 5
        block = memory[index * size : (index + 1) * size].view(torch.float32)
        assert sorted(set(block.tolist())) == [1, 2, 3, 4, 5]
        assert [int((block == number).sum()) for number in range(1, 6)] == [64, 48, 64, 64, 64]
    layers[0].copy(torch.tensor([1]), torch.tensor([3]))
    assert bool((layers[1].keys == 3).all())
    with pytest.raises(KernelError, match="6 blocks take"):
        pool_layers(shapes, memory, 6, 4, torch.float32)
    with pytest.raises(KernelError, match="float64"):
        pool_layers(shapes, memory, 1, 4, torch.float64)


def test_a_step_of_positions_that_are_there_already():
    """As `build` would have given when the sequences ended there; what lies behind is not part of it."""
    pool = BlockPool(12, 4)
    grown, whole = [PagedSequence(pool) for _ in range(2)], [PagedSequence(pool) for _ in range(2)]
    for first, second in zip(grown, whole, strict=True):
        first.append(3)
        second.append(13)
    for sequence, other in zip(grown, whole, strict=True):
        built, found = StepInput.build([(sequence, 4)]), StepInput.of([(other, 3, 7)])
        assert found.positions.tolist() == built.positions.tolist() == [3, 4, 5, 6]
        assert found.seq_lens.tolist() == [7] and found.query_start.tolist() == [0, 4]
        assert found.block_tables.tolist() == [list(other.blocks[:2])] and found.state_slots.tolist() == [-1]
        offsets = [other.blocks[position // 4] * 4 + position % 4 for position in range(3, 7)]
        assert found.slot_mapping.tolist() == offsets
    both = StepInput.of([(whole[0], 12, 13), (whole[1], 0, 2)])
    assert (both.positions.tolist(), both.seq_lens.tolist()) == ([12, 0, 1], [13, 2])
    assert both.query_start.tolist() == [0, 1, 3] and both.block_tables.shape == (2, 4)
    for spans in ([], [(whole[0], 3, 3)], [(whole[0], 12, 14)]):
        with pytest.raises(KernelError, match=r"expected at least one sequence|of a sequence of 13"):
            StepInput.of(spans)
    assert whole[0].length == 13
