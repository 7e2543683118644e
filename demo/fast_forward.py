"""A training forward pass over the parameters of the stock Hugging Face model.

It computes what `DeepseekV3ForCausalLM` computes, arranged for a graphics card: tokens lie in one flat dimension, so
that every compiled piece sees one shape whatever the row length, and every expert runs on every token with the weight
zero where the router did not choose it. With 16 experts of 256 columns that is four times the arithmetic of a sparse
layer, without a single index operation. It also rounds weights to a Q4_K-like grid when asked, so that the model learns
to live with it. It knows no optimizer and no data.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["FastForward", "Hidden", "fake_quantize"]

_BLOCK = 32


def fake_quantize(weight: Tensor) -> Tensor:
    """Weights [.., K] on a 4-bit grid with scale and minimum per 32 along K; gradients pass straight through."""
    blocks = torch.unflatten(weight, -1, (-1, _BLOCK))
    low = blocks.amin(-1, keepdim=True).clamp(max=0)
    scale = ((blocks.amax(-1, keepdim=True) - low) / 15).clamp(min=1e-12)
    rounded = ((blocks - low) / scale).round().clamp(0, 15) * scale + low
    result: Tensor = weight + (rounded.flatten(-2) - weight).detach()
    return result


def _cast(weights: list[Tensor], quantize: bool, dtype: torch.dtype) -> list[Tensor]:
    return [(fake_quantize(w) if quantize else w).to(dtype) for w in weights]


def _norm(x: Tensor, weight: Tensor, eps: float = 1e-6) -> Tensor:
    return F.rms_norm(x.float(), (x.shape[-1],), weight.float(), eps).to(x.dtype)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    even, odd = x[..., 0::2].float(), x[..., 1::2].float()
    return torch.cat([even * cos - odd * sin, odd * cos + even * sin], dim=-1).to(x.dtype)


def _attention_inputs(
    x: Tensor, cos: Tensor, sin: Tensor, norms: list[Tensor], weights: list[Tensor], nope: int, rope: int, value: int
) -> tuple[Tensor, Tensor, Tensor]:
    """From x [T, H] to q, k [T, heads, nope + rope] and v of the same shape, padded with zeros."""
    q_a, q_b, kv_a, kv_b = weights
    h = _norm(x, norms[0])
    q = torch.unflatten(F.linear(_norm(F.linear(h, q_a), norms[1]), q_b), -1, (-1, nope + rope))
    latent, k_rope = torch.split(F.linear(h, kv_a), [kv_a.shape[0] - rope, rope], dim=-1)
    kv = torch.unflatten(F.linear(_norm(latent, norms[2]), kv_b), -1, (-1, nope + value))
    k_rope = _rotate(k_rope, cos, sin)[:, None].expand(-1, kv.shape[1], -1)
    q = torch.cat([q[..., :nope], _rotate(q[..., nope:], cos[:, None], sin[:, None])], dim=-1)
    k = torch.cat([kv[..., :nope], k_rope], dim=-1)
    return q, k, F.pad(kv[..., nope:], (0, nope + rope - value))


def _attention_output(x: Tensor, attended: Tensor, weight: Tensor, value: int) -> Tensor:
    return x + F.linear(attended[..., :value].flatten(-2), weight)


def _gated(h: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
    return F.linear(F.silu(F.linear(h, gate)) * F.linear(h, up), down)


def _dense_mlp(x: Tensor, norm: Tensor, weights: list[Tensor]) -> Tensor:
    return x + _gated(_norm(x, norm), *weights)


def _route(h: Tensor, router: Tensor, bias: Tensor, top_k: int, groups: int, topk_group: int, scaling: float) -> Tensor:
    """Combine weights [T, num_experts], zero where an expert was not chosen."""
    scores = F.linear(h.float(), router.float()).sigmoid()
    choice = torch.unflatten(scores + bias, -1, (groups, -1))
    group_scores = choice.topk(2, dim=-1).values.sum(-1)
    kept = group_scores >= group_scores.topk(topk_group, dim=-1).values[:, -1:]
    choice = choice.masked_fill(~kept[..., None], float("-inf")).flatten(-2)
    chosen = choice >= choice.topk(top_k, dim=-1).values[:, -1:]
    weights = scores * chosen
    result: Tensor = weights / (weights.sum(-1, keepdim=True) + 1e-20) * scaling
    return result


def _moe(
    x: Tensor, valid: Tensor, norm: Tensor, router: Tensor, bias: Tensor, weights: list[Tensor], route: tuple[Any, ...]
) -> tuple[Tensor, Tensor]:
    """Add the experts to x [T, H], and count the valid tokens that chose each expert."""
    gate_up, down, shared_gate, shared_up, shared_down = weights
    h = _norm(x, norm)
    combine = _route(h, router, bias, *route)
    gate, up = torch.unflatten(F.linear(h, gate_up.flatten(0, 1)), -1, (gate_up.shape[0], 2, -1)).unbind(-2)
    inner = F.silu(gate) * up * combine[..., None].to(h.dtype)
    out = inner.flatten(-2) @ down.transpose(1, 2).flatten(0, 1)
    load = ((combine > 0) & valid[:, None]).sum(0).float()
    return x + out + _gated(h, shared_gate, shared_up, shared_down), load


@dataclass(frozen=True, slots=True)
class Hidden:
    """Last hidden states [T, H] after the final norm, and expert loads [num_moe_layers, num_experts]."""

    states: Tensor
    loads: Tensor


class FastForward:
    """The forward pass; holds no parameters of its own.

    Args:
        model: a stock `DeepseekV3ForCausalLM` whose parameters are used and trained.
        compile_pieces: compile with torch.compile (on a GPU); plain eager otherwise.
        dtype: of weights and activations in matrix products.
    """

    def __init__(self, model: nn.Module, compile_pieces: bool, dtype: torch.dtype = torch.bfloat16) -> None:
        self.model: Any = model
        config: Any = model.config
        self.config, self.dtype = config, dtype
        self.nope, self.rope, self.value = config.qk_nope_head_dim, config.qk_rope_head_dim, config.v_head_dim
        self.route = (
            config.num_experts_per_tok,
            config.n_group,
            config.topk_group,
            float(config.routed_scaling_factor),
        )
        wrap: Callable[[Any], Any] = (lambda f: torch.compile(f, dynamic=False)) if compile_pieces else (lambda f: f)
        self._cast, self._attention_inputs, self._attention_output = map(
            wrap, (_cast, _attention_inputs, _attention_output)
        )
        self._dense_mlp, self._moe = map(wrap, (_dense_mlp, _moe))

    def __call__(self, ids: Tensor, quantize: bool) -> Hidden:
        """Ids int64 [num_rows, length] -> hidden states of the flattened tokens."""
        rows, length = ids.shape
        position = torch.arange(length, device=ids.device, dtype=torch.float32)
        theta = self.config.rope_parameters["rope_theta"]
        inverse = theta ** (-torch.arange(0, self.rope, 2, device=ids.device, dtype=torch.float32) / self.rope)
        angle = (position[:, None] * inverse).repeat(rows, 1)
        cos, sin = angle.cos(), angle.sin()
        valid = ids.flatten() != 0
        x = F.embedding(ids.flatten(), self.model.model.embed_tokens.weight).to(self.dtype)
        loads = []
        for layer in self.model.model.layers:
            x = self._attend(layer, x, cos, sin, rows, quantize)
            norm = layer.post_attention_layernorm.weight
            mlp = layer.mlp
            if not hasattr(mlp, "experts"):
                x = self._dense_mlp(x, norm, self._matrices(_gated_weights(mlp), quantize))
                continue
            weights = self._matrices(
                [mlp.experts.gate_up_proj, mlp.experts.down_proj, *_gated_weights(mlp.shared_experts)], quantize
            )
            x, load = self._moe(x, valid, norm, mlp.gate.weight, mlp.gate.e_score_correction_bias, weights, self.route)
            loads.append(load)
        return Hidden(_norm(x, self.model.model.norm.weight), torch.stack(loads))

    def logits(self, states: Tensor) -> Tensor:
        """States [N, H] -> float32 logits [N, vocab]."""
        return F.linear(states, self.model.lm_head.weight.to(self.dtype)).float()

    def _matrices(self, weights: list[Tensor], quantize: bool) -> list[Tensor]:
        result: list[Tensor] = self._cast(weights, quantize, self.dtype)
        return result

    def _attend(self, layer: Any, x: Tensor, cos: Tensor, sin: Tensor, rows: int, quantize: bool) -> Tensor:
        a = layer.self_attn
        norms = [layer.input_layernorm.weight, a.q_a_layernorm.weight, a.kv_a_layernorm.weight]
        projections = (a.q_a_proj, a.q_b_proj, a.kv_a_proj_with_mqa, a.kv_b_proj, a.o_proj)
        *inputs, output = self._matrices([p.weight for p in projections], quantize)
        heads = self._attention_inputs(x, cos, sin, norms, inputs, self.nope, self.rope, self.value)
        q, k, v = (t.unflatten(0, (rows, -1)).transpose(1, 2) for t in heads)
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=(self.nope + self.rope) ** -0.5)
        flat: Tensor = attended.transpose(1, 2).flatten(0, 1)
        result: Tensor = self._attention_output(x, flat, output, self.value)
        return result


def _gated_weights(mlp: Any) -> list[Tensor]:
    return [mlp.gate_proj.weight, mlp.up_proj.weight, mlp.down_proj.weight]
