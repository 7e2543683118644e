"""Blocks that stay in a pool for their contents: prompts that begin alike compute their beginning once.

A whole block is found by a hash of its tokens and of all tokens before it. The cache holds its blocks as a sequence
would, so a block may be shared by the cache and any number of sequences, and is never written again. It does not know
what a block stores, nor when there is need for room.
"""

from __future__ import annotations

import hashlib
import time
from array import array
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence

from moesaic.kvcache.paged import BlockPool

__all__ = ["PrefixCache"]

_DIGEST_BYTES = 20
_LOOKS = 8


class PrefixCache:
    """Whole blocks by what they hold, least recently used first to go.

    Args:
        pool: where the blocks are.
        clock: seconds from any start.
    """

    def __init__(self, pool: BlockPool, clock: Callable[[], float] = time.monotonic) -> None:
        self._pool, self._clock = pool, clock
        self._used: dict[int, float] = {}  # when a block was used last
        self._looked = clock()
        self._blocks: OrderedDict[bytes, int] = OrderedDict()  # least recently used first

    def __len__(self) -> int:
        return len(self._blocks)

    @property
    def num_idle(self) -> int:
        """Blocks that only the cache holds: so many `evict` can free."""
        holders = self._pool.holders
        return sum(holders(block) == 1 for block in self._blocks.values())

    def match(self, ids: Sequence[int]) -> list[int]:
        """The blocks that the first tokens of a sequence are found in, held for the caller.

        The last token is never among them: it has to be computed for its logits.

        Args:
            ids: tokens of the sequence.
        """
        keys: list[bytes] = []
        blocks: list[int] = []
        for key in self._keys(ids, max(0, len(ids) - 1) // self._pool.block_size):
            if key not in self._blocks:
                break
            keys.append(key)
            blocks.append(self._blocks[key])
        self._pool.hold(blocks)
        self._touch(keys)
        return blocks

    def insert(self, ids: Sequence[int], blocks: Sequence[int]) -> None:
        """Keep the whole blocks of a sequence.

        Args:
            ids: tokens whose keys and values have been computed.
            blocks: those of the sequence, in order.
        """
        keys = list(self._keys(ids, min(len(ids) // self._pool.block_size, len(blocks))))
        for key, block in zip(keys, blocks, strict=False):
            if key not in self._blocks:
                self._pool.hold((block,))
                self._blocks[key] = block
        self._touch(keys)

    def evict(self, count: int) -> int:
        """Free blocks that only the cache holds; returns how many, `count` unless there are fewer."""
        holders, victims = self._pool.holders, list[bytes]()
        for key, block in self._blocks.items():
            if len(victims) >= count:
                break
            if holders(block) == 1:
                victims.append(key)
        self._drop(victims)
        return len(victims)

    def forget_lent(self, seconds: float) -> int:
        """Free blocks that only the cache holds, whose memory was lent, and that nobody has used for so long.

        It looks for them eight times in that time, however often it is called.
        """
        now = self._clock()
        if now - self._looked < seconds / _LOOKS:
            return 0
        self._looked = now
        own, holders, before = self._pool.num_own, self._pool.holders, now - seconds
        victims = [
            key
            for key, block in self._blocks.items()
            if block >= own and holders(block) == 1 and self._used[block] < before
        ]
        self._drop(victims)
        return len(victims)

    def clear(self) -> None:
        """Hold nothing any more."""
        self._drop(list(self._blocks))

    def _drop(self, keys: list[bytes]) -> None:
        blocks = [self._blocks.pop(key) for key in keys]
        for block in blocks:
            del self._used[block]
        self._pool.give_back(blocks)

    def _touch(self, keys: list[bytes]) -> None:
        """Just used, the first block last: no block goes before those that are found only through it."""
        now = self._clock()
        for key in reversed(keys):
            self._blocks.move_to_end(key)
            self._used[self._blocks[key]] = now

    def _keys(self, ids: Sequence[int], count: int) -> Iterator[bytes]:
        """Hashes of the first `count` whole blocks."""
        size = self._pool.block_size
        data = memoryview(array("q", ids[: count * size])).cast("B")
        key = b""
        for index in range(count):
            tokens = data[index * size * 8 : (index + 1) * size * 8]
            key = hashlib.blake2b(key + tokens, digest_size=_DIGEST_BYTES).digest()
            yield key
