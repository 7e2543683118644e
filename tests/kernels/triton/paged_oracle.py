"""Attention over a paged cache in float64: what the kernels must compute, from keys gathered position by position."""

from __future__ import annotations

import torch
from tests.kernels.triton.conftest import DEVICE

__all__ = ["DEVICE", "Case", "attended", "error_of", "latent_attended"]


class Case:
    """Sequences of (length, new tokens) whose blocks lie in a random order in a pool that has more."""

    def __init__(self, sequences: list[tuple[int, int]], block_size: int, seed: int = 0) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        self.sequences, self.block_size = sequences, block_size
        counts = [-(-length // block_size) for length, _ in sequences]
        self.num_blocks = sum(counts) + 3
        free = (torch.randperm(self.num_blocks - 1, generator=self.generator) + 1).tolist()  # 0 is for padding
        self.block_tables = torch.zeros(len(sequences), max(counts) + 1, dtype=torch.int32)
        for row, count in enumerate(counts):
            self.block_tables[row, :count] = torch.tensor([free.pop() for _ in range(count)])
        lens = torch.tensor([length for length, _ in sequences], dtype=torch.int32)
        new = torch.tensor([0, *(count for _, count in sequences)], dtype=torch.int32)
        self.step = tuple(x.to(DEVICE) for x in (self.block_tables, lens, new.cumsum(0).int()))
        self.block_tables = self.step[0]

    @property
    def num_tokens(self) -> int:
        return sum(count for _, count in self.sequences)

    @property
    def max_query_len(self) -> int:
        return max(count for _, count in self.sequences)

    def random(self, *shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=self.generator).to(DEVICE)

    def pool(self, kv_heads: int | None, dim: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        heads = () if kv_heads is None else (kv_heads,)
        return self.random(self.num_blocks, self.block_size, *heads, dim).to(dtype)

    def gather(self, pool: torch.Tensor, row: int) -> torch.Tensor:
        """A sequence's positions in order, float64 `[length, ...]`."""
        length = self.sequences[row][0]
        slots = [
            int(self.block_tables[row, i // self.block_size]) * self.block_size + i % self.block_size
            for i in range(length)
        ]
        return pool.flatten(0, 1)[slots].double()


def attended(case, q, keys, values, scale, sliding_window=None, sinks=None, softcap=None):
    """float64 `[tokens, heads, value_dim]`."""
    group, outputs, first = q.shape[1] // keys.shape[2], [], 0
    for row, (length, count) in enumerate(case.sequences):
        own = q[first : first + count].double()
        first += count
        k, v = (case.gather(x, row).repeat_interleave(group, 1) for x in (keys, values))
        scores = torch.einsum("qhd,khd->hqk", own, k) * scale
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        positions = torch.arange(length - count, length, device=q.device)[:, None]
        index = torch.arange(length, device=q.device)[None]
        hidden = index > positions
        if sliding_window is not None:
            hidden |= index <= positions - sliding_window
        scores = scores.masked_fill(hidden, -torch.inf)
        if sinks is not None:
            scores = torch.cat([scores, sinks.double()[:, None, None].expand(-1, count, 1)], -1)
        weights = torch.softmax(scores, -1).nan_to_num(0.0)[..., :length]  # of no keys at all: nothing
        outputs.append(torch.einsum("hqk,khd->qhd", weights, v))
    return torch.cat(outputs)


def latent_attended(case, q_latent, q_rope, cache, scale):
    """The same of absorbed latent attention: one head of keys, whose first part is the value."""
    pool = cache.unsqueeze(2)
    return attended(case, torch.cat([q_latent, q_rope], -1), pool, pool[..., : q_latent.shape[-1]], scale)


def error_of(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """Largest error, in units of the largest value expected."""
    assert actual.dtype == torch.float32 and actual.shape == expected.shape
    return float((actual.double() - expected).abs().max() / expected.abs().max())
