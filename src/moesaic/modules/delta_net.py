"""What a stock module of linear attention by the gated delta rule consists of, whatever its fused projections are.

The CPU runs such modules as the model library has them, on packed projections. A GPU has a forward of its own, which
takes the parts from here: another family's module is one more reading of its projections. It knows no device.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from moesaic.kernels.blocks import Linear, Norm
from moesaic.modules.families import StockModule
from moesaic.modules.linear import PackedLinear
from moesaic.modules.norm import RMSNorm

__all__ = ["DeltaNetParts", "is_delta_net"]

_PARTS = frozenset({"conv1d", "in_proj_qkvz", "in_proj_ba", "norm", "out_proj"})
_CHILDREN = _PARTS | {"act"}  # which some versions of the model library have as a module


@dataclass(frozen=True, slots=True, eq=False)
class DeltaNetParts:
    """`x += out(gated_norm(delta_rule(conv(projections(norm(x))))))`; see `kernels.triton.delta_rule` for the rule.

    Attributes:
        layer_idx: the decoder layer.
        norm: of the input.
        projections: matrices whose outputs lie side by side, in this order; columns below are of all together.
        conv_columns: int32 `[channels]`: queries, keys, values by heads.
        gate_columns: int32 `[heads]`, the first of `value_dim`.
        beta_columns: int32 `[heads]`.
        decay_columns: int32 `[heads]`.
        conv_weight: float32 `[channels, taps]`.
        rate: float32 `[heads]`, positive.
        step_bias: float32 `[heads]`.
        out_norm: of a head of the output.
        output: the last matrix.
        key_dim: of a head.
        value_dim: of a head.
    """

    layer_idx: int
    norm: Norm
    projections: tuple[Linear, ...]
    conv_columns: torch.Tensor
    gate_columns: torch.Tensor
    beta_columns: torch.Tensor
    decay_columns: torch.Tensor
    conv_weight: torch.Tensor
    rate: torch.Tensor
    step_bias: torch.Tensor
    out_norm: Norm
    output: Linear
    key_dim: int
    value_dim: int

    @classmethod
    def of(cls, module: StockModule, norm: StockModule) -> DeltaNetParts | None:
        """From a loaded stock module and the norm of its input; None if it has parts that are not known here."""
        if not is_delta_net(module) or not isinstance(norm, RMSNorm):
            return None
        linears = module.in_proj_qkvz, module.in_proj_ba, module.out_proj
        if not all(isinstance(linear, PackedLinear) for linear in linears):
            return None
        qkvz, ba, output = (Linear(linear.packed, linear.bias) for linear in linears)
        conv, gate, beta, decay = _grouped_columns(module)
        return cls(
            layer_idx=module.layer_idx,
            norm=Norm(norm.weight, norm.eps),
            projections=(qkvz, ba),
            conv_columns=conv,
            gate_columns=gate,
            beta_columns=beta,
            decay_columns=decay,
            conv_weight=module.conv1d.weight.detach().float().squeeze(1).contiguous(),
            rate=module.A_log.detach().float().exp(),
            step_bias=module.dt_bias.detach().float().contiguous(),
            out_norm=Norm(module.norm.weight.detach().float().contiguous(), float(module.layer_norm_epsilon)),
            output=output,
            key_dim=module.head_k_dim,
            value_dim=module.head_v_dim,
        )


def is_delta_net(module: StockModule) -> bool:
    """Whether a stock module, loaded or on the meta device, is linear attention that is known here."""
    names = {name for name, _ in module.named_children()}
    if not _PARTS <= names <= _CHILDREN:
        return False
    return module.activation == "silu" and module.conv1d.bias is None


def _grouped_columns(module: StockModule) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Columns where projections are grouped by heads of keys: q, k, values, gates; then betas, decays of its values."""
    groups, key, value = module.num_k_heads, module.head_k_dim, module.head_v_dim
    own = module.num_v_heads // groups  # heads of values of a head of keys
    width = 2 * (key + own * value)
    columns = torch.arange(groups * width, dtype=torch.int32).view(groups, width)
    q, k, v, z = columns.split([key, key, own * value, own * value], dim=1)
    rest = torch.arange(2 * module.num_v_heads, dtype=torch.int32).view(groups, 2, own) + groups * width
    conv = torch.cat([part.flatten() for part in (q, k, v)])
    gate = z.reshape(-1, value)[:, 0].contiguous()
    return conv, gate, rest[:, 0].flatten(), rest[:, 1].flatten()
