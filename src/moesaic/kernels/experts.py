"""The routed experts of a layer as the extension takes them. It knows shapes and addresses, no model."""

from __future__ import annotations

from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Literal, get_args

import torch

from moesaic import _native
from moesaic.errors import KernelError
from moesaic.kernels._checks import describe
from moesaic.kernels.packed import PackedTensor
from moesaic.kernels.sliced import SlicedTensor

__all__ = ["Activation", "ActivationName", "PackedExperts"]

ActivationName = Literal["silu", "gelu", "gelu_tanh", "relu", "relu2", "swiglu_oai"]

_ACTIVATION_KINDS = MappingProxyType(
    {name: getattr(_native.ActivationKind, name).value for name in get_args(ActivationName)}
)

_Matrices = tuple[int, int, int, int, int]
"""What the extension has to know of a projection's slice: format, address, bytes per expert, address of the bias and
floats from expert to expert there."""


@dataclass(frozen=True, slots=True)
class Activation:
    """What experts do between up and down: `f(gate) * up`, or `f(up)` without a gate.

    Attributes:
        name: silu, gelu (with erf), gelu_tanh, relu, relu2 (its square), or swiglu_oai: gpt-oss's
            `min(gate, limit) * sigmoid(alpha * gate) * (clamp(up, -limit, limit) + 1)`.
        alpha: of swiglu_oai.
        limit: of swiglu_oai.
    """

    name: ActivationName
    alpha: float = 1.702
    limit: float = 7.0

    @property
    def kind(self) -> int:
        """The number that the extension knows it by.

        Raises:
            KernelError: there is no such activation.
        """
        if self.name not in _ACTIVATION_KINDS:
            raise KernelError(f"The activation '{self.name}' is none of {', '.join(_ACTIVATION_KINDS)}.")
        return int(_ACTIVATION_KINDS[self.name])


@dataclass(frozen=True, slots=True, eq=False)
class PackedExperts:
    """The routed experts of one layer; each projection may have a format of its own.

    Attributes:
        gate: `[num_experts][intermediate, hidden]`, or None for ungated experts.
        up: like gate.
        down: `[num_experts][hidden, intermediate]`; its columns are cut where the rows of gate and up are.
        gate_bias, up_bias, down_bias: float32 `[num_experts, rows of the projection]`, or None.
        activation: between up and down.
    """

    gate: PackedTensor | SlicedTensor | None
    up: PackedTensor | SlicedTensor
    down: PackedTensor | SlicedTensor
    gate_bias: torch.Tensor | None = None
    up_bias: torch.Tensor | None = None
    down_bias: torch.Tensor | None = None
    activation: Activation = Activation("silu")
    handle: _native.Experts = field(init=False, repr=False)

    def __post_init__(self) -> None:
        if self.gate is None and self.activation.name == "swiglu_oai":
            raise KernelError("The activation swiglu_oai needs a gate projection.")
        handle = _native.Experts(
            self.num_experts,
            self.hidden,
            self._slices(),
            self.activation.kind,
            self.activation.alpha,
            self.activation.limit,
        )
        object.__setattr__(self, "handle", handle)

    @property
    def num_experts(self) -> int:
        """How many experts."""
        return self.up.num_matrices

    @property
    def hidden(self) -> int:
        """Width of the layer's input and output."""
        return self.up.cols

    @property
    def intermediate(self) -> int:
        """Width between up and down."""
        return self.up.rows

    def _slices(self) -> list[tuple[int, list[_Matrices]]]:
        """Intermediate rows and projections of each slice."""
        named = (
            ("gate", self.gate, self.gate_bias, (self.intermediate, self.hidden)),
            ("up", self.up, self.up_bias, (self.intermediate, self.hidden)),
            ("down", self.down, self.down_bias, (self.hidden, self.intermediate)),
        )
        for name, part, bias, shape in named:
            self._check_part(name, part, bias, shape)
        slices, first = [], 0
        for i, down in enumerate(self.down.slices):
            gate = None if self.gate is None else _describe_rows(self.gate.slices[i], self.gate_bias, first)
            # The output's bias is added once.
            outer = _describe_rows(down, self.down_bias if i == 0 else None, 0)
            rows = _describe_rows(self.up.slices[i], self.up_bias, first)
            slices.append((down.cols, [gate or (0, 0, 0, 0, 0), rows, outer]))
            first += down.cols
        return slices

    def _check_part(
        self, name: str, part: PackedTensor | SlicedTensor | None, bias: torch.Tensor | None, shape: tuple[int, int]
    ) -> None:
        if part is None:
            if bias is not None:
                raise KernelError(f"Experts have {name}_bias but no {name}.")
            return
        if (part.num_matrices, part.rows, part.cols) != (self.num_experts, *shape):
            raise KernelError(
                f"The experts' {name} is {part.num_matrices} matrices of {part.rows} x {part.cols}: expected "
                f"{self.num_experts} of {shape[0]} x {shape[1]}, to go with up."
            )
        cut = [tensor.cols if name == "down" else tensor.rows for tensor in part.slices]
        if cut != [tensor.rows for tensor in self.up.slices]:
            raise KernelError(f"The experts' {name} is cut into {cut}: expected the rows of up's slices.")
        if bias is not None and (
            bias.dtype != torch.float32 or bias.shape != (self.num_experts, shape[0]) or not bias.is_contiguous()
        ):
            raise KernelError(
                f"The experts' {name}_bias is {describe(bias)}: expected float32 [{self.num_experts}, {shape[0]}], "
                "contiguous."
            )


def _describe_rows(part: PackedTensor, bias: torch.Tensor | None, first: int) -> _Matrices:
    """A slice whose rows begin at row `first` of the bias."""
    address, stride = (0, 0) if bias is None else (bias.data_ptr() + first * bias.element_size(), bias.shape[1])
    return (part.format.ggml_type, part.address(), part.matrix_bytes, address, stride)
