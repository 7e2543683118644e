"""Linear attention by the gated delta rule (arXiv 2412.06464) on a GPU, on recurrent states in slots.

Per head and token, with a state S `[key_dim, value_dim]`: `S *= decay; S += k (beta (v - k S))^T; out = q S`, queries,
keys and values coming from a short causal convolution. A step has any number of tokens of any number of sequences; one
token goes the way of many. Nothing waits for the device, so that a graph can capture it. It knows no model: where a
projection's output has which part, `DeltaColumns` says.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
import triton

from moesaic.errors import KernelError
from moesaic.kernels._checks import check_shape, describe
from moesaic.kernels.triton.delta_rule_kernels import conv_kernel, gated_norm_kernel, recurrence_kernel
from moesaic.kernels.triton.views import is_interpreted

__all__ = ["DeltaColumns", "DeltaStep", "causal_conv", "gated_delta_rule", "gated_norm_"]

_TOKENS = 16  # of a program of the convolution; more than its state holds
_CHANNELS = 256
_VALUES = 8  # columns of a state that a warp keeps in registers


@dataclass(frozen=True, slots=True, eq=False)
class DeltaColumns:
    """Where the parts of a projected token are; all int32 on the device.

    Attributes:
        conv: `[channels]`, the column of each channel of the convolution: all queries, all keys, all values by heads.
        gate: `[heads]`, the first of the `value_dim` columns that gate a head's output.
        beta: `[heads]`, of how much of a value is written, before its sigmoid.
        decay: `[heads]`, of how fast the state decays.
    """

    conv: torch.Tensor
    gate: torch.Tensor
    beta: torch.Tensor
    decay: torch.Tensor

    def to(self, device: torch.device) -> DeltaColumns:
        """The same on a device."""
        return DeltaColumns(*(getattr(self, field.name).to(device) for field in fields(self)))


@dataclass(frozen=True, slots=True, eq=False)
class DeltaStep:
    """Where the tokens of a step are; as `StepInput` has them.

    Attributes:
        positions: int64 `[tokens]`; a sequence whose first token here is at 0 begins with zeros.
        query_start: int32 `[seqs + 1]`.
        state_slots: int64 `[seqs]`; -1: padding, whose results are zeros.
        max_query_len: most tokens of a sequence.
    """

    positions: torch.Tensor
    query_start: torch.Tensor
    state_slots: torch.Tensor
    max_query_len: int

    def check(self, tokens: int) -> int:
        """The number of sequences; KernelError if a tensor has another shape or type than said here."""
        seqs = len(self.state_slots)
        parts = (
            ("positions", self.positions, torch.int64, tokens),
            ("query_start", self.query_start, torch.int32, seqs + 1),
            ("state_slots", self.state_slots, torch.int64, seqs),
        )
        for name, x, dtype, size in parts:
            if x.dtype != dtype or x.shape != (size,) or not x.is_contiguous():
                raise KernelError(f"{name} is {describe(x)}: expected {str(dtype).removeprefix('torch.')} [{size}].")
        return seqs


def causal_conv(
    x: torch.Tensor, columns: torch.Tensor, weight: torch.Tensor, state: torch.Tensor, step: DeltaStep
) -> torch.Tensor:
    """SiLU of a causal convolution of every channel with its own weights, and its state brought up to date.

    Args:
        x: float32 `[tokens, width]`, rows contiguous.
        columns: int32 `[channels]`, of x.
        weight: float32 `[channels, taps]`, contiguous; the last tap is the token's own.
        state: float32 `[slots, taps - 1, channels]`, contiguous, the inputs before this step; changed in place.
        step: where the tokens are.

    Returns:
        float32 `[tokens, channels]`.

    Raises:
        KernelError: a tensor has another shape, type or layout than said here.
    """
    channels, taps = weight.shape
    _check_rows("x", x)
    _check_floats(("weight", weight), ("state", state))
    _check_index("columns", columns, channels)
    check_shape("state", state, (state.shape[0], taps - 1, channels))
    if not 2 <= taps <= _TOKENS:
        raise KernelError(f"a convolution over {taps} tokens: expected 2 to {_TOKENS}.")
    seqs = step.check(len(x))
    out = torch.empty(len(x), channels, device=x.device)
    if len(x) == 0:
        return out
    tokens = _TOKENS if step.max_query_len > 1 else max(2, triton.next_power_of_2(taps - 1))
    conv_kernel[(seqs, triton.cdiv(step.max_query_len, tokens), triton.cdiv(channels, _CHANNELS))](
        x,
        columns,
        weight,
        state,
        step.state_slots,
        step.positions,
        step.query_start,
        out,
        x.stride(0),
        *state.stride()[:2],
        out.stride(0),
        channels,
        TAPS=taps,
        TOKENS=tokens,
        CHANNELS=_CHANNELS,
    )
    return out


def gated_delta_rule(
    mixed: torch.Tensor,
    x: torch.Tensor,
    columns: DeltaColumns,
    rate: torch.Tensor,
    step_bias: torch.Tensor,
    state: torch.Tensor,
    step: DeltaStep,
) -> torch.Tensor:
    """What the states give for the queries of a step, token by token, and the states brought up to date.

    Queries and keys are divided by their lengths, queries also by the root of key_dim.

    Args:
        mixed: float32 `[tokens, channels]`, what `causal_conv` gave: queries and keys of `channels - heads * value_dim`
            over `2 * key_dim` heads, each for equally many neighbouring heads of values.
        x: float32 `[tokens, width]`, with beta and decay.
        columns: of x.
        rate: float32 `[heads]`, positive; a step decays by `exp(-rate * softplus(decay + step_bias))`.
        step_bias: float32 `[heads]`.
        state: float32 `[slots, heads, key_dim, value_dim]`, contiguous; changed in place.
        step: where the tokens are.

    Returns:
        float32 `[tokens, heads * value_dim]`.

    Raises:
        KernelError: a tensor has another shape, type or layout than said here.
    """
    _check_rows("mixed", mixed)
    _check_rows("x", x)
    _, heads, key_dim, value_dim = state.shape
    _check_floats(("state", state), ("rate", rate), ("step_bias", step_bias))
    check_shape("rate", rate, (heads,))
    check_shape("step_bias", step_bias, (heads,))
    _check_index("columns.beta", columns.beta, heads)
    _check_index("columns.decay", columns.decay, heads)
    key_heads, rest = divmod(mixed.shape[1] - heads * value_dim, 2 * key_dim)
    if rest or key_heads < 1 or heads % key_heads or len(x) != len(mixed):
        raise KernelError(
            f"mixed is {describe(mixed)}, x has {len(x)} rows, for {heads} heads of {value_dim} and keys of {key_dim}: "
            "expected queries and keys of heads that the heads of values share evenly, then values."
        )
    seqs = step.check(len(x))
    out = torch.empty(len(x), heads * value_dim, device=x.device)
    if len(x) == 0:
        return out
    values = triton.next_power_of_2(value_dim) if is_interpreted() else _VALUES
    recurrence_kernel[(seqs, heads, triton.cdiv(value_dim, values))](
        mixed,
        x,
        columns.beta,
        columns.decay,
        rate,
        step_bias,
        state,
        step.state_slots,
        step.positions,
        step.query_start,
        out,
        mixed.stride(0),
        x.stride(0),
        state.stride(0),
        out.stride(0),
        key_dim**-0.5,
        HEADS=heads,
        GROUP=heads // key_heads,
        KEY_DIM=key_dim,
        KEY_PAD=triton.next_power_of_2(key_dim),
        VALUE_DIM=value_dim,
        VALUES=values,
        num_warps=1,
    )
    return out


def gated_norm_(
    x: torch.Tensor, gates: torch.Tensor, columns: torch.Tensor, weight: torch.Tensor, eps: float
) -> torch.Tensor:
    """The RMS norm of each head times SiLU of its gate, in place.

    Args:
        x: float32 `[tokens, heads * width]`, rows contiguous.
        gates: float32 `[tokens, any]`, rows contiguous.
        columns: int32 `[heads]`, the first of the `width` columns of gates for each head.
        weight: float32 `[width]`, contiguous.
        eps: added to the mean square.

    Returns:
        x.

    Raises:
        KernelError: a tensor has another shape, type or layout than said here.
    """
    _check_rows("x", x)
    _check_rows("gates", gates)
    _check_floats(("weight", weight))
    heads, width = len(columns), len(weight)
    _check_index("columns", columns, heads)
    check_shape("x", x, (len(gates), heads * width))
    if len(x):
        gated_norm_kernel[(len(x), heads)](
            x,
            gates,
            columns,
            weight,
            x.stride(0),
            gates.stride(0),
            eps,
            WIDTH=width,
            PAD=triton.next_power_of_2(width),
            num_warps=1,
        )
    return x


def _check_rows(name: str, x: torch.Tensor) -> None:
    if x.dtype != torch.float32 or x.ndim != 2 or (x.stride(1) != 1 and x.shape[1] > 1):
        raise KernelError(f"{name} is {describe(x)}: expected float32 [tokens, width], rows contiguous.")


def _check_floats(*named: tuple[str, torch.Tensor]) -> None:
    for name, x in named:
        if x.dtype != torch.float32 or not x.is_contiguous():
            raise KernelError(f"{name} is {describe(x)}: expected float32, contiguous.")


def _check_index(name: str, x: torch.Tensor, size: int) -> None:
    if x.dtype != torch.int32 or x.shape != (size,) or not x.is_contiguous():
        raise KernelError(f"{name} is {describe(x)}: expected int32 [{size}], contiguous.")
