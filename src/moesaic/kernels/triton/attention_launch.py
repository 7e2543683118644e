"""Attention over a paged cache as launches: which kernel, and how its work is cut up."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton

from moesaic.errors import KernelError
from moesaic.kernels._checks import describe
from moesaic.kernels.triton.attention_kernels import attend_kernel
from moesaic.kernels.triton.attention_tiles import LatentTiles, Tiles, choose_latent_tiles, choose_tiles, padded
from moesaic.kernels.triton.latent_attend_kernels import latent_attend_kernel
from moesaic.kernels.triton.merge import Parts, merge

__all__ = ["AttentionCall"]


@dataclass(frozen=True, slots=True, eq=False)
class AttentionCall:
    """Arguments of both kinds of attention, checked by shape and type; see `attention.paged_attention`.

    Attributes:
        queries: both parts of them, twice the same if there is one.
        pool: keys and values.
        step: block tables, lengths, and where the tokens of sequences begin.
        strides: of queries (tokens, heads), of their second part, of keys and values (blocks, slots, heads).
        kv_heads: heads of keys.
        dims: of a key, of its second part (0: none), and of a value.
        latent: whether a key's first part is the value.
        block_size: positions of a block.
        scale, max_query_len, sliding_window, sinks, softcap: see there.
    """

    queries: tuple[torch.Tensor, torch.Tensor]
    pool: tuple[torch.Tensor, torch.Tensor]
    step: tuple[torch.Tensor, torch.Tensor, torch.Tensor]
    strides: tuple[int, ...]
    kv_heads: int
    dims: tuple[int, int, int]
    latent: bool
    block_size: int
    scale: float
    max_query_len: int
    sliding_window: int | None
    sinks: torch.Tensor | None
    softcap: float | None

    def __post_init__(self) -> None:
        device, heads, num_seqs = self.pool[0].device, self.queries[0].shape[1], self.step[1].numel()
        block_tables, seq_lens, query_start = self.step
        for name, x, shape in (
            ("block_tables", block_tables, (num_seqs, *block_tables.shape[1:])),
            ("seq_lens", seq_lens, (num_seqs,)),
            ("query_start", query_start, (num_seqs + 1,)),
        ):
            if x.dtype != torch.int32 or x.shape != shape or x.device != device or x.stride(-1) != 1:
                raise KernelError(f"{name} is {describe(x)}: expected int32 {list(shape)} on {device}.")
        if self.sliding_window is not None and self.sliding_window < 1:
            raise KernelError(f"sliding_window is {self.sliding_window}: expected at least 1.")
        sinks = self.sinks
        if sinks is not None and (sinks.dtype != torch.float32 or sinks.shape != (heads,) or not sinks.is_contiguous()):
            raise KernelError(f"sinks is {describe(sinks)}: expected float32 [{heads}], contiguous.")

    @property
    def is_empty(self) -> bool:
        """Whether there is nothing to attend with."""
        return self.queries[0].shape[0] == 0 or self.step[1].numel() == 0

    def attend(self, out: torch.Tensor, tiles: Tiles | None) -> torch.Tensor:
        """All of it, into out `[tokens, heads, value_dim]`."""
        if self.is_empty:
            return out
        tiles = tiles or self._tiles()
        if tiles.splits == 1:
            self._launch(tiles, out.unsqueeze(0), out, is_split=False)
        else:
            merge(self.attend_parts(tiles), self.sinks, out=out)
        return out

    def attend_parts(self, tiles: Tiles | None) -> Parts:
        """What shares of the keys leave, sinks not among them."""
        if tiles is None and self.latent:
            tiles = self._latent_tiles()
        if tiles is None:
            tiles = self._tiles()
        q = self.queries[0]
        parts = Parts.empty(tiles.splits, q.shape[0], q.shape[1], self.dims[2], q.device)
        if self.is_empty:
            return parts
        if isinstance(tiles, LatentTiles):
            self._launch_latent(tiles, parts)
        else:
            self._launch(tiles, parts.sums, parts.logs, is_split=True)
        return parts

    def _sizes(self) -> tuple[int, int]:
        """Rows of a program's column, and positions that one of them can see."""
        rows = self.max_query_len * (self.queries[0].shape[1] // self.kv_heads)
        longest = self.step[0].shape[1] * self.block_size
        if self.sliding_window is not None:
            longest = min(longest, self.sliding_window + self.max_query_len)
        return rows, longest

    def _tiles(self) -> Tiles:
        rows, longest = self._sizes()
        sizes = tuple(padded(dim) if dim else 0 for dim in self.dims)
        keys, columns = self.pool[0], len(self.step[1]) * self.kv_heads
        return choose_tiles(rows, columns, longest, sizes, keys.dtype, keys.device, self.latent)

    def _latent_tiles(self) -> LatentTiles | None:
        """Where the kernel for few tokens has no restriction that matters: whole rows, whole tiles in a block."""
        is_plain = self.sliding_window is None and not self.softcap and all(q.is_contiguous() for q in self.queries)
        if not is_plain:
            return None
        rows, longest = self._sizes()
        dims, cache = (padded(self.dims[0]), padded(self.dims[1])), self.pool[0]
        heads, columns = self.queries[0].shape[1], len(self.step[1])
        tiles = choose_latent_tiles(heads, rows, columns, longest, dims, cache.dtype, cache.device)
        return None if tiles is None or self.block_size % tiles.keys else tiles

    def _launch_latent(self, tiles: LatentTiles, parts: Parts) -> None:
        (latent_dim, rope_dim, _), cache = self.dims, self.pool[0]
        num_tokens, heads = self.queries[0].shape[:2]
        rows = triton.cdiv(self.max_query_len * heads, tiles.rows)
        latent_attend_kernel[(rows, len(self.step[1]), tiles.splits)](
            *self.queries,
            cache,
            *self.step,
            parts.sums,
            parts.logs,
            self.scale,
            cache.stride(0),
            self.step[0].stride(0),
            num_tokens,
            tiles.splits,
            tiles.few,
            HEADS=heads,
            LATENT_DIM=latent_dim,
            LATENT_PAD=padded(latent_dim),
            ROPE_DIM=rope_dim,
            ROPE_PAD=padded(rope_dim),
            CACHE_SLOT=cache.stride(1),
            BLOCK_SIZE=self.block_size,
            BLOCK_M=tiles.rows,
            FEW_M=tiles.few_rows,
            BLOCK_N=tiles.keys,
            STAGES=tiles.stages,
            num_warps=tiles.warps,
        )

    def _launch(
        self,
        tiles: Tiles,
        target: torch.Tensor,
        logs: torch.Tensor,
        *,
        is_split: bool,
    ) -> None:
        q = self.queries[0]
        num_tokens, heads = q.shape[:2]
        group, (key_dim, rope_dim, value_dim) = heads // self.kv_heads, self.dims
        rows = triton.cdiv(self.max_query_len * group, tiles.rows)
        attend_kernel[(rows, len(self.step[1]) * self.kv_heads, tiles.splits)](
            *self.queries,
            *self.pool,
            *self.step,
            q if self.sinks is None else self.sinks,
            target,
            logs,
            self.scale,
            self.softcap or 0.0,
            self.sliding_window or 0,
            *self.strides,
            self.step[0].stride(0),
            *target.stride()[:3],
            num_tokens * heads,
            tiles.splits,
            GROUP=group,
            KV_HEADS=self.kv_heads,
            KEY_DIM=key_dim,
            KEY_PAD=padded(key_dim),
            ROPE_DIM=rope_dim,
            ROPE_PAD=padded(rope_dim),
            VALUE_DIM=value_dim,
            VALUE_PAD=padded(value_dim),
            BLOCK_SIZE=self.block_size,
            BLOCK_M=tiles.rows,
            BLOCK_N=tiles.keys,
            IS_SPLIT=is_split,
            WINDOWED=self.sliding_window is not None,
            SOFTCAP=bool(self.softcap),
            SINKS=self.sinks is not None and not is_split,
            LATENT=self.latent,
            num_warps=tiles.warps,
            num_stages=tiles.stages,
        )
