"""What a model does before its first layer and behind its last one, with the factors that some families have there.

Whoever runs the layers itself, on the CPU or on a GPU, takes the ends from here.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from moesaic.errors import UnsupportedModelError
from moesaic.kernels import gather_rows
from moesaic.modules.embedding import PackedEmbedding
from moesaic.modules.linear import PackedLinear
from moesaic.modules.norm import RMSNorm

__all__ = ["DecoderEnds"]


@dataclass(frozen=True, slots=True, eq=False)
class DecoderEnds:
    """Embedding, last norm and head of a loaded model.

    Attributes:
        embedding: of tokens.
        embedding_scale: its factor.
        norm: behind the last layer.
        head: makes logits.
        logit_scale: their factor.
        vocab_size: number of logits.
    """

    embedding: PackedEmbedding
    embedding_scale: float
    norm: RMSNorm
    head: PackedLinear
    logit_scale: float
    vocab_size: int

    @classmethod
    def of(cls, model: Any) -> DecoderEnds:
        """From a loaded causal language model.

        Raises:
            UnsupportedModelError: a part is not what is known here.
        """
        config = model.config.get_text_config()
        embedding, norm, head = model.get_input_embeddings(), model.get_decoder().norm, model.get_output_embeddings()
        expected = (
            (norm, RMSNorm, "last norm"),
            (embedding, PackedEmbedding, "embedding"),
            (head, PackedLinear, "head"),
        )
        for module, kind, name in expected:
            if not isinstance(module, kind):
                raise UnsupportedModelError(
                    f"{type(model).__name__}: its {name} is a {type(module).__name__}, expected {kind.__name__}: the "
                    "model runs neither on a GPU nor on a paged cache; use the plan 'cpu', one request at a time."
                )
        if getattr(config, "final_logit_softcapping", None) is not None:
            raise UnsupportedModelError(
                f"{type(model).__name__}: its logits are capped, which runs neither on a GPU nor on a paged cache; use "
                "the plan 'cpu', one request at a time."
            )
        return cls(
            embedding,
            float(getattr(config, "embedding_multiplier", 1.0)),
            norm,
            head,
            1.0 / float(getattr(config, "logits_scaling", 1.0)),
            int(head.packed.rows),
        )

    def embed(self, token_ids: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
        """Hidden states of int64 `[tokens]`: float32 `[tokens, hidden_size]`, in `out` or memory of their own."""
        hidden = gather_rows(token_ids, self.embedding.packed, out=out)
        return hidden if self.embedding_scale == 1.0 else hidden.mul_(self.embedding_scale)

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Last norm and head: float32 `[tokens, hidden_size]` to `[tokens, vocab_size]`."""
        logits: torch.Tensor = self.head(self.norm(hidden))
        return logits if self.logit_scale == 1.0 else logits * self.logit_scale
