"""Attention over a paged cache as launches: one for all shares of the keys, or one for each kind of tile."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton

from moesaic.errors import KernelError
from moesaic.kernels._checks import describe
from moesaic.kernels.triton.attention_kernels import attend_kernel
from moesaic.kernels.triton.attention_tiles import Tiles, choose_short_tiles, choose_tiles, padded
from moesaic.kernels.triton.merge import Parts, merge

__all__ = ["AttentionCall"]

_ANY_LENGTH = (1 << 31) - 1


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
            merge(self.parts((tiles,)), self.sinks, out=out)
        return out

    def attend_parts(self, tiles: Tiles | None) -> Parts:
        """What shares of the keys leave, sinks not among them."""
        if tiles is not None or self.is_empty:
            return self.parts(() if tiles is None else (tiles,))
        short = None
        if self.latent and self.sliding_window is None:
            rows, longest = self._sizes()
            short = choose_short_tiles(rows, len(self.step[1]), longest, self.pool[0].dtype, self.pool[0].device)
        if short is None:
            return self.parts((self._tiles(),))
        few, most = short
        return self.parts((few,) if longest <= most else (few, self._tiles()), most)

    def parts(self, tiles: tuple[Tiles, ...], most: int = 0) -> Parts:
        """The same, with the tiles of all sequences; or those of sequences of up to `most` keys, and of the others."""
        q, value_dim = self.queries[0], self.dims[2]
        splits = max((each.splits for each in tiles), default=1)
        parts = Parts.empty(splits, q.shape[0], q.shape[1], value_dim, q.device)
        if len(tiles) == 1:
            self._launch(tiles[0], parts.sums, parts.logs, is_split=True)
        elif tiles:
            self._launch(tiles[0], parts.sums, parts.logs, is_split=True, up_to=most)
            self._launch(tiles[1], parts.sums, parts.logs, is_split=True, above=most)
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

    def _launch(
        self,
        tiles: Tiles,
        target: torch.Tensor,
        logs: torch.Tensor,
        *,
        is_split: bool,
        above: int = -1,
        up_to: int = _ANY_LENGTH,
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
            len(target),
            above,
            up_to,
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
            SINKS=self.sinks is not None,
            LATENT=self.latent,
            num_warps=tiles.warps,
            num_stages=tiles.stages,
        )
