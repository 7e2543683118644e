"""The operations of a decoder layer besides its matrix products, on the CPU: torch tensors in, torch tensors out.

Norms, rotary positions and elementwise steps are here; attention and routing, which are imported, have modules of their
own. All activations are float32. Shapes are checked here once and addresses go down. It knows no model.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from types import MappingProxyType

import torch

from moesaic import _native
from moesaic.errors import KernelError
from moesaic.kernels._checks import check_float, check_shape, choice, describe, float_rows, vector_address
from moesaic.kernels.attention import attention, mla_attention
from moesaic.kernels.routing import route

__all__ = [
    "HEAD_NORMS",
    "ROPE_LAYOUTS",
    "add_gated_",
    "add_scaled_",
    "argmax",
    "attention",
    "check_angles",
    "gated_activation",
    "layer_norm",
    "likeliest",
    "mla_attention",
    "norm_and_rotate_",
    "rms_norm",
    "rope_",
    "route",
    "sigmoid_mul_",
]

ROPE_LAYOUTS: Mapping[str, int] = MappingProxyType(
    {
        "half": _native.RopeLayout.HALF.value,
        "interleaved": _native.RopeLayout.INTERLEAVED.value,
        "interleaved_to_half": _native.RopeLayout.INTERLEAVED_TO_HALF.value,
    }
)
HEAD_NORMS: Mapping[str, int] = MappingProxyType(
    {
        "none": _native.HeadNorm.NONE.value,
        "per_head": _native.HeadNorm.PER_HEAD.value,
        "per_head_after_rope": _native.HeadNorm.PER_HEAD_AFTER_ROPE.value,
        "all_heads": _native.HeadNorm.ALL_HEADS.value,
    }
)
_GATED_ACTIVATIONS: Mapping[str, int] = MappingProxyType(
    {
        "silu": _native.RowOp.SILU_MUL.value,
        "gelu": _native.RowOp.GELU_MUL.value,
        "gelu_tanh": _native.RowOp.GELU_TANH_MUL.value,
        "sigmoid": _native.RowOp.SIGMOID_MUL.value,
    }
)
_MAX_ROTARY_PAIRS: int = _native.MAX_ROTARY_PAIRS
_ADD_SCALED: int = _native.RowOp.ADD_SCALED.value
_ADD_GATED: int = _native.RowOp.ADD_GATED.value


def rms_norm(
    x: torch.Tensor,
    weight: torch.Tensor | None,
    eps: float,
    *,
    weight_offset: float = 0.0,
    residual: torch.Tensor | None = None,
    residual_scale: float = 1.0,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """`x / sqrt(mean(x^2) + eps) * (weight + weight_offset)` over the last dimension (arXiv 1910.07467).

    Args:
        x: float32 `[..., width]`.
        weight: float32 `[width]`, or None for ones.
        eps: added to the mean square.
        weight_offset: added to the weights (1 in Gemma and Qwen3-Next).
        residual: float32, shape of x: `residual += residual_scale * x` comes first, and is what is normalised.
        residual_scale: see residual.
        out: float32, shape of x, which it may be; allocated if None.

    Returns:
        out.

    Raises:
        KernelError: a tensor has another shape, type or layout than said here.
    """
    num_rows, x_stride = float_rows("x", x)
    width = x.shape[-1]
    out, out_stride = _output(x, out)
    residual_address = residual_stride = 0
    if residual is not None:
        check_shape("residual", residual, x.shape)
        _, residual_stride = float_rows("residual", residual)
        residual_address = residual.data_ptr()
    _native.rms_norm(
        x.data_ptr(),
        x_stride,
        vector_address("weight", weight, width),
        weight_offset,
        eps,
        out.data_ptr(),
        out_stride,
        residual_address,
        residual_stride,
        residual_scale,
        num_rows,
        width,
    )
    return out


def layer_norm(
    x: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    eps: float,
    *,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """`(x - mean) / sqrt(variance + eps) * weight + bias` over the last dimension of float32 `[..., width]`.

    Raises:
        KernelError: a tensor has another shape, type or layout than that, or weight or bias are not float32 `[width]`.
    """
    num_rows, x_stride = float_rows("x", x)
    width = x.shape[-1]
    out, out_stride = _output(x, out)
    _native.layer_norm(
        x.data_ptr(),
        x_stride,
        vector_address("weight", weight, width),
        vector_address("bias", bias, width),
        eps,
        out.data_ptr(),
        out_stride,
        num_rows,
        width,
    )
    return out


def rope_(
    q: torch.Tensor, k: torch.Tensor | None, cos: torch.Tensor, sin: torch.Tensor, *, layout: str = "half"
) -> None:
    """Rotate queries and keys in place; see `norm_and_rotate_`."""
    norm_and_rotate_(q, k, cos, sin, layout=layout)


def norm_and_rotate_(
    q: torch.Tensor,
    k: torch.Tensor | None,
    cos: torch.Tensor,
    sin: torch.Tensor,
    *,
    layout: str = "half",
    norm: str = "none",
    q_norm: torch.Tensor | None = None,
    k_norm: torch.Tensor | None = None,
    eps: float = 0.0,
    weight_offset: float = 0.0,
) -> None:
    """RMS-normalise and rotate the heads of queries and keys in place (rotary positions: arXiv 2104.09864).

    Args:
        q: float32 `[batch, heads, num_tokens, head_dim]`, any strides, the last dimension contiguous.
        k: float32 `[batch, kv_heads, num_tokens, head_dim]`, or None.
        cos: float32 `[batch or 1, num_tokens, num_pairs]`, any strides. The first 2 * num_pairs dimensions are rotated.
            (Of transformers' `[.., 2 * num_pairs]` pass the first half.)
        sin: like cos.
        layout: where pairs lie: "half" (i, i + num_pairs), "interleaved" (2i, 2i + 1), or "interleaved_to_half", read
            as the latter and written as the former (DeepSeek-V3 in transformers).
        norm: "none", "per_head", "per_head_after_rope", or "all_heads" (one norm over all heads of a token).
        q_norm: float32 `[head_dim]`, or `[heads * head_dim]` for "all_heads".
        k_norm: the same for k.
        eps: of the norm.
        weight_offset: added to the weights of the norm.

    Raises:
        KernelError: a tensor has another shape, type or layout than said here.
    """
    check_float("q", q, 4)
    batch, heads, num_tokens, head_dim = q.shape
    kv_heads = 0
    if k is not None:
        check_float("k", k, 4)
        kv_heads = k.shape[1]
        check_shape("k", k, (batch, kv_heads, num_tokens, head_dim))
    check_angles(cos, sin, batch, num_tokens, head_dim)
    norm_number = choice("norm", norm, HEAD_NORMS)
    q_weight = k_weight = 0
    if norm != "none":
        if q_norm is None or (k is not None and k_norm is None):
            raise KernelError(f"norm is '{norm}' but q_norm or k_norm is missing.")
        over_all = norm == "all_heads"
        q_weight = vector_address("q_norm", q_norm, heads * head_dim if over_all else head_dim)
        k_weight = (
            vector_address("k_norm", k_norm, kv_heads * head_dim if over_all else head_dim) if k is not None else 0
        )
    angle_strides = cos.stride()
    _native.norm_and_rotate(
        q.data_ptr(),
        q.stride(),
        heads,
        0 if k is None else k.data_ptr(),
        q.stride() if k is None else k.stride(),
        kv_heads,
        batch,
        num_tokens,
        head_dim,
        cos.data_ptr(),
        sin.data_ptr(),
        angle_strides if cos.shape[0] == batch else (0, *angle_strides[1:]),
        cos.shape[2],
        choice("layout", layout, ROPE_LAYOUTS),
        norm_number,
        q_weight,
        k_weight,
        eps,
        weight_offset,
    )


def gated_activation(
    gate: torch.Tensor, up: torch.Tensor, kind: str = "silu", *, out: torch.Tensor | None = None
) -> torch.Tensor:
    """`act(gate) * up`, float32 `[..., width]`; kind is "silu", "gelu", "gelu_tanh" or "sigmoid".

    Raises:
        KernelError: shapes, types or layouts differ.
    """
    check_shape("up", up, gate.shape)
    out, _ = _output(gate, out)
    _row_op(choice("kind", kind, _GATED_ACTIVATIONS), gate, up, out)
    return out


def sigmoid_mul_(x: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
    """`x *= sigmoid(gate)`, float32 `[..., width]` (the output gate of Qwen3-Next's attention)."""
    check_shape("gate", gate, x.shape)
    _row_op(_GATED_ACTIVATIONS["sigmoid"], gate, x, x)
    return x


def add_scaled_(x: torch.Tensor, y: torch.Tensor, scale: float = 1.0) -> torch.Tensor:
    """`x += scale * y`, float32 `[..., width]` (residuals; Granite scales them)."""
    check_shape("y", y, x.shape)
    _row_op(_ADD_SCALED, x, y, x, scale=scale)
    return x


def add_gated_(x: torch.Tensor, y: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
    """`x += sigmoid(gate) * y`, float32 `[..., width]` with one gate per row (shared experts of Qwen)."""
    check_shape("y", y, x.shape)
    _row_op(_ADD_GATED, x, y, x, gate=gate)
    return x


def argmax(x: torch.Tensor) -> torch.Tensor:
    """Index of the largest value of each row of float32 `[rows, width >= 1]`, int64 `[rows]`; the first of equals."""
    num_rows, stride = float_rows("x", x)
    if x.ndim != 2 or x.shape[1] < 1:
        raise KernelError(f"x is {describe(x)}: expected [rows, width] of at least one column.")
    indices = torch.empty(num_rows, dtype=torch.int64)
    _native.argmax(x.data_ptr(), stride, num_rows, x.shape[1], indices.data_ptr())
    return indices


def likeliest(logits: torch.Tensor) -> list[int]:
    """The token of each row of float32 `[rows, vocab_size]` that is likeliest; -1 where logits are no numbers."""
    tokens = argmax(logits)
    values = logits.gather(1, tokens[:, None])[:, 0]  # a NaN, if there is one
    return [
        token if math.isfinite(value) else -1 for token, value in zip(tokens.tolist(), values.tolist(), strict=True)
    ]


def _row_op(
    op: int,
    x: torch.Tensor,
    y: torch.Tensor,
    out: torch.Tensor,
    *,
    gate: torch.Tensor | None = None,
    scale: float = 1.0,
) -> None:
    num_rows, x_stride = float_rows("x", x)
    _, y_stride = float_rows("y", y)
    _, out_stride = float_rows("out", out)
    gate_address = vector_address("gate", gate, num_rows)
    _native.row_op(
        op,
        x.data_ptr(),
        x_stride,
        y.data_ptr(),
        y_stride,
        out.data_ptr(),
        out_stride,
        gate_address,
        scale,
        num_rows,
        x.shape[-1],
    )


def _output(x: torch.Tensor, out: torch.Tensor | None) -> tuple[torch.Tensor, int]:
    """Where to write a result of x's shape, and the stride of its rows."""
    if out is None:
        return torch.empty(x.shape), x.shape[-1]
    check_shape("out", out, x.shape)
    return out, float_rows("out", out)[1]


def check_angles(cos: torch.Tensor, sin: torch.Tensor, batch: int, num_tokens: int, head_dim: int) -> None:
    """Require rotary angles as `norm_and_rotate_` takes them."""
    shape = cos.shape
    if cos.dtype != torch.float32 or len(shape) != 3 or not cos.is_cpu or shape[0] not in (1, batch):
        raise KernelError(
            f"cos is {describe(cos)}: expected float32 [{batch} or 1, {num_tokens}, num_pairs] on the CPU."
        )
    check_shape("cos", cos, (shape[0], num_tokens, shape[2]))
    if sin.shape != shape or sin.stride() != cos.stride() or sin.dtype != torch.float32 or not sin.is_cpu:
        raise KernelError(f"cos is {describe(cos)} but sin is {describe(sin)}: expected the same layout.")
    if 2 * shape[2] > head_dim or shape[2] > _MAX_ROTARY_PAIRS:
        raise KernelError(
            f"{shape[2]} rotary pairs in heads of {head_dim}: expected at most half of the dimensions, and at most "
            f"{_MAX_ROTARY_PAIRS}."
        )
