"""Linear attention of a decoder layer on a GPU, on recurrent states in slots."""

from __future__ import annotations

import torch

from moesaic.kernels.triton.activations import Lanes
from moesaic.kernels.triton.combine_norm import NormBefore
from moesaic.kernels.triton.delta_rule import DeltaColumns, DeltaStep, causal_conv, gated_delta_rule, gated_norm_
from moesaic.kvcache.states import StateShape
from moesaic.modules.delta_net import DeltaNetParts
from moesaic.modules.gpu.step import GpuStep
from moesaic.modules.gpu.weights import GpuLinear, GpuLinears, GpuNorm

__all__ = ["GpuDeltaNet"]


class GpuDeltaNet:
    """`delta_net(norm(x))`, which the layer adds to x together with the next norm.

    Args:
        source: its parts on the CPU.
        device: the GPU.
    """

    def __init__(self, source: DeltaNetParts, device: torch.device) -> None:
        self.layer_idx, self.residual_scale = source.layer_idx, 1.0
        self.norm, self.out_norm = GpuNorm.of(source.norm, device), GpuNorm.of(source.out_norm, device)
        self.projections = GpuLinears.of(source.projections, device)
        self.output = GpuLinear.of(source.output, device)
        self.columns = DeltaColumns(
            source.conv_columns, source.gate_columns, source.beta_columns, source.decay_columns
        ).to(device)
        self.conv_weight, self.rate = source.conv_weight.to(device), source.rate.to(device)
        self.step_bias = source.step_bias.to(device)
        channels, taps = source.conv_weight.shape
        self.cache_shape = StateShape(taps - 1, channels, len(source.rate), source.key_dim, source.value_dim)

    @property
    def norm_before(self) -> NormBefore | None:
        """See `GpuNorm.before`."""
        return self.norm.before(self.projections.form)

    @property
    def weights(self) -> list[torch.Tensor]:
        """What is read in every step, in order."""
        return [self.norm.weight, *self.projections.data, self.output.weight.data]

    def __call__(self, x: torch.Tensor, step: GpuStep, normed: Lanes | None = None) -> torch.Tensor:
        """What is to be added to x, float32 `[tokens, hidden_size]`, contiguous.

        `normed` is x after the norm, if somebody has made it as `norm_before` says.
        """
        states, where = step.states(self.layer_idx), step.input
        projected = self._project(self.norm(x, self.projections.form) if normed is None else normed, len(x))
        tokens = DeltaStep(where.positions, where.query_start, where.state_slots, step.max_query_len)
        mixed = causal_conv(projected, self.columns.conv, self.conv_weight, states.conv, tokens)
        attended = gated_delta_rule(mixed, projected, self.columns, self.rate, self.step_bias, states.recurrent, tokens)
        gated_norm_(attended, projected, self.columns.gate, self.out_norm.weight, self.out_norm.eps)
        return self.output(attended)

    def _project(self, x: torch.Tensor | Lanes, num_tokens: int) -> torch.Tensor:
        """All projections, side by side."""
        widths = [part.weight.rows for part in self.projections.parts]
        out = torch.empty(num_tokens, sum(widths), device=self.rate.device)
        for part, columns in zip(self.projections.parts, out.split(widths, dim=1), strict=True):
            part(x, columns)
        return out
