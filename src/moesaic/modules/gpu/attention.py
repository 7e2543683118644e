"""Grouped-query and latent attention of a decoder layer on a GPU, on a paged cache.

Both are `attention(norm(x))`, which the layer scales and adds to x together with the next norm. They are made from what
the CPU has of them (`modules.gqa`, `modules.mla`), whose structure and options they share.
"""

from __future__ import annotations

from typing import Any

import torch

from moesaic.errors import UnsupportedModelError
from moesaic.kernels.block_parts import HeadLinears, Linear, Norm
from moesaic.kernels.triton.activations import Lanes
from moesaic.kernels.triton.attention import (
    attention_parts,
    latent_attention_parts,
    paged_attention,
    paged_latent_attention,
)
from moesaic.kernels.triton.combine_norm import NormBefore
from moesaic.kernels.triton.elementwise import gate_heads_
from moesaic.kernels.triton.latent import MAX_LATENT_TOKENS, absorb_and_append, latent_values
from moesaic.kernels.triton.merge import fits_lanes, merge
from moesaic.kernels.triton.rotary import latent_rotate_append, norm_rotate_append
from moesaic.kvcache.paged import KvShape
from moesaic.modules.delta_net import DeltaNetParts
from moesaic.modules.gpu.delta_net import GpuDeltaNet
from moesaic.modules.gpu.expanded_latents import attend_expanded, expansion_pays
from moesaic.modules.gpu.step import GpuStep
from moesaic.modules.gpu.weights import GpuLinear, GpuLinears, GpuNorm, dense_heads
from moesaic.modules.gqa import GqaParts
from moesaic.modules.mla import MlaAttention, latent_heads_at_once
from moesaic.modules.windows import sliding_window_of

__all__ = ["GpuAttention", "GpuGqaAttention", "GpuMlaAttention", "gpu_attention"]


