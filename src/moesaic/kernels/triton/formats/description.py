"""What the kernels have to know of a format: how its tiles are walked, and two functions. It knows no format.

A panel's tiles are walked in *items*, one per lane of a kernel. An item is `planes` x `steps` units of `width` weights
that a lane reads from 16 rows: `load` reads what a step needs, `codes` makes the weights of the step of it, all planes,
as floats; `load_scales` and `scales` do so for what they are multiplied by and, if there are offsets, what is added.
They are apart so that a kernel can have all loads of an item under way before it waits for the first. The weight of
plane p, step s, position c of item n is

    k = n // interleave * (interleave * item) + n % interleave * (steps * width)
        + p * (interleave * steps * width) + s * width + c,           item = planes * steps * width

so planes are the parts of a word that lie apart along the row (nibbles, for example), and items are interleaved where a
group of scales is shorter than what words hold of one plane. What loads gets pointers to the tile for each lane and
row, `words` of 4 bytes, `halves` of 2 and `bytes` of 1: a unit j of a field that starts at byte `start` of the block is
`words + 4 * start + 16 * j`, `halves + 8 * start + 16 * j` or `byte_at(bytes, start + j)`. The last may be an integer
with the bytes of four rows, so what computes does to every byte what it does to the lowest, and `spread` makes rows.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

import torch

__all__ = ["DeviceFormat"]


@dataclass(frozen=True, slots=True, eq=False, repr=False)
class DeviceFormat:
    """How kernels read one format; they take it as an argument known at compile time.

    Attributes:
        name: unique; compiled kernels are named after it.
        load: `(words, halves, bytes, item, cols, step, format) -> tensors`; `item` counts in the tile.
        codes: `(loaded, grid, magic, item, step) -> planes * width floats`, plane by plane, [items, rows] each.
        load_scales: `(words, halves, bytes, item, format) -> tensors`.
        scales: `(loaded, item, format) -> num_scales floats`, followed by as many offsets if `has_offset`; consecutive
            planes, or steps, share a scale. None: codes are the weights.
        planes, steps, width, interleave: see above; all powers of two.
        num_scales: of an item, a divisor of `planes`.
        has_offset: weight = scale * code + offset.
        items_per_tile: 0 if a panel is one tile, whose items may end behind the last column.
        tile_units: bytes of a tile / 16.
        grid: makes the codebook, int32 on the CPU, that `codes` looks weights up in.
        bits: for each of a step's weights n, if `codes` without `magic` gives 2^(n - 149) times their codes.
        few: another walk through the same tiles, for few tokens.
        pairs: `(loaded, item, step) -> planes * width / 2 int32`, which do what `codes` does for tensor cores: each has
            two bfloat16, which are 2^(n - 133) times a code plus `zero`, n from `pair_bits`. The first of a plane's are
            weights 0 and 2 of a step's four, then 1 and 3 (0 and 1 if `width` is 2).
        pair_bits: for each plane; empty if what pairs have are the weights themselves.
        zero: what counts as 0 in pairs.
    """

    name: str
    load: Any
    codes: Any
    load_scales: Any = None
    scales: Any = None
    planes: int = 1
    steps: int = 8
    width: int = 4
    interleave: int = 1
    num_scales: int = 1
    has_offset: bool = False
    items_per_tile: int = 1
    tile_units: int = 0
    grid: Callable[[], torch.Tensor] | None = None
    bits: tuple[int, ...] = ()
    few: DeviceFormat | None = None
    pairs: Any = None
    pair_bits: tuple[int, ...] = ()
    zero: int = 0

    def __repr__(self) -> str:
        return f"format_{self.name}"

    @property
    def cache_key(self) -> str:
        """What Triton's cache of compiled kernels has to distinguish: the functions' sources and all numbers."""
        all_functions = (self.load, self.codes, self.load_scales, self.scales, self.pairs)
        functions = [None if f is None else f.cache_key for f in all_functions]
        others = ("load", "codes", "load_scales", "scales", "pairs", "grid", "few")
        numbers = [getattr(self, f.name) for f in fields(self) if f.name not in others]
        return f"{functions}{numbers}{None if self.few is None else self.few.cache_key}"

    @property
    def lanes(self) -> DeviceFormat:
        """The form in which few tokens are multiplied."""
        return self if self.few is None else self.few

    @property
    def num_sums(self) -> int:
        """Sums of activations that go with an item."""
        return self.num_scales if self.has_offset else 0

    @property
    def order(self) -> tuple[int, ...]:
        """What decides in which order activations are read."""
        return self.planes, self.steps, self.width, self.interleave, self.num_sums

    @property
    def has_thirds(self) -> bool:
        """Whether a few tokens are multiplied by tensor cores: bfloat16 holds all codes, and enough share a scale."""
        weights = self.steps * self.width
        return self.width > 1 and self.steps % 4 == 0 and weights in (16, 32) and self.num_scales <= self.planes

    @property
    def third_sums(self) -> int:
        """Sums of activations that go with an item there."""
        return self.num_scales if self.has_offset or self.zero else 0

    @property
    def thirds_order(self) -> tuple[int, ...]:
        """What decides in which order activations are read there."""
        return self.planes, self.steps, self.width, self.interleave, self.third_sums

    @property
    def orders(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Both: of one token or two, and of a few."""
        return self.order, self.thirds_order if self.has_thirds else ()

    @property
    def chunk_planes(self) -> int:
        """Planes of a chunk: 8 weights of an item that tensor cores multiply together with those of 15 more."""
        return min(self.planes, max(1, 8 // self.width))

    @property
    def chunk_steps(self) -> int:
        """Steps of a chunk."""
        return 8 // (self.width * self.chunk_planes)

    @property
    def item(self) -> int:
        """Weights of an item."""
        return self.planes * self.steps * self.width

    def num_items(self, cols: int) -> int:
        """Items of a row of `cols` weights."""
        return -(-cols // self.item)

    def panel_units(self, cols: int) -> int:
        """Bytes of a panel of `cols` columns / 16, which is the bytes of a row."""
        return (
            self.num_items(cols) // self.items_per_tile * self.tile_units
            if self.items_per_tile
            else (cols * self.tile_units)
        )
