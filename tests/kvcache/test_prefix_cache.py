"""Blocks that are kept for their contents: found by all tokens up to their end, shared, freed oldest first."""

from __future__ import annotations

import pytest

from moesaic.errors import KernelError
from moesaic.kvcache.paged import BlockPool, PagedSequence
from moesaic.kvcache.prefix_cache import PrefixCache
from moesaic.kvcache.states import StatePool


def filled(pool: BlockPool, cache: PrefixCache, ids: list[int]) -> list[int]:
    """Compute a sequence, keep it and end it; returns the blocks that it had."""
    sequence = PagedSequence(pool)
    sequence.append(len(ids))
    blocks = list(sequence.blocks)
    cache.insert(ids, blocks)
    sequence.free()
    return blocks


@pytest.fixture
def pool() -> BlockPool:
    return BlockPool(8, 4)


@pytest.fixture
def cache(pool: BlockPool) -> PrefixCache:
    return PrefixCache(pool)


def test_whole_blocks_are_found_and_shared(pool: BlockPool, cache: PrefixCache) -> None:
    ids = list(range(10))
    blocks = filled(pool, cache, ids)
    assert (len(cache), cache.num_idle, pool.num_free) == (2, 2, 6)
    found = cache.match(ids)
    assert found == blocks[:2]
    assert [pool.holders(block) for block in found] == [2, 2]
    assert cache.num_idle == 0
    sequence = PagedSequence(pool)
    sequence.adopt(found)
    assert sequence.length == 8
    slots = sequence.append(3)
    assert slots[0] // 4 not in found  # what is shared is not written again
    sequence.free()
    assert (cache.num_idle, pool.num_free) == (2, 6)


def test_a_block_is_found_only_behind_the_same_beginning(pool: BlockPool, cache: PrefixCache) -> None:
    filled(pool, cache, [1, 2, 3, 4, 5, 6, 7, 8])
    assert len(cache.match([1, 2, 3, 4, 5, 6, 7, 9, 0])) == 1
    assert cache.match([9, 2, 3, 4, 5, 6, 7, 8, 0]) == []
    assert cache.match([5, 6, 7, 8, 0]) == []


def test_the_last_token_is_never_found(pool: BlockPool, cache: PrefixCache) -> None:
    ids = list(range(8))
    blocks = filled(pool, cache, ids)
    assert cache.match(ids) == blocks[:1]
    assert cache.match(ids[:4]) == cache.match([]) == []
    assert cache.match([*ids, 99]) == blocks


def test_room_is_made_by_what_was_used_longest_ago_and_from_the_end(pool: BlockPool, cache: PrefixCache) -> None:
    old = filled(pool, cache, [1] * 12)
    new = filled(pool, cache, [2] * 8)
    pool.give_back(cache.match([1] * 9))  # its first two blocks are used again
    assert cache.evict(1) == 1
    assert pool.holders(old[2]) == 0
    assert cache.evict(2) == 2
    assert [pool.holders(block) for block in new] == [0, 0]
    assert cache.match([1] * 9) == old[:2]
    assert cache.evict(5) == 0  # both are held by others now
    pool.give_back(old[:2])
    assert cache.evict(1) == 1
    assert cache.match([1] * 9) == old[:1]


def test_the_same_contents_are_kept_once(pool: BlockPool, cache: PrefixCache) -> None:
    first, second = PagedSequence(pool), PagedSequence(pool)
    for sequence in (first, second):
        sequence.append(4)
        cache.insert([7] * 4, sequence.blocks)
    assert len(cache) == 1
    kept = first.blocks[0]
    first.free()
    second.free()
    assert pool.num_free == 7
    assert cache.match([7] * 5) == [kept]


def test_clearing_frees_everything(pool: BlockPool, cache: PrefixCache) -> None:
    filled(pool, cache, list(range(16)))
    cache.clear()
    assert (len(cache), pool.num_free) == (0, 8)
    assert cache.match(list(range(16))) == []


def test_only_an_empty_sequence_without_a_state_adopts(pool: BlockPool) -> None:
    blocks = pool.take(1)
    sequence = PagedSequence(pool)
    sequence.append(1)
    with pytest.raises(KernelError, match="1 positions"):
        sequence.adopt(blocks)
    with pytest.raises(KernelError, match="recurrent state"):
        PagedSequence(pool, StatePool(1)).adopt(blocks)


class Lender:
    def extend(self, num_blocks: int) -> int:
        return num_blocks


def test_what_lies_in_lent_memory_is_forgotten_when_nobody_uses_it() -> None:
    now = [0.0]
    pool = BlockPool(8, 4, Lender(), num_backed=2)
    cache = PrefixCache(pool, lambda: now[0])
    first = filled(pool, cache, list(range(100, 112)))
    assert first == [0, 1, 2] and pool.num_backed == 3
    now[0] = 50.0
    second = filled(pool, cache, list(range(200, 208)))
    assert second == [3, 4]
    assert cache.forget_lent(100.0) == 0
    now[0] = 101.0
    assert cache.forget_lent(100.0) == 1  # block 2; the others are the pool's own, or were used later
    assert (len(cache), pool.end) == (4, 5)
    assert cache.match(list(range(100, 113))) == [0, 1]
    held = cache.match(list(range(200, 209)))
    now[0] = 300.0
    assert cache.forget_lent(100.0) == 0  # somebody uses them
    pool.give_back(held)
    assert cache.forget_lent(100.0) == 0  # it has looked just now
    now[0] = 320.0
    assert cache.forget_lent(100.0) == 2
    assert pool.end == 2
