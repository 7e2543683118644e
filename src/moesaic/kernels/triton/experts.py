"""Routed experts that lie in slots of an arena on a GPU: where their matrices are, and products with a few tokens.

Each projection has its own place and its own distance from slot to slot: a slot may be a piece of memory with an
expert's packed matrices, or all gates may lie one after the other, then all ups and all downs. This module knows
neither which experts have slots nor where their bytes come from; `grouped_experts` is for many tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton

from moesaic.errors import KernelError
from moesaic.kernels._checks import describe
from moesaic.kernels.experts import Activation
from moesaic.kernels.triton.activations import lanes_size, to_lanes
from moesaic.kernels.triton.expert_kernels import decode_down_kernel, decode_up_kernel
from moesaic.kernels.triton.formats import DeviceFormat, device_format
from moesaic.kernels.triton.linear import MAX_DECODE_TOKENS, check_rows, program_warps, warps_at_a_time
from moesaic.kernels.triton.views import WeightViews, constants_on, grid_of, views_of
from moesaic.quant import WeightFormat

__all__ = [
    "MAX_DECODE_TOKENS",
    "MAX_PAIRS",
    "ExpertLayout",
    "MatrixLayout",
    "bias_of",
    "check_arena",
    "check_choices",
    "experts_decode",
    "same_order",
    "takes_pairs",
    "units_of",
]

MAX_PAIRS = 2048
"""Pairs of a token and an expert that `experts_decode` takes."""

_PAIRS_PER_EXPERT = 4  # on average; a matrix that is taken apart for tiles takes the time of about 7 products with it

_ALIGNMENT = 16


@dataclass(frozen=True, slots=True, eq=False)
class MatrixLayout:
    """One projection of the experts in an arena.

    Attributes:
        format: of the packed matrix.
        offset: bytes from the beginning of the arena to the matrix of slot 0, a multiple of 16.
        stride: bytes from slot to slot, a multiple of 16.
        rows, cols: of the matrix.
        bias: float32 `[num_experts, rows]` on the device, or None.

    Raises:
        KernelError: it cannot lie so.
    """

    format: WeightFormat
    offset: int
    stride: int
    rows: int
    cols: int
    bias: torch.Tensor | None = None

    def __post_init__(self) -> None:
        self.format.row_bytes(self.cols)
        if self.offset < 0 or self.offset % _ALIGNMENT:
            raise KernelError(f"A matrix at byte {self.offset} of an arena: expected a multiple of {_ALIGNMENT}.")
        if self.stride < self.nbytes or self.stride % _ALIGNMENT:
            raise KernelError(
                f"Matrices {self.stride} bytes apart: expected a multiple of {_ALIGNMENT} and room for {self.nbytes}."
            )
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
    def nbytes(self) -> int:
        """Bytes of the matrix."""
        return -(-self.rows // 16) * 16 * self.format.row_bytes(self.cols)


@dataclass(frozen=True, slots=True, eq=False)
class ExpertLayout:
    """Where the matrices of a layer's experts are in an arena.

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

    def arena_bytes(self, num_slots: int) -> int:
        """Bytes of an arena that has so many slots."""
        parts = [part for part in (self.gate, self.up, self.down) if part is not None]
        return max(part.offset + (num_slots - 1) * part.stride + part.nbytes for part in parts)


def check_choices(
    x: torch.Tensor, device: torch.device, width: int, choices: dict[str, tuple[torch.Tensor, tuple[torch.dtype, ...]]]
) -> None:
    """Check activations and what was chosen for them.

    Args:
        x: expected to be float32 `[tokens, width]`.
        device: where all of it should be.
        width: of x.
        choices: tensors by name, expected to be `[tokens, top_k]`, with the types that they may have.

    Raises:
        KernelError: something is not as expected.
    """
    check_rows("x", x, width, device)
    top_k = next(iter(choices.values()))[0].shape[-1]
    for name, (tensor, types) in choices.items():
        if (
            tensor.dtype not in types
            or tensor.ndim != 2
            or tensor.shape != (x.shape[0], top_k)
            or tensor.device != device
            or not tensor.is_contiguous()
        ):
            kinds = " or ".join(str(kind).removeprefix("torch.") for kind in types)
            raise KernelError(
                f"{name} is {describe(tensor)}: expected {kinds} [{x.shape[0]}, top_k] on {device}, contiguous."
            )


def check_arena(arena: torch.Tensor, layout: ExpertLayout, num_slots: int) -> None:
    """Check that an arena has so many slots.

    Raises:
        KernelError: it has not, or is no memory that kernels can read.
    """
    if arena.dtype != torch.uint8 or arena.ndim != 1 or not arena.is_contiguous() or arena.shape[0] % 4:
        raise KernelError(f"The arena is {describe(arena)}: expected uint8 [n], contiguous, n a multiple of 4.")
    if num_slots < 1 or layout.arena_bytes(num_slots) > arena.shape[0]:
        raise KernelError(
            f"{num_slots} slots take {layout.arena_bytes(max(num_slots, 1))} bytes: the arena has {arena.shape[0]}."
        )


def units_of(part: MatrixLayout, form: DeviceFormat) -> tuple[int, int, int, int]:
    """In 16 bytes: where a projection begins, from slot to slot, what a panel takes; and items of a row."""
    return (
        part.offset // _ALIGNMENT,
        part.stride // _ALIGNMENT,
        form.panel_units(part.cols),
        form.num_items(part.cols),
    )


def same_order(a: DeviceFormat, b: DeviceFormat) -> bool:
    """Whether both read activations in the same order."""
    return a.order == b.order


