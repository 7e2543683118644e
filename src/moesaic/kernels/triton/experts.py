"""Routed experts that lie in slots of an arena on a GPU: where their matrices are, and what products check.

Each projection has its own place and its own distance from slot to slot: a slot may be a piece of memory with an
expert's packed matrices, or all gates may lie one after the other, then all ups and all downs. This module knows
neither which experts have slots nor where their bytes come from; products are in `few_experts` and `grouped_experts`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from moesaic.errors import KernelError
from moesaic.kernels._checks import describe
from moesaic.kernels.experts import Activation
from moesaic.kernels.triton.formats import DeviceFormat, device_format
from moesaic.kernels.triton.linear import check_rows
from moesaic.quant import WeightFormat

__all__ = [
    "ExpertLayout",
    "MatrixLayout",
    "bias_of",
    "check_arena",
    "check_choices",
    "same_order",
    "units_of",
]

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
