"""Linear attention by the gated delta rule on the CPU, on recurrent states in slots; see csrc/ops/delta_net.h.

It is what lies between a layer's projections and its output matrix, for any number of tokens of any number of
sequences: convolution, recurrence, gated norm. `triton.delta_rule` does the same on a GPU. A token's numbers depend on
its own sequence alone, and not on how it was cut into steps, to the bit. This module knows no model.
"""

from __future__ import annotations

import torch

from moesaic import _native
from moesaic.errors import KernelError
from moesaic.kernels._checks import check_float, check_shape, vector_address
from moesaic.kernels.block_parts import Norm

__all__ = ["DeltaNet"]


class DeltaNet:
    """`gated_norm(delta_rule(conv(x)))` of projected tokens.

    Per head and token, with a state S `[key_dim, value_dim]`: `S *= decay; S += k (beta (v - k S))^T; out = q S`
    (arXiv 2412.06464). Queries and keys are divided by their lengths, queries also by the root of key_dim.

    Args:
        width: columns of a projected token.
        conv_columns: int32 `[channels]`, which of them go through the convolution: queries, keys, values by heads.
        gate_columns: int32 `[heads]`, the first of the `value_dim` columns that gate a head's output.
        beta_columns: int32 `[heads]`, of how much of a value is written, before its sigmoid.
        decay_columns: int32 `[heads]`; a token's decay is `exp(-rate * softplus(column + step_bias))`.
        conv_weight: float32 `[channels, taps]`; the last tap is the token's own.
        rate: float32 `[heads]`, positive.
        step_bias: float32 `[heads]`.
        norm: of a head of the output.
        key_dim: of a head.
        value_dim: of a head.

    Raises:
        KernelError: sizes do not go together, or are larger than the kernel's.
    """

    def __init__(
        self,
        *,
        width: int,
        conv_columns: torch.Tensor,
        gate_columns: torch.Tensor,
        beta_columns: torch.Tensor,
        decay_columns: torch.Tensor,
        conv_weight: torch.Tensor,
        rate: torch.Tensor,
        step_bias: torch.Tensor,
        norm: Norm,
        key_dim: int,
        value_dim: int,
    ) -> None:
        heads, (channels, taps) = len(rate), conv_weight.shape
        key_heads, rest = divmod(channels - heads * value_dim, 2 * key_dim)
        if rest or key_heads < 1 or heads % key_heads:
            raise KernelError(
                f"{channels} channels for {heads} heads of {value_dim} and keys of {key_dim}: expected queries and "
                "keys of heads that the heads of values share evenly, then values."
            )
        if key_dim > _native.MAX_DELTA_KEY_DIM or not 2 <= taps <= _native.MAX_DELTA_TAPS:
            raise KernelError(
                f"keys of {key_dim}, a convolution over {taps} tokens: expected at most {_native.MAX_DELTA_KEY_DIM}, "
                f"and 2 to {_native.MAX_DELTA_TAPS}."
            )
        columns = (
            ("conv_columns", conv_columns, channels, 1),
            ("gate_columns", gate_columns, heads, value_dim),
            ("beta_columns", beta_columns, heads, 1),
            ("decay_columns", decay_columns, heads, 1),
        )
        for name, part, size, span in columns:
            vector_address(name, part, size, torch.int32)
            if int(part.min()) < 0 or int(part.max()) + span > width:
                raise KernelError(f"{name} has columns {int(part.min())} to {int(part.max())} of {width}.")
        self.width, self.heads, self.value_dim, self._channels = width, heads, value_dim, channels
        self.conv_shape, self.state_shape = (taps - 1, channels), (heads, key_dim, value_dim)
        weight = conv_weight.t().contiguous()
        self._owners = [part for _, part, _, _ in columns], weight, rate, step_bias, norm  # addresses lead into these
        conv, gate, beta, decay = (part.data_ptr() for _, part, _, _ in columns)
        self._columns = conv, gate, beta, decay
        self._sizes = key_heads, heads, key_dim, value_dim, taps
        self._weights = (
            vector_address("conv_weight", weight, taps * channels),
            vector_address("rate", rate, heads),
            vector_address("step_bias", step_bias, heads),
            *norm.arguments("norm", value_dim),
        )

    def __call__(
        self,
        x: torch.Tensor,
        conv: torch.Tensor,
        recurrent: torch.Tensor,
        positions: torch.Tensor,
        query_start: torch.Tensor,
        state_slots: torch.Tensor,
    ) -> torch.Tensor:
        """Go through a step's tokens; the states are brought up to date.

        Args:
            x: float32 `[tokens, width]`, rows contiguous.
            conv: float32 `[slots, taps - 1, channels]`, contiguous: the last inputs of the convolution, oldest first.
            recurrent: float32 `[slots, heads, key_dim, value_dim]`, contiguous.
            positions: int64 `[tokens]`; a sequence whose first token here is at 0 begins with zeros.
            query_start: int32 `[seqs + 1]`: tokens `query_start[s]` to `query_start[s + 1]` are of sequence s.
            state_slots: int64 `[seqs]`, all different.

        Returns:
            float32 `[tokens, heads * value_dim]`.

        Raises:
            KernelError: a tensor has another shape, type or layout than said here, or a slot is not there.
        """
        check_float("x", x, 2)
        tokens, seqs, slots = len(x), len(state_slots), len(conv)
        check_shape("x", x, (tokens, self.width))
        check_shape("conv", conv, (slots, *self.conv_shape))
        check_shape("recurrent", recurrent, (slots, *self.state_shape))
        mixed, gates = torch.empty(tokens, self._channels), torch.empty(tokens, 2, self.heads)
        out = torch.empty(tokens, self.heads * self.value_dim)
        try:
            _native.delta_net(
                x.data_ptr(),
                x.stride(0),
                self._columns,
                self._sizes,
                self._weights,
                (
                    vector_address("conv", conv, conv.numel()),
                    vector_address("recurrent", recurrent, recurrent.numel()),
                    slots,
                ),
                (
                    tokens,
                    seqs,
                    vector_address("query_start", query_start, seqs + 1, torch.int32),
                    vector_address("state_slots", state_slots, seqs, torch.int64),
                    vector_address("positions", positions, tokens, torch.int64),
                ),
                mixed.data_ptr(),
                gates.data_ptr(),
                out.data_ptr(),
            )
        except ValueError as error:
            raise KernelError(f"The tables of a step do not go together: {error}.") from error
        return out
