"""What shares of the keys left of attention, added up; see `merge_kernels`.

It knows no model: rows of heads, and formats only by the order in which they read activations.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import overload

import torch
import triton

from moesaic.errors import KernelError
from moesaic.kernels._checks import check_shape, describe
from moesaic.kernels.triton.activations import Lanes, goes_by_thirds, is_unpadded
from moesaic.kernels.triton.attention_tiles import MAX_SPLITS, padded
from moesaic.kernels.triton.formats import DeviceFormat
from moesaic.kernels.triton.linear import MAX_DECODE_TOKENS
from moesaic.kernels.triton.merge_kernels import merge_kernel

__all__ = ["Parts", "columns_together", "fits_lanes", "lanes_of_heads", "merge"]

_MANY_HEADS = 96  # of which 128 columns a warp are enough programs to be quick


@dataclass(frozen=True, slots=True, eq=False)
class Parts:
    """What shares of the keys left of softmax attention.

    Attributes:
        sums: float32 `[splits, tokens, heads, dim]`, contiguous: means of the values that a share saw.
        logs: float32 `[splits, tokens, heads]`, contiguous: base-2 logarithms of their weights, -inf of those that saw
            nothing, whose sums are undefined.
    """

    sums: torch.Tensor
    logs: torch.Tensor

    @classmethod
    def empty(cls, splits: int, num_tokens: int, heads: int, dim: int, device: torch.device) -> Parts:
        """To be written by a kernel."""
        sums = torch.empty(splits, num_tokens, heads, dim, device=device)
        return cls(sums, torch.empty(splits, num_tokens, heads, device=device))


def fits_lanes(form: DeviceFormat | None, num_tokens: int, heads: int, dim: int) -> bool:
    """Whether kernels that have a head's `dim` columns at a time can write them in the order of a format.

    Not of more tokens than products take in that order, not where rows are padded, nor where one of the sums that the
    order has is of two heads or of some steps of an item.
    """
    if form is None or not 0 < num_tokens <= MAX_DECODE_TOKENS:
        return False
    if goes_by_thirds(form, num_tokens, heads * dim):
        return dim % columns_together(form, True) == 0
    few = form.lanes
    together = columns_together(form, False)
    return is_unpadded(form, heads * dim) and (together == 1 or (few.num_sums <= few.planes and dim % together == 0))


def columns_together(form: DeviceFormat, thirds: bool) -> int:
    """Columns of which a kernel must have all to make the sums that the order has, lanes or thirds."""
    few, sums = (form, form.third_sums) if thirds else (form.lanes, form.lanes.num_sums)
    return few.interleave * few.item if sums else 1


def lanes_of_heads(form: DeviceFormat, num_tokens: int, heads: int, dim: int, device: torch.device) -> Lanes:
    """Memory for rows of heads in the order of a format.

    Raises:
        KernelError: they do not fit (`fits_lanes`).
    """
    if not fits_lanes(form, num_tokens, heads, dim):
        raise KernelError(
            f"{num_tokens} tokens of {heads} heads of {dim} numbers do not fit into the order of {form.name}."
        )
    return Lanes.empty(num_tokens, heads * dim, form, device)


@overload
def merge(parts: Parts, sinks: torch.Tensor | None = None, *, out: torch.Tensor | None = None) -> torch.Tensor: ...
@overload
def merge(parts: Parts, sinks: torch.Tensor | None = None, *, form: DeviceFormat) -> Lanes: ...
def merge(
    parts: Parts,
    sinks: torch.Tensor | None = None,
    *,
    form: DeviceFormat | None = None,
    out: torch.Tensor | None = None,
) -> torch.Tensor | Lanes:
    """The attention to all keys.

    Args:
        parts: what is left of shares of them.
        sinks: float32 `[heads]`, logits that take part in the softmax without a value (gpt-oss).
        form: of the product that comes next, whose order the result is to have; it must fit (`fits_lanes`).
        out: float32 `[tokens, heads, dim]`, the last dimension contiguous; allocated if None. Not with a form.

    Returns:
        `out`, or lanes of `heads * dim` columns.

    Raises:
        KernelError: a tensor has another shape, type or layout than said here, or the form does not fit.
    """
    splits, num_tokens, heads, dim = parts.sums.shape
    device = parts.sums.device
    lanes = None if form is None else lanes_of_heads(form, num_tokens, heads, dim, device)
    if lanes is None:
        out = torch.empty(num_tokens, heads, dim, device=device) if out is None else out
        check_shape("out", out, (num_tokens, heads, dim))
        if out.dtype != torch.float32 or out.stride(2) != 1:
            raise KernelError(f"out is {describe(out)}: expected float32, contiguous in the last dimension.")
    if splits > MAX_SPLITS:
        raise KernelError(f"{splits} shares of the keys: expected at most {MAX_SPLITS}.")
    target = out if lanes is None else lanes.values
    assert target is not None
    thirds = 0 if lanes is None else lanes.thirds
    cols, at_once = _shape(heads, dim, 1 if form is None else columns_together(form, thirds > 0))
    if num_tokens > 0:
        merge_kernel[(num_tokens, heads, triton.cdiv(dim, cols))](
            parts.sums,
            parts.logs,
            parts.logs if sinks is None else sinks,
            target,
            target.stride(0),
            dim if lanes is not None else target.stride(1),
            num_tokens * heads,
            splits,
            HEADS=heads,
            DIM=dim,
            COLS=cols,
            SPLITS_PAD=MAX_SPLITS,
            CHUNK=at_once,
            F=form if form is None or thirds else form.lanes,
            THIRDS=thirds,
            SINKS=sinks is not None,
            num_warps=1,
        )
    return target if lanes is None else lanes


def _shape(heads: int, dim: int, together: int) -> tuple[int, int]:
    """Columns of a program, which is a warp, and shares whose rows it has on their way together: 64 floats a thread."""
    cols = 128 if heads * triton.cdiv(dim, 128) >= _MANY_HEADS else 64
    return min(padded(dim), max(cols, together)), 16 if cols == 128 else 32
