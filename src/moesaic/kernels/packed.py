"""Weights in the packed layout, and the memory that holds them. It knows neither files nor models."""

from __future__ import annotations

import contextlib
import mmap
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Literal, get_args

import numpy as np
import torch

from moesaic import _native
from moesaic.errors import KernelError
from moesaic.kernels._checks import describe
from moesaic.quant import WeightFormat

__all__ = ["Activation", "PackedExperts", "PackedTensor"]

ActivationName = Literal["silu", "gelu", "gelu_tanh", "relu", "relu2", "swiglu_oai"]

_ALIGNMENT = 64  # a cache line: no matrix shares one with another
_HUGE_PAGE = 2 << 20
_ACTIVATION_KINDS = MappingProxyType(
    {name: getattr(_native.ActivationKind, name).value for name in get_args(ActivationName)}
)


def _allocate(nbytes: int) -> torch.Tensor:
    """Uint8 [nbytes], aligned to cache lines; on huge pages where the system grants them: decode touches every page."""
    if nbytes < _HUGE_PAGE or not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.empty(nbytes, dtype=torch.uint8)
    try:
        memory = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except OSError as error:
        raise KernelError(f"{nbytes / 2**30:.2f} GiB for packed weights cannot be allocated: {error}.") from error
    with contextlib.suppress(OSError):  # a system without huge pages is only slower
        memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=torch.uint8)


