"""Products with packed weights on the CPU: torch tensors in, torch tensors out.

Shapes are checked here, addresses go down. Quantised weights meet activations that are rounded to int8 in groups of 32
with a float scale; float weights meet them as they are. It knows no model.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from moesaic import _native
from moesaic.errors import KernelError
from moesaic.kernels._checks import check_float, check_shape, describe, vector_address
from moesaic.kernels.experts import PackedExperts
from moesaic.kernels.packed import PackedTensor

__all__ = [
    "gather_rows",
    "linear",
    "linear_heads",
    "linear_multi",
    "linear_transposed",
    "linear_transposed_heads",
    "moe_forward",
]


def linear(
    x: torch.Tensor,
    w: PackedTensor,
    bias: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
    index: int = 0,
    rows: slice | None = None,
) -> torch.Tensor:
    """`x W^T + bias`.

    Args:
        x: float32 `[num_tokens, cols]`.
        w: the weights.
        bias: float32 `[rows]`.
        out: float32 `[num_tokens, rows]` to write to.
        index: which matrix of the stack.
        rows: only these rows of the matrix.

    Returns:
        float32 `[num_tokens, rows]`.

    Raises:
        KernelError: a tensor has the wrong shape or type.
    """
    first, count = _row_range(w, rows)
    num_tokens, x_stride = _tokens("x", x, w.cols)
    out = _output(out, num_tokens, count)
    _native.linear(
        w.format.ggml_type,
        w.rows,
        w.cols,
        w.address(index),
        first,
        count,
        vector_address("bias", bias, count),
        out.data_ptr(),
        out.stride(0),
        x.data_ptr(),
        x_stride,
        num_tokens,
    )
    return out


def linear_multi(
    x: torch.Tensor, weights: Sequence[PackedTensor], biases: Sequence[torch.Tensor | None] | None = None
) -> list[torch.Tensor]:
    """`linear` of several matrices with one input, in one pass: activations are rounded once, threads meet once.

    Args:
        x: float32 `[num_tokens, cols]`.
        weights: matrices of `cols` columns, of any formats.
        biases: one per matrix, or None.

    Returns:
        One float32 `[num_tokens, rows]` per matrix.

    Raises:
        KernelError: a tensor has the wrong shape or type, or there are more or fewer biases than matrices.
    """
    biases = [None] * len(weights) if biases is None else biases
    if len(biases) != len(weights) or not weights:
        raise KernelError(
            f"linear_multi got {len(weights)} matrices and {len(biases)} biases: expected as many, at least 1."
        )
    outs = [x.new_empty(x.shape[0], w.rows) for w in weights]
    jobs = []
    for w, bias, out in zip(weights, biases, outs, strict=True):
        _tokens("x", x, w.cols)
        bias_address = vector_address("bias", bias, w.rows)
        jobs.append((w.format.ggml_type, w.rows, w.cols, w.address(), 0, w.rows, bias_address, out.data_ptr(), w.rows))
    _native.linear_multi(jobs, x.data_ptr(), x.stride(0), x.shape[0])
    return outs


def linear_transposed(
    x: torch.Tensor,
    w: PackedTensor,
    index: int = 0,
    rows: slice | None = None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """`x W`, the packed matrix from the other side, in float32 arithmetic.

    Args:
        x: float32 `[num_tokens, rows]`.
        w: the weights.
        index: which matrix of the stack.
        rows: only these rows of the matrix.
        out: float32 `[num_tokens, cols]` to write to.

    Returns:
        float32 `[num_tokens, cols]`.

    Raises:
        KernelError: a tensor has the wrong shape or type.
    """
    first, count = _row_range(w, rows)
    num_tokens, x_stride = _tokens("x", x, count)
    out = _output(out, num_tokens, w.cols)
    _native.linear_transposed_heads(
        w.format.ggml_type,
        w.rows,
        w.cols,
        w.address(index),
        0,
        0,
        1,
        first,
        count,
        x.data_ptr(),
        x_stride,
        0,
        out.data_ptr(),
        out.stride(0),
        0,
        num_tokens,
    )
    return out


def linear_heads(
    x: torch.Tensor, w: PackedTensor, rows: slice | None = None, out: torch.Tensor | None = None
) -> torch.Tensor:
    """A linear map per head, all in one pass: `out[t, h] = W_h x[t, h]`.

    `W_h` is matrix h of the stack; if `w` is a single matrix, its rows are those of all heads one after the other.

    Args:
        x: float32 `[num_tokens, num_heads, cols]`, of any strides but the last.
        w: the weights, `num_heads` matrices or one of `num_heads * head_rows` rows.
        rows: only these rows of each head.
        out: float32 `[num_tokens, num_heads, rows]` to write to, of any strides but the last.

    Returns:
        float32 `[num_tokens, num_heads, rows]`.

    Raises:
        KernelError: a tensor has the wrong shape or type.
    """
    return _heads(_native.linear_heads, x, w, rows, out, transposed=False)


def linear_transposed_heads(
    x: torch.Tensor, w: PackedTensor, rows: slice | None = None, out: torch.Tensor | None = None
) -> torch.Tensor:
    """`out[t, h] = x[t, h] W_h` in float32 arithmetic; heads as in `linear_heads`.

    Args:
        x: float32 `[num_tokens, num_heads, rows]`, of any strides but the last.
        w: the weights, `num_heads` matrices or one of `num_heads * head_rows` rows.
        rows: only these rows of each head.
        out: float32 `[num_tokens, num_heads, cols]` to write to, of any strides but the last.

    Returns:
        float32 `[num_tokens, num_heads, cols]`.

    Raises:
        KernelError: a tensor has the wrong shape or type.
    """
    return _heads(_native.linear_transposed_heads, x, w, rows, out, transposed=True)


def gather_rows(ids: torch.Tensor, w: PackedTensor, index: int = 0, out: torch.Tensor | None = None) -> torch.Tensor:
    """Rows of a packed matrix, as an embedding looks them up.

    Args:
        ids: int64 of any shape, each in `[0, rows)`.
        w: the weights.
        index: which matrix of the stack.
        out: float32 `[*ids.shape, cols]`, contiguous, to write to.

    Returns:
        float32 `[*ids.shape, cols]`, bit-exact with the format's definition; out if it was given.

    Raises:
        KernelError: an id is outside the matrix, or not int64 on the CPU; out is not as described.
    """
    if ids.dtype != torch.int64 or ids.device.type != "cpu":
        raise KernelError(f"ids are {describe(ids)}: expected int64 on the CPU.")
    ids = ids.contiguous()
    if out is None:
        out = torch.empty(*ids.shape, w.cols)
    elif out.dtype != torch.float32 or out.shape != (*ids.shape, w.cols) or not out.is_contiguous() or out.is_cuda:
        raise KernelError(f"out is {describe(out)}: expected float32 {[*ids.shape, w.cols]} on the CPU, contiguous.")
    try:
        _native.gather_rows(
            w.format.ggml_type, w.rows, w.cols, w.address(index), ids.data_ptr(), ids.numel(), out.data_ptr()
        )
    except IndexError as error:
        raise KernelError(f"An id is outside the matrix: {error}.") from error
    return out


def moe_forward(
    x: torch.Tensor,
    top_k_index: torch.Tensor,
    top_k_weights: torch.Tensor,
    experts: PackedExperts,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """The weighted sum of the chosen experts, in one native call.

    Tokens that chose the same expert share one read of its weights.

    Args:
        x: float32 `[num_tokens, hidden]`.
        top_k_index: int64 `[num_tokens, k]`; an id outside `[0, num_experts)` stands for no expert.
        top_k_weights: float32 `[num_tokens, k]`.
        experts: the experts.
        out: float32 `[num_tokens, hidden]`, contiguous, to write to; not x.

    Returns:
        float32 `[num_tokens, hidden]`.

    Raises:
        KernelError: a tensor has the wrong shape or type.
    """
    num_tokens, x_stride = _tokens("x", x, experts.hidden)
    if top_k_index.ndim != 2:
        raise KernelError(f"top_k_index is {describe(top_k_index)}: expected int64 [num_tokens, k].")
    top_k = top_k_index.shape[1]
    for name, tensor, dtype in (
        ("top_k_index", top_k_index, torch.int64),
        ("top_k_weights", top_k_weights, torch.float32),
    ):
        vector_address(name, tensor, num_tokens * top_k, dtype)
        check_shape(name, tensor, (num_tokens, top_k))
    out = _output(out, num_tokens, experts.hidden)
    if not out.is_contiguous() or (num_tokens and out.data_ptr() == x.data_ptr()):
        raise KernelError(f"out is {describe(out)}: expected contiguous memory other than that of x.")
    _native.moe_forward(
        experts.handle,
        top_k_index.data_ptr(),
        top_k_weights.data_ptr(),
        top_k,
        x.data_ptr(),
        x_stride,
        num_tokens,
        out.data_ptr(),
    )
    return out


def _tokens(name: str, x: torch.Tensor, width: int) -> tuple[int, int]:
    """Number of rows and stride of float32 [num_tokens, width]."""
    check_float(name, x, 2)
    if x.shape[1] != width:
        raise KernelError(f"{name} has shape {list(x.shape)}: expected [num_tokens, {width}].")
    return x.shape[0], x.stride(0)


def _output(out: torch.Tensor | None, *shape: int) -> torch.Tensor:
    """The output given, checked, or a new one."""
    if out is None:
        return torch.empty(shape)
    check_float("out", out, len(shape))
    check_shape("out", out, shape)
    return out


def _row_range(w: PackedTensor, rows: slice | None, total: int | None = None) -> tuple[int, int]:
    """First row and number of rows of a slice of `total` rows (default: those of a matrix)."""
    total = w.rows if total is None else total
    if rows is None:
        return 0, total
    start, stop, step = rows.indices(total)
    if step != 1 or stop <= start:
        raise KernelError(f"Rows {rows} of {total}: expected at least one row and no step.")
    return start, stop - start


def _heads(
    kernel: object, x: torch.Tensor, w: PackedTensor, rows: slice | None, out: torch.Tensor | None, transposed: bool
) -> torch.Tensor:
    check_float("x", x, 3)
    num_tokens, num_heads, width = x.shape
    stacked = w.num_matrices > 1 or num_heads == 1
    if (w.num_matrices if stacked else num_heads) != num_heads or (not stacked and w.rows % num_heads):
        raise KernelError(
            f"x has {num_heads} heads, the weights are {w.num_matrices} matrices of {w.rows} rows: expected a matrix "
            "per head, or one whose rows the heads share evenly."
        )
    first, count = _row_range(w, rows, w.rows if stacked else w.rows // num_heads)
    if width != (count if transposed else w.cols):
        raise KernelError(
            f"x has shape {list(x.shape)}: expected [num_tokens, num_heads, {count if transposed else w.cols}]."
        )
    out = _output(out, num_tokens, num_heads, w.cols if transposed else count)
    assert callable(kernel)
    kernel(
        w.format.ggml_type,
        w.rows,
        w.cols,
        w.address(),
        w.matrix_bytes if stacked else 0,
        0 if stacked else w.rows // num_heads,
        num_heads,
        first,
        count,
        x.data_ptr(),
        x.stride(0),
        x.stride(1),
        out.data_ptr(),
        out.stride(0),
        out.stride(1),
        num_tokens,
    )
    return out
