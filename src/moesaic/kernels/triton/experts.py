"""Routed experts that lie in slots of an arena on a GPU: a few tokens of a decode step, or many of a chunk.

A slot is a number of bytes that has an expert's gate, up and down somewhere in it, each as a packed matrix. This module
knows neither which experts have slots nor where their bytes come from.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton

from moesaic.errors import KernelError
from moesaic.kernels._checks import describe
from moesaic.kernels.experts import Activation
from moesaic.kernels.triton.activations import lanes_size, operands_shape, to_lanes, to_operands
from moesaic.kernels.triton.expert_kernels import (
    decode_down_kernel,
    decode_up_kernel,
    grouped_down_kernel,
    grouped_sum_kernel,
    grouped_up_kernel,
)
from moesaic.kernels.triton.formats import DeviceFormat, device_format
from moesaic.kernels.triton.formats.common import MAGIC
from moesaic.kernels.triton.linear import (
    MAX_DECODE_TOKENS,
    check_rows,
    operand_dtype,
    precision_of,
    tile_shape,
    tile_tokens,
)
from moesaic.kernels.triton.views import WeightViews, grid_of, views_of
from moesaic.quant import WeightFormat

__all__ = ["MAX_DECODE_TOKENS", "ExpertLayout", "MatrixLayout", "experts_decode", "experts_grouped"]

_ENOUGH_WARPS = 4096
_ALIGNMENT = 16


@dataclass(frozen=True, slots=True, eq=False)
class MatrixLayout:
    """One projection of an expert in its slot.

    Attributes:
        format: of the packed matrix.
        offset: bytes from the beginning of the slot, a multiple of 16.
        rows, cols: of the matrix.
        bias: float32 `[num_experts, rows]` on the device, or None.
    """

    format: WeightFormat
    offset: int
    rows: int
    cols: int
    bias: torch.Tensor | None = None

    def __post_init__(self) -> None:
        self.format.row_bytes(self.cols)
        if self.offset < 0 or self.offset % _ALIGNMENT:
            raise KernelError(f"A matrix at byte {self.offset} of a slot: expected a multiple of {_ALIGNMENT}.")
        bias = self.bias
        if bias is not None and (
            bias.dtype != torch.float32 or bias.ndim != 2 or bias.shape[1] != self.rows or not bias.is_contiguous()
        ):
            raise KernelError(f"The bias of experts is {describe(bias)}: expected float32 [experts, {self.rows}].")

    @property
    def form(self) -> DeviceFormat:
        """How kernels read it; UnsupportedFormatError if none does."""
        return device_format(self.format, self.cols)

    @property
    def end(self) -> int:
        """Bytes from the beginning of the slot to behind the matrix."""
        return self.offset + -(-self.rows // 16) * 16 * self.format.row_bytes(self.cols)


@dataclass(frozen=True, slots=True, eq=False)
class ExpertLayout:
    """What the experts of a layer look like in their slots.

    Attributes:
        gate: `[intermediate, hidden]`, or None for ungated experts.
        up: like gate.
        down: `[hidden, intermediate]`.
        activation: between up and down.

    Raises:
        KernelError: the projections do not go together.
        UnsupportedFormatError: a format has no kernels on a GPU.
    """

    gate: MatrixLayout | None
    up: MatrixLayout
    down: MatrixLayout
    activation: Activation

    def __post_init__(self) -> None:
        _ = self.activation.kind  # refuses unknown names
        if self.gate is None and self.activation.name == "swiglu_oai":
            raise KernelError("The activation swiglu_oai needs a gate projection.")
        expected = {"gate": (self.intermediate, self.hidden), "down": (self.hidden, self.intermediate)}
        for name, part in (("gate", self.gate), ("up", self.up), ("down", self.down)):
            if part is None:
                continue
            _ = part.form
            shape = expected.get(name, (part.rows, part.cols))
            if (part.rows, part.cols) != shape:
                raise KernelError(
                    f"The experts' {name} is {part.rows} x {part.cols}: expected {shape[0]} x {shape[1]}, as up is."
                )

    @property
    def hidden(self) -> int:
        """Width of input and output."""
        return self.up.cols

    @property
    def intermediate(self) -> int:
        """Width between up and down."""
        return self.up.rows

    @property
    def nbytes(self) -> int:
        """Bytes of a slot that are used."""
        return max(part.end for part in (self.gate, self.up, self.down) if part is not None)


def _check_call(
    x: torch.Tensor,
    slots: torch.Tensor,
    experts: torch.Tensor,
    weights: torch.Tensor,
    arena: torch.Tensor,
    slot_bytes: int,
    layout: ExpertLayout,
) -> None:
    check_rows("x", x, layout.hidden, arena.device)
    integers = (torch.int32, torch.int64)
    for name, tensor, types in (
        ("slots", slots, (torch.int32,)),
        ("experts", experts, integers),
        ("weights", weights, (torch.float32,)),
    ):
        if (
            tensor.dtype not in types
            or tensor.ndim != 2
            or tensor.shape != (x.shape[0], slots.shape[-1])
            or tensor.device != arena.device
            or not tensor.is_contiguous()
        ):
            kinds = " or ".join(str(kind).removeprefix("torch.") for kind in types)
            raise KernelError(
                f"{name} is {describe(tensor)}: expected {kinds} [{x.shape[0]}, top_k] on {arena.device}, contiguous."
            )
    if arena.dtype != torch.uint8 or arena.ndim != 1 or not arena.is_contiguous() or arena.shape[0] % 4:
        raise KernelError(f"The arena is {describe(arena)}: expected uint8 [n], contiguous, n a multiple of 4.")
    if slot_bytes < layout.nbytes or slot_bytes % _ALIGNMENT:
        raise KernelError(
            f"Slots of {slot_bytes} bytes: expected a multiple of {_ALIGNMENT} and room for {layout.nbytes}."
        )


def _units(part: MatrixLayout) -> tuple[int, int, int]:
    """Where a projection begins in its slot, what a panel takes, both in 16 bytes; items of a row."""
    form = part.form
    return part.offset // _ALIGNMENT, form.panel_units(part.cols), form.num_items(part.cols)


def _same_order(a: DeviceFormat, b: DeviceFormat) -> bool:
    """Whether both read activations in the same order."""
    return a.order == b.order


def _warps(programs: int, num_items: int) -> int:
    warps = 1
    while warps < 8 and 8 * warps < num_items and programs * warps < _ENOUGH_WARPS:
        warps *= 2
    return warps


def _bias(part: MatrixLayout | None, otherwise: torch.Tensor) -> tuple[torch.Tensor, bool]:
    if part is None or part.bias is None:
        return otherwise, False
    return part.bias, True


def experts_decode(
    x: torch.Tensor,
    slots: torch.Tensor,
    experts: torch.Tensor,
    weights: torch.Tensor,
    arena: torch.Tensor,
    slot_bytes: int,
    layout: ExpertLayout,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """Weighted sum of each token's experts that have slots; made for few tokens, float32 throughout.

    Nothing waits for the device, so that a graph can capture it; results do not depend on timing.

    Args:
        x: float32 `[tokens, hidden]`, tokens <= MAX_DECODE_TOKENS; rows may be any distance apart.
        slots: int32 `[tokens, top_k]`, the slot of each chosen expert, -1: leave it out.
        experts: int32 or int64 `[tokens, top_k]`, their numbers, which only biases need.
        weights: float32 `[tokens, top_k]`.
        arena: uint8 `[n]`, the slots, aligned to 64 bytes.
        slot_bytes: from one slot to the next.
        layout: what a slot has in it.
        out: float32 `[tokens, hidden]`, overwritten.

    Returns:
        float32 `[tokens, hidden]`, zeros for a token none of whose experts has a slot.

    Raises:
        KernelError: a tensor is not as described.
    """
    _check_call(x, slots, experts, weights, arena, slot_bytes, layout)
    num_tokens, top_k = slots.shape
    if num_tokens > MAX_DECODE_TOKENS:
        raise KernelError(f"{num_tokens} tokens: experts_decode takes up to {MAX_DECODE_TOKENS}; use experts_grouped.")
    if out is None:
        out = torch.empty(num_tokens, layout.hidden, dtype=torch.float32, device=x.device)
    if num_tokens == 0:
        return out
    views = views_of(arena)
    inner = _decode_up(x, slots, experts, views, slot_bytes, layout)
    down, form = layout.down, layout.down.form
    offset, panel, items = _units(down)
    num_panels = -(-layout.hidden // 16)
    warps = _warps(num_tokens * num_panels, top_k * items)
    bias, has_bias = _bias(down, inner)
    decode_down_kernel[(num_panels, num_tokens)](
        inner, inner.stride(0), slots, experts, weights, views.words, views.halves, views.bytes, grid_of(form, views),
        MAGIC, bias, out, out.stride(0), slot_bytes // _ALIGNMENT, offset, panel, items, down.rows, down.cols, top_k,
        triton.next_power_of_2(top_k), form, has_bias, 8 * warps, num_warps=warps,
    )  # fmt: skip
    return out


def _decode_up(
    x: torch.Tensor,
    slots: torch.Tensor,
    experts: torch.Tensor,
    views: WeightViews,
    slot_bytes: int,
    layout: ExpertLayout,
) -> torch.Tensor:
    """The activated inner values of each pair, as `lanes` of down's format: float32 `[tokens * top_k, n]`."""
    num_tokens, top_k = slots.shape
    gate, up = layout.gate or layout.up, layout.up
    up_lanes = to_lanes(x, up.form)
    gate_lanes = up_lanes if _same_order(gate.form, up.form) else to_lanes(x, gate.form)
    size = lanes_size(layout.down.form, layout.intermediate)
    inner = torch.empty(num_tokens * top_k, size, dtype=torch.float32, device=x.device)
    gate_offset, gate_panel, gate_items = _units(gate)
    up_offset, up_panel, up_items = _units(up)
    num_panels = -(-layout.intermediate // 16)
    warps = _warps(num_tokens * top_k * num_panels, min(gate_items, up_items))
    gate_bias, has_gate_bias = _bias(layout.gate, inner)
    up_bias, has_up_bias = _bias(up, inner)
    decode_up_kernel[(num_panels, num_tokens * top_k)](
        gate_lanes, up_lanes, gate_lanes.stride(0), up_lanes.stride(0), slots, experts, views.words, views.halves,
        views.bytes, grid_of(gate.form, views), grid_of(up.form, views), MAGIC, gate_bias, up_bias, inner, size,
        slot_bytes // _ALIGNMENT, gate_offset, up_offset, gate_panel, up_panel, gate_items, up_items, up.rows, up.cols,
        layout.activation.alpha, layout.activation.limit, top_k, None if layout.gate is None else gate.form, up.form,
        layout.down.form, layout.activation.name, has_gate_bias, has_up_bias, 8 * warps, num_warps=warps,
    )  # fmt: skip
    return inner


@dataclass(frozen=True, slots=True)
class _Groups:
    """Pairs of tokens and experts, sorted by slot.

    Attributes:
        order: int64 `[pairs]`, the pairs; those without a slot come last.
        starts: int32 `[num_slots + 1]`, where each slot's begin.
        first_blocks: int32 `[num_slots + 1]`, the first block of each slot, a block being up to `size` pairs of a slot.
        num_blocks: as many as there can be.
        size: pairs of a block.
    """

    order: torch.Tensor
    starts: torch.Tensor
    first_blocks: torch.Tensor
    num_blocks: int
    size: int

    @staticmethod
    def of(slots: torch.Tensor, num_slots: int, size: int) -> _Groups:
        flat = slots.view(-1)
        num_pairs = flat.shape[0]
        keys = torch.where(flat < 0, num_slots, flat)
        keys, order = torch.sort(keys, stable=True)
        numbers = torch.arange(num_slots + 1, dtype=keys.dtype, device=keys.device)
        starts = torch.searchsorted(keys, numbers, out_int32=True)
        blocks = (starts[1:] - starts[:-1] + (size - 1)) // size
        first_blocks = torch.zeros_like(starts)
        torch.cumsum(blocks, 0, dtype=torch.int32, out=first_blocks[1:])
        num_blocks = min(num_pairs, num_pairs // size + min(num_slots, num_pairs))
        return _Groups(order, starts, first_blocks, num_blocks, size)


def _pairs_of_a_block(num_pairs: int, num_slots: int, layout: ExpertLayout) -> int:
    parts = [part for part in (layout.gate, layout.up, layout.down) if part is not None]
    return min(tile_tokens(-(-num_pairs // num_slots), operand_dtype(part.form)) for part in parts)


def experts_grouped(
    x: torch.Tensor,
    slots: torch.Tensor,
    experts: torch.Tensor,
    weights: torch.Tensor,
    arena: torch.Tensor,
    slot_bytes: int,
    layout: ExpertLayout,
    num_slots: int,
    out: torch.Tensor | None = None,
    accumulate: bool = False,
) -> torch.Tensor:
    """The same for many tokens: pairs are sorted by slot, weights and activations multiplied as bfloat16.

    Args:
        x, slots, experts, weights, arena, slot_bytes, layout: as for `experts_decode`, any number of tokens.
        num_slots: slots are below that.
        out: float32 `[tokens, hidden]`.
        accumulate: add to `out` instead of overwriting it.

    Returns:
        float32 `[tokens, hidden]`.

    Raises:
        KernelError: a tensor is not as described.
    """
    _check_call(x, slots, experts, weights, arena, slot_bytes, layout)
    num_tokens, top_k = slots.shape
    if num_slots < 1 or num_slots * slot_bytes > arena.shape[0]:
        raise KernelError(f"{num_slots} slots of {slot_bytes} bytes: the arena has {arena.shape[0]} bytes.")
    if out is None:
        make: Any = torch.zeros if accumulate else torch.empty
        out = make(num_tokens, layout.hidden, dtype=torch.float32, device=x.device)
    if num_tokens == 0:
        return out
    views, groups = views_of(arena), _Groups.of(slots, num_slots, _pairs_of_a_block(slots.numel(), num_slots, layout))
    inner = _grouped_up(x, slots, experts, groups, views, slot_bytes, layout, num_slots)
    down, form, num_pairs = layout.down, layout.down.form, num_tokens * top_k
    num_rows, warps, stages = tile_shape(groups.size, form)
    offset, panel, items = _units(down)
    bias, has_bias = _bias(down, weights)
    pairs = torch.empty(num_pairs, layout.hidden, dtype=torch.float32, device=x.device)
    grouped_down_kernel[(triton.cdiv(layout.hidden, num_rows), groups.num_blocks)](
        inner, groups.order, groups.starts, groups.first_blocks, experts, weights, views.words, views.halves,
        views.bytes, grid_of(form, views), MAGIC, bias, pairs, num_pairs, num_slots, slot_bytes // _ALIGNMENT, offset,
        panel, items, down.rows, down.cols, form, has_bias, groups.size, num_rows, precision_of(inner.dtype),
        num_warps=warps, num_stages=stages,
    )  # fmt: skip
    grouped_sum_kernel[(triton.cdiv(layout.hidden, 512), num_tokens)](
        pairs, slots, out, out.stride(0), layout.hidden, top_k, accumulate
    )
    return out


def _grouped_up(
    x: torch.Tensor,
    slots: torch.Tensor,
    experts: torch.Tensor,
    groups: _Groups,
    views: WeightViews,
    slot_bytes: int,
    layout: ExpertLayout,
    num_slots: int,
) -> torch.Tensor:
    """The activated inner values of each pair in the order of the groups, as `operands` of down's format."""
    num_tokens, top_k = slots.shape
    gate, up, down = layout.gate or layout.up, layout.up, layout.down.form
    up_x = to_operands(x, up.form, operand_dtype(up.form))
    gate_x = up_x
    if not _same_order(gate.form, up.form) or operand_dtype(gate.form) != up_x.dtype:
        gate_x = to_operands(x, gate.form, operand_dtype(gate.form))
    num_pairs = num_tokens * top_k
    shape = operands_shape(down, num_pairs, layout.intermediate)
    is_full = shape[0] * shape[1] * shape[3] == layout.intermediate
    make: Any = torch.empty if is_full else torch.zeros  # columns behind the last are multiplied too
    inner: torch.Tensor = make(shape, dtype=operand_dtype(down), device=x.device)
    gate_offset, gate_panel, gate_items = _units(gate)
    up_offset, up_panel, up_items = _units(up)
    gate_bias, has_gate_bias = _bias(layout.gate, x)
    up_bias, has_up_bias = _bias(up, x)
    num_rows, warps, stages = tile_shape(groups.size, gate.form, up.form)
    grouped_up_kernel[(triton.cdiv(layout.intermediate, num_rows), groups.num_blocks)](
        gate_x, up_x, groups.order, groups.starts, groups.first_blocks, experts, views.words, views.halves, views.bytes,
        grid_of(gate.form, views), grid_of(up.form, views), MAGIC, gate_bias, up_bias, inner, num_tokens, num_pairs,
        num_slots, slot_bytes // _ALIGNMENT, gate_offset, up_offset, gate_panel, up_panel, gate_items, up_items,
        up.rows, up.cols, layout.activation.alpha, layout.activation.limit, top_k,
        None if layout.gate is None else gate.form, up.form, down, layout.activation.name, has_gate_bias, has_up_bias,
        groups.size, num_rows, precision_of(gate_x.dtype), precision_of(up_x.dtype),
        num_warps=warps, num_stages=stages,
    )  # fmt: skip
    return inner