class GpuGqaAttention:
    """Grouped-query attention, perhaps with a gate on what heads attended to.

    Args:
        source: its parts on the CPU.
        config: the model's configuration, for the window.
        device: the GPU.
    """

    def __init__(self, source: GqaParts, config: Any, device: torch.device) -> None:
        self.layer_idx = source.layer_idx
        self.norm = GpuNorm.of(source.norm, device)
        self.qkv = GpuLinears.of(source.projections, device)
        self.o = GpuLinear.of(source.output, device)
        self.output_gate, self.head_norm = source.output_gate, source.head_norm
        self.q_norm = None if source.q_norm is None else GpuNorm.of(source.q_norm, device)
        self.k_norm = None if source.k_norm is None else GpuNorm.of(source.k_norm, device)
        self.sinks = None if source.sinks is None else source.sinks.detach().float().to(device)
        self.head_dim, self.scaling, self.rope_layout = source.head_dim, source.scaling, source.rope_layout
        self.residual_scale = source.residual_scale
        self.sliding_window = sliding_window_of(config, self.layer_idx)
        _, key_rows, value_rows = self.qkv.rows
        kv_heads = key_rows // self.head_dim
        self.cache_shape = KvShape(kv_heads, self.head_dim, value_rows // kv_heads)

    @property
    def norm_before(self) -> NormBefore | None:
        """See `GpuNorm.before`."""
        return self.norm.before(self.qkv.form)

    @property
    def weights(self) -> list[torch.Tensor]:
        """What is read in every step, in order."""
        return [self.norm.weight, *self.qkv.data, self.o.weight.data]

    def __call__(self, x: torch.Tensor, step: GpuStep, normed: Lanes | None = None) -> torch.Tensor:
        """What is to be added to x, float32 `[tokens, hidden_size]`, contiguous; not yet scaled.

        `normed` is x after the norm, if somebody has made it as `norm_before` says.
        """
        rows = self.norm(x, self.qkv.form) if normed is None else normed
        q, k, v = (part.unflatten(1, (-1, self.head_dim)) for part in self.qkv(rows))
        gate = None
        if self.output_gate:  # every head has a query and then its gate
            q, gate = q[:, ::2], q[:, 1::2]
        pool, where = step.pool(self.layer_idx), step.input
        assert pool.values is not None
        query = norm_rotate_append(
            q,
            k,
            v,
            step.angles,
            where.positions,
            pool.keys,
            pool.values,
            where.slot_mapping,
            layout=self.rope_layout,
            norm=self.head_norm,
            q_norm=None if self.q_norm is None else self.q_norm.weight,
            k_norm=None if self.k_norm is None else self.k_norm.weight,
            eps=0.0 if self.q_norm is None else self.q_norm.eps,
        )
        attended = self._attended(query, step)
        if isinstance(attended, Lanes):
            return self.o(attended)
        if gate is not None:
            gate_heads_(attended, gate)
        return self.o(attended.view(len(x), -1))

    def _attended(self, query: torch.Tensor, step: GpuStep) -> torch.Tensor | Lanes:
        """Of few tokens in the order in which the output matrix reads them, if that is possible."""
        pool, where = step.pool(self.layer_idx), step.input
        assert pool.values is not None
        arguments = query, pool.keys, pool.values, where.block_tables, where.seq_lens, where.query_start
        options: dict[str, Any] = {"scale": self.scaling, "max_query_len": step.max_query_len}
        options["sliding_window"] = self.sliding_window
        if not self.output_gate and fits_lanes(self.o.form, len(query), query.shape[1], pool.values.shape[3]):
            return merge(attention_parts(*arguments, **options), self.sinks, form=self.o.form)
        return paged_attention(*arguments, sinks=self.sinks, **options)


class GpuMlaAttention:
    """Latent attention: absorbed, so that keys and values are never expanded, but in long chunks of prompts.

    Args:
        source: its equal on the CPU.
        device: the GPU.
        dtype: of the expanded halves of `kv_b_proj`.
    """

    def __init__(self, source: MlaAttention, device: torch.device, dtype: torch.dtype = torch.bfloat16) -> None:
        block, module = source.block, source.module
        if block is None:
            raise UnsupportedModelError(f"layer {source.layer_idx}: its input norm is none that the kernels know.")
        self.layer_idx = source.layer_idx
        self.norm = GpuNorm.of(Norm(source.norm.weight, source.norm.eps), device)
        low_rank = getattr(module, "q_a_proj", None) is not None
        first = module.q_a_proj if low_rank else module.q_proj
        compress = module.kv_a_proj_with_mqa
        self.first = GpuLinears.of([Linear(part.packed, part.bias) for part in (first, compress)], device)
        self.q_a_norm = _norm(module.q_a_layernorm, device) if low_rank else None
        self.q_b = _linear(module.q_b_proj, device) if low_rank else None
        self.kv_a_norm = _norm(module.kv_a_layernorm, device)
        self.residual_scale = 1.0
        self.o = _linear(module.o_proj, device)
        self.num_heads, self.scaling, self.rope_layout = source.num_heads, source.scaling, source.rope_layout
        self.nope_dim, self.rope_dim, self.latent_dim = source.nope_dim, source.rope_dim, source.latent_dim
        self.k_b, self.v_b = _halves(source, device, dtype)
        self.cache_shape = KvShape.latent(self.latent_dim, self.rope_dim)

    @property
    def norm_before(self) -> NormBefore | None:
        """See `GpuNorm.before`."""
        return self.norm.before(self.first.form)

    @property
    def weights(self) -> list[torch.Tensor]:
        """What is read in every step, in order, up to what is large."""
        second = [] if self.q_a_norm is None or self.q_b is None else [self.q_a_norm.weight, self.q_b.weight.data]
        return [self.norm.weight, *self.first.data, self.kv_a_norm.weight, *second, self.k_b, self.v_b]

    def __call__(self, x: torch.Tensor, step: GpuStep, normed: Lanes | None = None) -> torch.Tensor:
        """What is to be added to x, float32 `[tokens, hidden_size]`, contiguous; not yet scaled.

        `normed` is x after the norm, if somebody has made it as `norm_before` says.
        """
        tokens, pool, where = len(x), step.pool(self.layer_idx), step.input
        query, compressed = self.first(self.norm(x, self.first.form) if normed is None else normed)
        if self.q_b is not None and self.q_a_norm is not None:
            query = self.q_b(self.q_a_norm(query, self.q_b.form))
        heads = query.unflatten(1, (self.num_heads, -1))
        if tokens <= MAX_LATENT_TOKENS:
            return self._decode(heads, compressed, step)
        q_rope = latent_rotate_append(
            compressed,
            heads[..., self.nope_dim :],
            step.angles,
            where.positions,
            pool.keys,
            where.slot_mapping,
            self.kv_a_norm.weight,
            self.kv_a_norm.eps,
            layout=self.rope_layout,
        )
        if expansion_pays(where, step.max_query_len, pool.keys.shape[1]):
            values = attend_expanded(
                heads[..., : self.nope_dim],
                q_rope,
                self.k_b,
                self.v_b,
                pool.keys,
                where,
                scale=self.scaling,
                max_query_len=step.max_query_len,
            )
            return self.o(values.view(tokens, -1))
        group = latent_heads_at_once(tokens, self.num_heads, self.latent_dim)
        if group == self.num_heads:
            return self.o(self._attend(heads, q_rope, slice(None), step).reshape(tokens, -1))
        values = heads.new_empty(tokens, self.num_heads, self.v_b.shape[2])
        for first in range(0, self.num_heads, group):
            some = slice(first, first + group)
            values[:, some] = self._attend(heads, q_rope, some, step)
        return self.o(values.view(tokens, -1))

    def _decode(self, heads: torch.Tensor, compressed: torch.Tensor, step: GpuStep) -> torch.Tensor:
        """Of few tokens: queries `[tokens, heads, nope + rope]`, latents and rotary keys not yet normed and rotated."""
        pool, where = step.pool(self.layer_idx), step.input
        q_latent, q_rope = absorb_and_append(
            heads,
            compressed,
            self.k_b,
            step.angles,
            where.positions,
            pool.keys,
            where.slot_mapping,
            self.kv_a_norm.weight,
            self.kv_a_norm.eps,
            layout=self.rope_layout,
        )
        parts = latent_attention_parts(
            q_latent,
            q_rope,
            pool.keys,
            where.block_tables,
            where.seq_lens,
            where.query_start,
            scale=self.scaling,
            max_query_len=step.max_query_len,
        )
        if fits_lanes(self.o.form, len(heads), self.num_heads, self.v_b.shape[2]):
            return self.o(latent_values(merge(parts), self.v_b, form=self.o.form))
        return self.o(latent_values(merge(parts), self.v_b).view(len(heads), -1))

    def _attend(self, heads: torch.Tensor, q_rope: torch.Tensor, some: slice, step: GpuStep) -> torch.Tensor:
        """What some heads attend to: queries `[tokens, heads, nope + rope]` to values `[tokens, some heads, value]`."""
        where = step.input
        mixed = paged_latent_attention(
            self._per_head(heads[:, some, : self.nope_dim], self.k_b[some]),
            q_rope[:, some],
            step.pool(self.layer_idx).keys,
            where.block_tables,
            where.seq_lens,
            where.query_start,
            scale=self.scaling,
            max_query_len=step.max_query_len,
        )
        return self._per_head(mixed, self.v_b[some])

    @staticmethod
    def _per_head(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """`[tokens, heads, in]` times `[heads, in, out]`: float32 `[tokens, heads, out]`."""
        product = torch.bmm(x.transpose(0, 1).to(weight.dtype), weight)
        return product.transpose(0, 1).float().contiguous()


GpuAttention = GpuGqaAttention | GpuMlaAttention | GpuDeltaNet
"""Whatever stands in the place of attention in a layer."""


def _halves(source: MlaAttention, device: torch.device, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """`kv_b_proj` as `[heads, nope, latent]` and `[heads, latent, value]`."""
    heads, nope = source.num_heads, source.nope_dim
    if source.split is None:
        kv_b = source.module.kv_b_proj.packed
        k_b = dense_heads(HeadLinears(kv_b, slice(0, nope)), heads, device, dtype)
        v_b = dense_heads(HeadLinears(kv_b, slice(nope, nope + source.value_dim)), heads, device, dtype)
    else:
        stored, values = source.split
        k_b = dense_heads(HeadLinears(stored, slice(None)), heads, device, dtype).transpose(1, 2).contiguous()
        v_b = dense_heads(HeadLinears(values, slice(None)), heads, device, dtype)
    return k_b, v_b.transpose(1, 2).contiguous()


def _linear(projection: Any, device: torch.device) -> GpuLinear:
    return GpuLinear.of(Linear(projection.packed, projection.bias), device)


def _norm(norm: Any, device: torch.device) -> GpuNorm:
    return GpuNorm.of(Norm(norm.weight, norm.eps), device)


def gpu_attention(
    source: GqaParts | MlaAttention | DeltaNetParts, config: Any, device: torch.device, dtype: torch.dtype
) -> GpuAttention:
    """The same attention on a GPU; `dtype` is that of expanded matrices."""
    if isinstance(source, MlaAttention):
        return GpuMlaAttention(source, device, dtype)
    if isinstance(source, DeltaNetParts):
        return GpuDeltaNet(source, device)
    return GpuGqaAttention(source, config, device)
