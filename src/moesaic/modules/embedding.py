"""Token embedding that reads its rows from the packed matrix. It does not know which model it serves."""

from __future__ import annotations

import torch
from torch import nn

from moesaic.kernels import PackedTensor, gather_rows

__all__ = ["PackedEmbedding"]


class PackedEmbedding(nn.Module):
    """`nn.Embedding` on a packed matrix `[num_embeddings, embedding_dim]`, which a tied head may share."""

    def __init__(self, weight: PackedTensor, padding_idx: int | None = None) -> None:
        super().__init__()
        self.packed = weight
        self.num_embeddings, self.embedding_dim = weight.rows, weight.cols
        self.padding_idx = padding_idx

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Rows of int64 `input_ids [...]` as float32 `[..., embedding_dim]`."""
        return gather_rows(input_ids.reshape(-1), self.packed).view(*input_ids.shape, self.embedding_dim)

    def extra_repr(self) -> str:
        return f"{self.num_embeddings}, {self.embedding_dim}, format={self.packed.format.name}"