def bias_of(part: MatrixLayout | None, otherwise: torch.Tensor) -> tuple[torch.Tensor, bool]:
    """A projection's bias, or `otherwise`, and whether it has one."""
    if part is None or part.bias is None:
        return otherwise, False
    return part.bias, True


def takes_pairs(num_tokens: int, top_k: int, num_experts: int) -> bool:
    """Whether pairs of a token and an expert one by one (`experts_decode`) are quicker than sorted (`ExpertPairs`)."""
    pairs = num_tokens * top_k
    return pairs <= MAX_PAIRS and (num_tokens <= MAX_DECODE_TOKENS or pairs <= _PAIRS_PER_EXPERT * num_experts)


def experts_decode(
    x: torch.Tensor,
    slots: torch.Tensor,
    experts: torch.Tensor,
    weights: torch.Tensor,
    arena: torch.Tensor,
    layout: ExpertLayout,
    out: torch.Tensor | None = None,
    accumulate: bool = False,
) -> torch.Tensor:
    """Weighted sum of each token's experts that have slots; made for few tokens of an expert, float32 throughout.

    Nothing waits for the device, so that a graph can capture it; results do not depend on timing.

    Args:
        x: float32 `[tokens, hidden]`, tokens * top_k <= MAX_PAIRS; rows may be any distance apart.
        slots: int32 `[tokens, top_k]`, the slot of each chosen expert, -1: leave it out.
        experts: int32 or int64 `[tokens, top_k]`, their numbers, which only biases need.
        weights: float32 `[tokens, top_k]`.
        arena: uint8 `[n]`, the slots, aligned to 64 bytes.
        layout: where slots are.
        out: float32 `[tokens, hidden]`, overwritten.
        accumulate: add to `out` instead.

    Returns:
        float32 `[tokens, hidden]`, zeros (or what `out` was) for a token none of whose experts has a slot.

    Raises:
        KernelError: a tensor is not as described.
    """
    integers = (torch.int32, torch.int64)
    choices = {
        "slots": (slots, (torch.int32,)),
        "experts": (experts, integers),
        "weights": (weights, (torch.float32,)),
    }
    check_choices(x, arena.device, layout.hidden, choices)
    check_arena(arena, layout, 1)
    num_tokens, top_k = slots.shape
    if num_tokens * top_k > MAX_PAIRS:
        raise KernelError(
            f"{num_tokens} tokens of {top_k} experts: experts_decode takes up to {MAX_PAIRS} pairs; use ExpertPairs."
        )
    if out is None:
        make = torch.zeros if accumulate else torch.empty
        out = make(num_tokens, layout.hidden, dtype=torch.float32, device=x.device)
    if num_tokens == 0:
        return out
    views = views_of(arena)
    inner = _decode_up(x, slots, experts, views, layout)
    down, form = layout.down, layout.down.form.lanes
    offset, stride, panel, items = units_of(down, form)
    num_panels = -(-layout.hidden // 16)
    warps = program_warps(num_tokens * num_panels, top_k * items, min(warps_at_a_time(form, 1), 12))
    bias, has_bias = bias_of(down, inner)
    decode_down_kernel[(num_panels, num_tokens)](
        inner, inner.stride(0), slots, experts, weights, views.words, views.halves, grid_of(form, views),
        constants_on(arena.device), bias, out, out.stride(0), offset, stride, panel, items, down.rows, down.cols, top_k,
        triton.next_power_of_2(top_k), form, has_bias, accumulate, 8 * warps, num_warps=warps,
    )  # fmt: skip
    return out


def _decode_up(
    x: torch.Tensor,
    slots: torch.Tensor,
    experts: torch.Tensor,
    views: WeightViews,
    layout: ExpertLayout,
) -> torch.Tensor:
    """The activated inner values of each pair, as `lanes` of down's format: float32 `[tokens * top_k, n]`."""
    num_tokens, top_k = slots.shape
    gate, up = layout.gate or layout.up, layout.up
    gate_form, up_form = gate.form.lanes, up.form.lanes
    up_lanes = to_lanes(x, up_form).values
    gate_lanes = up_lanes if same_order(gate_form, up_form) else to_lanes(x, gate_form).values
    size = lanes_size(layout.down.form, layout.intermediate)
    inner = torch.empty(num_tokens * top_k, size, dtype=torch.float32, device=x.device)
    gate_offset, gate_stride, gate_panel, gate_items = units_of(gate, gate_form)
    up_offset, up_stride, up_panel, up_items = units_of(up, up_form)
    num_panels = -(-layout.intermediate // 16)
    at_a_time = min(warps_at_a_time(gate_form, 1), warps_at_a_time(up_form, 1))
    warps = program_warps(num_tokens * top_k * num_panels, 2 * min(gate_items, up_items), at_a_time)
    gate_bias, has_gate_bias = bias_of(layout.gate, inner)
    up_bias, has_up_bias = bias_of(up, inner)
    decode_up_kernel[(num_panels, num_tokens * top_k)](
        gate_lanes, up_lanes, gate_lanes.stride(0), up_lanes.stride(0), slots, experts, views.words, views.halves,
        grid_of(gate_form, views), grid_of(up_form, views), constants_on(x.device), gate_bias, up_bias, inner, size,
        gate_offset, up_offset, gate_stride, up_stride, gate_panel, up_panel, gate_items, up_items, up.rows, up.cols,
        layout.activation.alpha, layout.activation.limit, top_k, None if layout.gate is None else gate_form, up_form,
        layout.down.form, layout.activation.name, has_gate_bias, has_up_bias, 8 * warps, num_warps=warps,
    )  # fmt: skip
    return inner