@dataclass(frozen=True, slots=True, eq=False)
class PackedTensor:
    """A stack of equal matrices `[rows, cols]`, each packed on its own (docs/architecture.md, "Packed layout").

    Attributes:
        format: the format whose bits and values the matrices keep.
        num_matrices: how many, e.g. one per expert.
        rows: output features of one matrix.
        cols: input features, a multiple of the format's block size.
        data: uint8 `[num_matrices * matrix_bytes]` on the CPU, aligned to 64 bytes.
        matrix_bytes: bytes from one matrix to the next.
    """

    format: WeightFormat
    num_matrices: int
    rows: int
    cols: int
    data: torch.Tensor
    matrix_bytes: int = field(init=False)

    def __post_init__(self) -> None:
        if self.num_matrices < 1 or self.rows < 1 or self.cols < 1:
            raise KernelError(
                f"A packed tensor of {self.num_matrices} matrices of {self.rows} x {self.cols}: expected at least 1."
            )
        self.format.row_bytes(self.cols)  # refuses a bad number of columns
        object.__setattr__(self, "matrix_bytes", self._matrix_bytes(self.format, self.rows, self.cols))
        expected = self.num_matrices * self.matrix_bytes
        if (
            self.data.dtype != torch.uint8
            or self.data.shape != (expected,)
            or not self.data.is_contiguous()
            or self.data.device.type != "cpu"
            or self.data.data_ptr() % _ALIGNMENT
        ):
            raise KernelError(
                f"The data of a packed tensor is {describe(self.data)}: expected uint8 [{expected}] on the CPU, "
                f"contiguous and aligned to {_ALIGNMENT} bytes."
            )

    @staticmethod
    def _matrix_bytes(fmt: WeightFormat, rows: int, cols: int) -> int:
        nbytes = int(_native.packed_nbytes(fmt.ggml_type, rows, cols))
        return (nbytes + _ALIGNMENT - 1) // _ALIGNMENT * _ALIGNMENT

    @staticmethod
    def empty(fmt: WeightFormat, rows: int, cols: int, num_matrices: int = 1) -> PackedTensor:
        """Memory for a stack of matrices, whose weights are undefined until `pack_`.

        Raises:
            UnsupportedFormatError: `cols` is not a multiple of the format's block size.
            KernelError: a size is below 1, or there is no memory.
        """
        if num_matrices < 1 or rows < 1 or cols < 1:
            raise KernelError(
                f"A packed tensor of {num_matrices} matrices of {rows} x {cols}: expected at least 1 of each."
            )
        fmt.row_bytes(cols)
        return PackedTensor(
            fmt, num_matrices, rows, cols, _allocate(num_matrices * PackedTensor._matrix_bytes(fmt, rows, cols))
        )

    @property
    def nbytes(self) -> int:
        """Bytes of memory held."""
        return self.data.numel()

    def address(self, index: int = 0) -> int:
        """Address of one matrix.

        Raises:
            KernelError: there is no such matrix.
        """
        if not 0 <= index < self.num_matrices:
            raise KernelError(f"Matrix {index} of a packed tensor with {self.num_matrices}.")
        return self.data.data_ptr() + index * self.matrix_bytes

    def pack_(self, index: int, raw: np.ndarray) -> None:
        """Store one matrix; safe to call from several threads for different matrices.

        Args:
            index: which matrix.
            raw: uint8 `[rows, row_bytes]`, the blocks as a GGUF file holds them; rows may be any distance apart.

        Raises:
            KernelError: there is no such matrix, or `raw` has another shape or type.
        """
        expected = (self.rows, self.format.row_bytes(self.cols))
        if raw.dtype != np.uint8 or raw.shape != expected or (expected[1] > 1 and raw.strides[1] != 1):
            raise KernelError(
                f"Rows to pack are {raw.dtype} {list(raw.shape)} with strides {list(raw.strides)}: expected uint8 "
                f"{list(expected)}, contiguous along a row ({self.format.name}, {self.rows} x {self.cols})."
            )
        _native.pack(self.format.ggml_type, self.rows, self.cols, raw.ctypes.data, raw.strides[0], self.address(index))

    def unpack(self, index: int = 0) -> np.ndarray:
        """One matrix as it was given to `pack_`, bit by bit: uint8 `[rows, row_bytes]`."""
        raw = np.empty((self.rows, self.format.row_bytes(self.cols)), np.uint8)
        _native.unpack(self.format.ggml_type, self.rows, self.cols, self.address(index), raw.ctypes.data)
        return raw

    def dequantize(self) -> torch.Tensor:
        """All weights as float32 `[num_matrices, rows, cols]`, the same values as `moesaic.quant.dequantize`."""
        values = torch.empty(self.num_matrices, self.rows, self.cols)
        for index in range(self.num_matrices):
            raw = self.unpack(index)
            out = values[index]
            _native.dequantize(self.format.ggml_type, self.rows, self.cols, raw.ctypes.data, out.data_ptr())
        return values


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
        down: `[num_experts][hidden, intermediate]`.
        gate_bias, up_bias, down_bias: float32 `[num_experts, rows of the projection]`, or None.
        activation: between up and down.
    """

    gate: PackedTensor | None
    up: PackedTensor
    down: PackedTensor
    gate_bias: torch.Tensor | None = None
    up_bias: torch.Tensor | None = None
    down_bias: torch.Tensor | None = None
    activation: Activation = Activation("silu")
    handle: _native.Experts = field(init=False, repr=False)

    def __post_init__(self) -> None:
        parts = [
            self._describe_part("gate", self.gate, self.gate_bias, transposed=False),
            self._describe_part("up", self.up, self.up_bias, transposed=False),
            self._describe_part("down", self.down, self.down_bias, transposed=True),
        ]
        if self.gate is None and self.activation.name == "swiglu_oai":
            raise KernelError("The activation swiglu_oai needs a gate projection.")
        handle = _native.Experts(
            self.num_experts,
            self.hidden,
            self.intermediate,
            parts,
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

    def _describe_part(
        self, name: str, part: PackedTensor | None, bias: torch.Tensor | None, transposed: bool
    ) -> tuple[int, int, int, int]:
        """What the extension has to know of one projection: format, address, bytes per expert, address of the bias."""
        if part is None:
            if bias is not None:
                raise KernelError(f"Experts have {name}_bias but no {name}.")
            return (0, 0, 0, 0)
        shape = (self.hidden, self.intermediate) if transposed else (self.intermediate, self.hidden)
        if (part.num_matrices, part.rows, part.cols) != (self.num_experts, *shape):
            raise KernelError(
                f"The experts' {name} is {part.num_matrices} matrices of {part.rows} x {part.cols}: expected "
                f"{self.num_experts} of {shape[0]} x {shape[1]}, to go with up."
            )
        if bias is None:
            return (part.format.ggml_type, part.address(), part.matrix_bytes, 0)
        if bias.dtype != torch.float32 or bias.shape != (self.num_experts, shape[0]) or not bias.is_contiguous():
            raise KernelError(
                f"The experts' {name}_bias is {describe(bias)}: expected float32 [{self.num_experts}, {shape[0]}], "
                "contiguous."
            )
        return (part.format.ggml_type, part.address(), part.matrix_bytes, bias.data_ptr())
