"""Latent attention of long prompts on a GPU: keys and values of some heads at a time, expanded from the latents.

Absorbed, a query and a position cost `2 latent + rope` products per head; expanded they cost `nope + rope + value`,
less than a third of that with DeepSeek-V3's dimensions, and each position once `latent (nope + value)` (Liu et al.,
arXiv 2405.04434, section 2.1, without the absorption of appendix B). So it pays from a few hundred new tokens on. It
knows no model and no cache but the pool's tensor.
"""

from __future__ import annotations

import torch

from moesaic.kernels.triton.attention import paged_attention
from moesaic.kvcache.step_input import StepInput

__all__ = ["attend_expanded", "expansion_pays"]

_FROM_TOKENS = 512
_MOST_PADDING = 4  # positions per new token, where sequences of different lengths are padded to the longest
_EXPANDED_VALUES = 1 << 26  # keys and values that are there at once, of some heads


def expansion_pays(step: StepInput, max_query_len: int, block_size: int) -> bool:
    """Whether a chunk has so many new tokens of so few sequences that it costs less.

    Args:
        step: of the chunk.
        max_query_len: new tokens of a sequence, at most.
        block_size: positions of a block.
    """
    num_seqs, max_blocks = step.block_tables.shape
    is_dense = num_seqs == 1 or num_seqs * max_blocks * block_size <= _MOST_PADDING * len(step.positions)
    return max_query_len >= _FROM_TOKENS and is_dense


def attend_expanded(
    query: torch.Tensor,
    q_rope: torch.Tensor,
    k_b: torch.Tensor,
    v_b: torch.Tensor,
    pool: torch.Tensor,
    step: StepInput,
    *,
    scale: float,
    max_query_len: int,
) -> torch.Tensor:
    """What the heads attend to.

    Args:
        query: float32 `[tokens, heads, nope_dim]`, the last dimension contiguous.
        q_rope: float32 `[tokens, heads, rope_dim]`, rotated.
        k_b: `[heads, nope_dim, latent_dim]`, the key half of kv_b.
        v_b: `[heads, latent_dim, value_dim]`, the value half.
        pool: `[num_blocks, block_size, latent_dim + rope_dim]`, with the new tokens.
        step: of the chunk.
        scale: factor of the scores.
        max_query_len: new tokens of a sequence, at most.

    Returns:
        float32 `[tokens, heads, value_dim]`, contiguous.
    """
    (num_heads, nope, latent_dim), value_dim = k_b.shape, v_b.shape[2]
    num_seqs, max_blocks = step.block_tables.shape
    held = (step.seq_lens + pool.shape[1] - 1) // pool.shape[1]
    blocks = torch.where(torch.arange(max_blocks, device=pool.device) < held[:, None], step.block_tables, 0)
    here = pool[blocks.flatten().long()]  # in the order of positions, sequence after sequence
    rows = here.flatten(0, 1)
    latents, rope = rows[:, :latent_dim].to(k_b.dtype), rows[:, latent_dim:]
    tables = torch.arange(num_seqs * max_blocks, dtype=torch.int32, device=pool.device).view(num_seqs, max_blocks)
    out = query.new_empty(len(query), num_heads, value_dim)
    width = 2 * nope + rope.shape[1] + value_dim  # a product with its place among the keys
    group = min(num_heads, max(1, _EXPANDED_VALUES // (len(rows) * width)))
    for first in range(0, num_heads, group):
        some = slice(first, first + group)
        count = len(k_b[some])
        keys = pool.new_empty(*here.shape[:2], count, nope + rope.shape[1])
        places = keys.flatten(0, 1)
        places[..., :nope] = (latents @ k_b[some].flatten(0, 1).T).unflatten(1, (count, nope))
        places[..., nope:] = rope[:, None]
        values = (latents @ v_b[some].transpose(0, 1).flatten(1)).to(pool.dtype)
        paged_attention(
            query[:, some],
            keys,
            values.view(*here.shape[:2], count, value_dim),
            tables,
            step.seq_lens,
            step.query_start,
            scale=scale,
            max_query_len=max_query_len,
            q_rope=q_rope[:, some],
            out=out[:, some],
        )
    return out
