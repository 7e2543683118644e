"""Multi-head latent attention on the latent cache, absorbed: keys and values are never expanded in decode.

Every MLA module of the model library has the same parts (`kv_a_proj_with_mqa`, `kv_a_layernorm`, `kv_b_proj` or its two
halves), so one forward serves all of them (Liu et al., arXiv 2405.04434, section 2.1). With `W_uk` and `W_uv` the
halves of `kv_b_proj`, the score of head h is `(W_uk_h^T q_h) . latent + q_rope_h . k_rope` and its output is
`W_uv_h (sum of p * latent)`. The cache holds latents and rotary keys, as in transformers.
"""

from __future__ import annotations

from typing import Any

import torch

from moesaic.kernels import PackedTensor, linear, linear_heads, linear_multi, linear_transposed_heads, ops
from moesaic.kernels.blocks import HeadLinears, LatentAttentionBlock, Linear, Norm
from moesaic.kernels.ops import rms_norm
from moesaic.kvcache import GrowingCache, GrowingLayer, given_cache
from moesaic.modules.families import RopeLayout, StockModule
from moesaic.modules.linear import PackedLinear
from moesaic.modules.norm import RMSNorm
from moesaic.modules.rotary import RotaryAngles

__all__ = ["SPLIT_KV_B", "MlaAttention", "latent_heads_at_once"]

_LATENT_FLOATS = 1 << 26  # of queries multiplied by the key half of kv_b

SPLIT_KV_B = "moesaic_kv_b"
"""Attribute of an attention module that holds (k_b, v_b), packed per head, where the file stores them apart."""


