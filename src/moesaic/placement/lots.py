"""How VRAM that can be moved is divided at first, and how much of it the cache of keys and values could have.

Such memory comes in lots. Three have them: the cache of keys and values, the cache of experts, and the buffers through
which experts are streamed in prefill. What a plan gives each is where it begins; the experts lend to the other two, and
to the activations of chunks that are longer than the memory set aside for them. How lots are moved is not known here.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from moesaic.placement.vram import StepSizes, VramBudget

__all__ = ["LOT_BYTES", "VramLots", "divide"]

LOT_BYTES = 16 * 1024**2
"""Memory that is moved at once: a multiple of what drivers map (2 MiB), few enough of them, and little wasted."""

_FLOAT = 4
_LONG_SHARE = 4  # chunks are long only where their lots are at most such a part of all


@dataclass(frozen=True, slots=True)
class VramLots:
    """Of a budget; counts are lots unless they say otherwise.

    Attributes:
        total: of all three.
        keys: of the cache of keys and values at first.
        staging: of prefill's buffers, while a prefill is under way; 0 if there are none.
        least: that the cache of experts keeps: a slot.
        most_experts: that the cache of experts has use for.
        block_bytes: of a block of the cache of keys and values, all layers.
        num_blocks: blocks that it can grow to.
        first_blocks: blocks at first.
        rotary_positions: for which there are rotary angles; no sequence is longer.
        expert_bytes: of a slot.
        num_experts: that slots could hold.
        rotary_bytes: of a position's rotary angles.
        chunk: tokens of a prompt that go through the layers at once in memory that is set aside for them.
        long_chunk: the same with lots that experts lend; 0 if they lend none for it.
        long: those lots.
        lot_bytes: of a lot.
    """

    total: int
    keys: int
    staging: int
    least: int
    most_experts: int
    block_bytes: int
    num_blocks: int
    first_blocks: int
    rotary_positions: int
    expert_bytes: int
    num_experts: int
    rotary_bytes: int = 0
    chunk: int = 0
    long_chunk: int = 0
    long: int = 0
    lot_bytes: int = LOT_BYTES

    @property
    def nbytes(self) -> int:
        """Of all lots."""
        return self.total * self.lot_bytes

    @property
    def most_keys(self) -> int:
        """Lots that the cache of keys and values can grow to."""
        return self.lots_for(self.num_blocks)

    def lots_for(self, num_blocks: int) -> int:
        """Lots that so many blocks take."""
        return _ceil(num_blocks * self.block_bytes, self.lot_bytes)

    def slots(self, num_lots: int) -> int:
        """Experts that so many lots hold."""
        return min(self.num_experts, num_lots * self.lot_bytes // self.expert_bytes)

    @property
    def first_slots(self) -> int:
        """Experts in the cache at first, while there is no prefill."""
        return self.slots(min(self.most_experts, self.total - self.keys))


def divide(
    budget: VramBudget,
    step: StepSizes,
    block_size: int,
    max_batch: int,
    lot_bytes: int = LOT_BYTES,
    long_chunk: int = 0,
) -> VramLots | None:
    """Lots of a budget; None if there is no cache of experts that could lend any.

    Args:
        budget: whose experts and cache of keys and values share what neither weights nor steps need.
        step: sizes of the model.
        block_size: positions of a block.
        max_batch: sequences at a time.
        lot_bytes: of a lot.
        long_chunk: tokens that a chunk of a prompt should have where there is memory for it.
    """
    if budget.cache_experts < 1 or budget.kv_cache < 1 or budget.shortfall:
        return None
    block_bytes = budget.kv_cache // budget.num_blocks
    least, staging = _ceil(budget.expert_bytes, lot_bytes), _ceil(budget.staging, lot_bytes)
    keys = _ceil(budget.kv_cache, lot_bytes)
    free = budget.kv_cache + budget.left
    # Angles are there from the beginning, for all positions that there could be: they are small beside keys.
    first = budget.num_blocks * block_size
    could = max(first, (free // lot_bytes - staging - least) * lot_bytes // block_bytes * block_size)
    rotary_positions = max(first, min(could, step.longest or could))
    total = (free - (rotary_positions - first) * step.rotary * _FLOAT) // lot_bytes
    if total < keys + staging + least:
        return None
    long_chunk = min(long_chunk, rotary_positions)
    long = _ceil(step.chunk_bytes(long_chunk) - step.chunk_bytes(budget.max_chunk), lot_bytes)
    if not staging or long_chunk <= budget.max_chunk or long * _LONG_SHARE > total - keys - staging - least:
        long_chunk = long = 0
    num_blocks = (total - staging - least - long) * lot_bytes // block_bytes
    if step.longest:
        num_blocks = min(num_blocks, max_batch * (_ceil(step.longest, block_size) + 1))
    return VramLots(
        total=total,
        keys=keys,
        staging=staging,
        least=least,
        most_experts=_ceil(budget.num_experts * budget.expert_bytes, lot_bytes),
        block_bytes=block_bytes,
        num_blocks=max(num_blocks, budget.num_blocks),
        first_blocks=budget.num_blocks,
        rotary_positions=rotary_positions,
        expert_bytes=budget.expert_bytes,
        num_experts=budget.num_experts,
        rotary_bytes=step.rotary * _FLOAT,
        chunk=budget.max_chunk,
        long_chunk=long_chunk,
        long=long,
        lot_bytes=lot_bytes,
    )


def _ceil(count: int, size: int) -> int:
    return -(-count // size)
