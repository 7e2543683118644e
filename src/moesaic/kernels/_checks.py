"""Checks that the native kernels rely on: they get addresses and believe them."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from moesaic.errors import KernelError

__all__ = ["check_float", "check_shape", "choice", "float_rows", "vector_address"]


def describe(x: torch.Tensor) -> str:
    """What a tensor is, for a message."""
    return f"{str(x.dtype).removeprefix('torch.')} {list(x.shape)} with strides {list(x.stride())} on {x.device}"


def check_float(name: str, x: torch.Tensor, ndim: int) -> None:
    """Require a float32 tensor of `ndim` dimensions on the CPU whose last dimension is contiguous."""
    if x.dtype != torch.float32 or x.ndim != ndim or not x.is_cpu or (x.stride(-1) != 1 and x.shape[-1] > 1):
        raise KernelError(
            f"{name} is {describe(x)}: expected float32 of {ndim} dimensions on the CPU, contiguous in the last one."
        )


def check_shape(name: str, x: torch.Tensor, expected: tuple[int, ...]) -> None:
    """Require a shape."""
    if x.shape != expected:
        raise KernelError(f"{name} has shape {list(x.shape)}: expected {list(expected)}.")


def vector_address(name: str, x: torch.Tensor | None, size: int, dtype: torch.dtype = torch.float32) -> int:
    """Address of a contiguous vector of `size` numbers; 0 for None."""
    if x is None:
        return 0
    if x.dtype != dtype or x.numel() != size or not x.is_cpu or not x.is_contiguous():
        expected = f"{str(dtype).removeprefix('torch.')} [{size}]"
        raise KernelError(f"{name} is {describe(x)}: expected {expected}, contiguous, on the CPU.")
    return x.data_ptr()


def float_rows(name: str, x: torch.Tensor) -> tuple[int, int]:
    """Number of rows and stride between them, of a float32 tensor `[..., width]` whose rows are evenly spaced."""
    if x.dtype == torch.float32 and x.is_cpu and x.ndim > 0:
        if x.is_contiguous():
            width = x.shape[-1]
            return (x.numel() // width if width else 0), width
        if x.ndim == 2 and (x.stride(1) == 1 or x.shape[1] == 1):
            return x.shape[0], x.stride(0)
    raise KernelError(f"{name} is {describe(x)}: expected float32 [..., width] on the CPU, contiguous (or 2-D rows).")


def choice(name: str, value: str, choices: Mapping[str, int]) -> int:
    """The number that the extension knows a named choice by."""
    number = choices.get(value)
    if number is None:
        raise KernelError(f"{name} is '{value}': expected one of {', '.join(choices)}.")
    return number