class MlaAttention:
    """`x + attention(norm(x))`, like `GqaAttention`; without norm and residual it is the forward of the stock module.

    Args:
        module: the stock attention module, its projections and norms replaced.
        norm: of its input.
        rope_layout: see `families`.
        angles: of the model's rotary embedding.
    """

    def __init__(self, module: Any, norm: StockModule, rope_layout: RopeLayout, angles: RotaryAngles) -> None:
        self.norm = norm
        self.angles = angles
        self.module, self.layer_idx = module, module.layer_idx
        self.rope_layout: RopeLayout = rope_layout
        self.num_heads, self.scaling = module.num_heads, module.scaling
        self.nope_dim, self.rope_dim = module.qk_nope_head_dim, module.qk_rope_head_dim
        self.latent_dim, self.value_dim = module.kv_lora_rank, module.v_head_dim
        self.split: tuple[PackedTensor, PackedTensor] | None = getattr(module, SPLIT_KV_B, None)
        self.block = self._block(norm) if isinstance(norm, RMSNorm) else None

    def _block(self, norm: RMSNorm) -> LatentAttentionBlock:
        """All of it as one native call, for the absorbed form."""
        module, low_rank = self.module, getattr(self.module, "q_a_proj", None) is not None
        value_rows = slice(self.nope_dim, self.nope_dim + self.value_dim)
        if self.split is None:
            kv_b = module.kv_b_proj.packed
            k_b, v_b = HeadLinears(kv_b, slice(0, self.nope_dim)), HeadLinears(kv_b, value_rows)
        else:
            k_b, v_b = (HeadLinears(part, slice(None)) for part in self.split)
        return LatentAttentionBlock(
            norm=Norm(norm.weight, norm.eps),
            q_a=_linear(module.q_a_proj) if low_rank else None,
            q_a_norm=_norm(module.q_a_layernorm) if low_rank else None,
            q_b=_linear(module.q_b_proj if low_rank else module.q_proj),
            kv_a=_linear(module.kv_a_proj_with_mqa),
            kv_a_norm=_norm(module.kv_a_layernorm),
            k_b=k_b,
            v_b=v_b,
            o=_linear(module.o_proj),
            num_heads=self.num_heads,
            nope_dim=self.nope_dim,
            rope_dim=self.rope_dim,
            scale=self.scaling,
            k_b_transposed=self.split is None,
            rope_layout=self.rope_layout,
        )

    @classmethod
    def of(
        cls, module: StockModule, norm: StockModule, rope_layout: RopeLayout, angles: RotaryAngles
    ) -> MlaAttention | None:
        """From a stock module whose weights are packed; None if it is no MLA."""
        names = ["kv_a_proj_with_mqa", "o_proj"]
        names += ["q_proj"] if getattr(module, "q_a_proj", None) is None else ["q_a_proj", "q_b_proj"]
        names += [] if hasattr(module, SPLIT_KV_B) else ["kv_b_proj"]
        if not all(isinstance(getattr(module, name, None), PackedLinear) for name in names):
            return None
        return cls(module, norm, rope_layout, angles) if isinstance(module.kv_a_layernorm, RMSNorm) else None

    def take_over(self) -> None:
        """Serve as the stock module's forward too, for layers that are not fused as a whole."""
        self.module.forward = self._stock_call

    def _stock_call(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: Any,
        attention_mask: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, None]:
        """The interface of attention modules in transformers; there are no attention weights to return."""
        batch, _, width = hidden_states.shape
        flat = hidden_states.reshape(-1, width)
        out = self.attend(flat, batch, position_embeddings, attention_mask, given_cache(kwargs))
        return out.view(batch, -1, out.shape[-1]), None

    def __call__(self, x: torch.Tensor, positions: Any, mask: torch.Tensor | None, cache: Any | None) -> torch.Tensor:
        """Attend; arguments as those of `GqaAttention`."""
        layer = self.growing_layer(x, cache)
        if layer is not None and self.block is not None:
            latents, rotary_keys, num_past = self.reserve(x, layer)
            out = self.block(x.contiguous(), *self.angles(positions), latents, rotary_keys, num_past, mask)
            layer.advance(x.shape[1])
            return out
        normed = self.norm(x).view(-1, x.shape[-1])
        out = self.attend(normed, x.shape[0], positions, mask, cache).view(x.shape)
        return ops.add_scaled_(out, x)

    def growing_layer(self, x: torch.Tensor, cache: Any | None) -> GrowingLayer | None:
        """As that of `GqaAttention`."""
        layer = cache.layers[self.layer_idx] if isinstance(cache, GrowingCache) else None
        serves = self.block is not None and isinstance(layer, GrowingLayer) and not self._expanding_pays(x.shape[1])
        return layer if serves else None

    def reserve(self, x: torch.Tensor, layer: GrowingLayer) -> tuple[torch.Tensor, torch.Tensor, int]:
        """Latents and rotary keys with room for those of x, and how many are there."""
        return layer.reserve(x, 1, self.latent_dim, self.rope_dim)

    def attend(
        self, x: torch.Tensor, batch: int, positions: Any, mask: torch.Tensor | None, cache: Any | None
    ) -> torch.Tensor:
        """Attend, without norm and residual.

        Args:
            x: float32 `[batch * num_tokens, hidden_size]`, normalised.
            batch: rows of the batch.
            positions: the model's position embeddings.
            mask: see `attention`.
            cache: where latents and rotary keys go and come from, or None.

        Returns:
            float32 `[batch * num_tokens, hidden_size]`, in memory of its own.
        """
        query, latent, k_rope = self._project(x, batch)
        q_rope = query[..., self.nope_dim :]
        cos, sin = self.angles(positions)
        ops.norm_and_rotate_(q_rope, k_rope, cos, sin, layout=self.rope_layout)
        if cache is not None:
            latent, k_rope = cache.update(latent, k_rope, self.layer_idx)
        attend = self._attend_expanded if self._expanding_pays(query.shape[2]) else self._attend_absorbed
        attended = attend(query, latent, k_rope, mask)
        return linear(attended.view(x.shape[0], -1), self.module.o_proj.packed, self.module.o_proj.bias)

    def _project(self, x: torch.Tensor, batch: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Queries `[batch, heads, tokens, nope + rope]`, latents and rotary keys `[batch, 1, tokens, dim]`."""
        module, num_tokens = self.module, x.shape[0] // batch
        first = module.q_proj if getattr(module, "q_a_proj", None) is None else module.q_a_proj
        compress = module.kv_a_proj_with_mqa
        query, compressed = linear_multi(x, [first.packed, compress.packed], [first.bias, compress.bias])
        if first is not module.q_proj:
            norm = module.q_a_layernorm
            query = linear(rms_norm(query, norm.weight, norm.eps), module.q_b_proj.packed, module.q_b_proj.bias)
        norm = module.kv_a_layernorm
        latent = rms_norm(compressed[:, : self.latent_dim], norm.weight, norm.eps)
        return (
            query.view(batch, num_tokens, self.num_heads, -1).transpose(1, 2),
            latent.view(batch, 1, num_tokens, self.latent_dim),
            compressed.view(batch, 1, num_tokens, -1)[..., self.latent_dim :],
        )

    def _expanding_pays(self, num_queries: int) -> bool:
        """Whether the products saved by expanding all keys exceed those that expanding takes (counted per key)."""
        expanded = self.nope_dim + self.rope_dim + self.value_dim
        absorbed = 2 * self.latent_dim + self.rope_dim
        return bool(num_queries * (absorbed - expanded) > self.latent_dim * (self.nope_dim + self.value_dim))

    def _attend_absorbed(
        self, query: torch.Tensor, latent: torch.Tensor, k_rope: torch.Tensor, mask: torch.Tensor | None
    ) -> torch.Tensor:
        q_latent = self._absorb(query[..., : self.nope_dim])
        mixed = ops.mla_attention(
            q_latent,
            query[..., self.nope_dim :],
            latent[:, 0],
            k_rope[:, 0],
            scale=self.scaling,
            causal_offset=latent.shape[2] - query.shape[2] if mask is None else None,
            mask=mask,
        )
        return self._values_of(mixed)

    def _attend_expanded(
        self, query: torch.Tensor, latent: torch.Tensor, k_rope: torch.Tensor, mask: torch.Tensor | None
    ) -> torch.Tensor:
        batch, _, num_keys, _ = latent.shape
        k_nope, value = (
            part.reshape(batch, num_keys, self.num_heads, -1).transpose(1, 2)
            for part in self._expand(latent.reshape(-1, self.latent_dim).float())
        )
        key = torch.cat([k_nope, k_rope.float().expand(-1, self.num_heads, -1, -1)], -1)
        return ops.attention(
            query,
            key,
            value,
            scale=self.scaling,
            causal_offset=num_keys - query.shape[2] if mask is None else None,
            mask=mask,
        )

    def _expand(self, latent: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys (without rotary part) and values of all heads, `[positions, heads, dim]` each."""
        if self.split is None:
            expanded = linear(latent, self.module.kv_b_proj.packed).view(latent.shape[0], self.num_heads, -1)
            return expanded[..., : self.nope_dim], expanded[..., self.nope_dim :]
        per_head = latent.unsqueeze(1).expand(-1, self.num_heads, -1)
        k_b, v_b = self.split
        return linear_transposed_heads(per_head, k_b), linear_heads(per_head, v_b)

    def _absorb(self, q_nope: torch.Tensor) -> torch.Tensor:
        """`W_uk_h^T q_h`: `[batch, heads, tokens, nope]` to `[batch, heads, tokens, latent]`."""
        batch, _, num_tokens, _ = q_nope.shape
        rows = q_nope.transpose(1, 2).flatten(0, 1)
        if self.split is None:
            absorbed = linear_transposed_heads(rows, self.module.kv_b_proj.packed, slice(0, self.nope_dim))
        else:
            absorbed = linear_heads(rows, self.split[0])
        return absorbed.view(batch, num_tokens, self.num_heads, -1).transpose(1, 2)

    def _values_of(self, mixed: torch.Tensor) -> torch.Tensor:
        """`W_uv_h m_h`: `[batch, heads, tokens, latent]` to `[batch, tokens, heads, value]`."""
        rows = mixed.transpose(1, 2).flatten(0, 1)
        if self.split is None:
            value_rows = slice(self.nope_dim, self.nope_dim + self.value_dim)
            values = linear_heads(rows, self.module.kv_b_proj.packed, value_rows)
        else:
            values = linear_heads(rows, self.split[1])
        return values.view(mixed.shape[0], mixed.shape[2], self.num_heads, -1)


def _linear(projection: PackedLinear) -> Linear:
    return Linear(projection.packed, projection.bias)


def _norm(norm: RMSNorm) -> Norm:
    return Norm(norm.weight, norm.eps)


def latent_heads_at_once(num_tokens: int, num_heads: int, latent_dim: int) -> int:
    """How many heads a GPU attends with at once, so that queries on latents of many tokens stay within 256 MiB."""
    return max(1, min(num_heads, _LATENT_FLOATS // (num_tokens * latent_dim)))
