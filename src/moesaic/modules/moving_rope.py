"""Rotary angles that change with the length of a sequence: dynamic NTK scaling, LongRoPE's two sets of frequencies.

The model library chooses the frequencies of a forward by the largest position in it, for all tokens of that forward,
and never turns keys again that a cache holds already. So a lone prompt that goes through in one forward has the
frequencies of its own length, and every token behind it those of the length that it makes. That is what holds here for
every sequence, however its prompt is cut and whoever else is in the step: the token at position p of a sequence whose
prompt has P tokens is rotated by the frequencies of length max(P, p + 1). It knows rotary modules of the model library,
and of sequences only these two numbers.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from moesaic.errors import UnsupportedModelError
from moesaic.modules.rotary import MOVING_ROPES, Angles, RotaryAngles, position_angles, rope_type_of

__all__ = ["FixedAngles", "MovingAngles", "angles_for"]

_BLOCK = 64
"""Positions that are computed together, always at the same places: the end of a tensor may be rounded otherwise."""


class FixedAngles:
    """Angles that are the same for sequences of all lengths.

    Args:
        rotary_embedding: of the model.
        max_positions: positions that they are kept for.

    Attributes:
        shared_positions: None, as keys of a position do not depend on how long the prompt is.
    """

    shared_positions: int | None = None

    def __init__(self, rotary_embedding: Any, max_positions: int) -> None:
        self._cos, self._sin = position_angles(rotary_embedding, max_positions)

    @property
    def tables(self) -> Angles:
        """Angles by position, float32 `[max_positions, num_pairs]` each."""
        return self._cos, self._sin

    def in_tables(self, position: int, prompt_length: int) -> bool:
        """Whether the angles of a token are those of its position in the tables."""
        return True

    def __call__(self, positions: torch.Tensor, query_start: torch.Tensor, prompt_lengths: Sequence[int]) -> Angles:
        """Of the tokens of a step.

        Args:
            positions: int64 `[tokens]`.
            query_start: int32 `[seqs + 1]`: tokens `query_start[s]` to `query_start[s + 1]` are of sequence s.
            prompt_lengths: of each sequence.

        Returns:
            float32 `[tokens, num_pairs]` each, contiguous.
        """
        return self._cos.index_select(0, positions), self._sin.index_select(0, positions)


class MovingAngles:
    """Angles by position and by the length of the prompt.

    Args:
        rotary_embedding: of the model; it is not changed.
        max_positions: positions that angles of tokens behind a prompt are kept for.

    Attributes:
        shared_positions: so many first positions of prompts that are no longer have the same keys in all of them.

    Raises:
        UnsupportedModelError: the module computes angles in another way than is known here.
    """

    def __init__(self, rotary_embedding: Any, max_positions: int) -> None:
        self._frequencies = _Frequencies(rotary_embedding)
        self.shared_positions: int | None = self._frequencies.unchanged
        positions = torch.arange(max_positions)
        self._cos, self._sin = self._frequencies.angles(positions, positions + 1)
        self._check(rotary_embedding, max_positions)

    @property
    def tables(self) -> Angles:
        """As `FixedAngles`; of tokens behind a prompt."""
        return self._cos, self._sin

    def in_tables(self, position: int, prompt_length: int) -> bool:
        """As `FixedAngles`."""
        return position >= prompt_length or prompt_length <= self._frequencies.unchanged

    def __call__(self, positions: torch.Tensor, query_start: torch.Tensor, prompt_lengths: Sequence[int]) -> Angles:
        """As `FixedAngles`."""
        cos, sin = self._cos.index_select(0, positions), self._sin.index_select(0, positions)
        starts = query_start.tolist()
        for first, end, length in zip(starts[:-1], starts[1:], prompt_lengths, strict=True):
            begin = int(positions[first])
            count = min(end - first, length - begin)
            if length > self._frequencies.unchanged and count > 0:
                cos[first : first + count], sin[first : first + count] = self._of_prompt(begin, count, length)
        return cos, sin

    def _of_prompt(self, begin: int, count: int, length: int) -> Angles:
        """Of `count` positions from `begin` on in a prompt of `length` tokens."""
        blocks = range(begin // _BLOCK * _BLOCK, begin + count, _BLOCK)
        lengths = torch.tensor([length])
        parts = [self._frequencies.angles(torch.arange(block, block + _BLOCK), lengths) for block in blocks]
        rows = slice(begin - blocks[0], begin - blocks[0] + count)
        cos, sin = (torch.cat([part[index] for part in parts])[rows] for index in range(2))
        return cos, sin

    def _check(self, rotary_embedding: Any, max_positions: int) -> None:
        """Ask a copy of the module for the angles of a short prompt, and of the last position."""
        stock, convert = copy.deepcopy(rotary_embedding), RotaryAngles(self._cos.shape[1])
        short = min(_BLOCK, self._frequencies.unchanged, max_positions)
        for first, end in ((0, short), (max_positions - 1, max_positions)):
            expected = convert(stock(torch.zeros(1, 1), torch.arange(first, end).unsqueeze(0)))
            for part, own in zip(expected, (self._cos, self._sin), strict=True):
                # A frequency that differs in its last bit turns a far position by that much more.
                if part[0].shape != own[first:end].shape or (part[0] - own[first:end]).abs().max() > 1e-4 + 1e-6 * end:
                    raise UnsupportedModelError(
                        f"{type(rotary_embedding).__name__} has other angles than those known here for rotary "
                        f"embeddings of type '{self._frequencies.kind}', so that the model does not run on a paged "
                        "cache: use one request at a time."
                    )


class _Frequencies:
    """Frequencies by the length of a sequence.

    Attributes:
        kind: of the rotary embedding.
        unchanged: up to this length they are always the same.
    """

    def __init__(self, rotary_embedding: Any) -> None:
        self.kind, self._config = rope_type_of(rotary_embedding), rotary_embedding.config
        self._scaling = float(rotary_embedding.attention_scaling)
        self._original = rotary_embedding.original_inv_freq.detach().float()
        if self.kind == "longrope":
            self.unchanged = int(self._config.rope_parameters["original_max_position_embeddings"])
            self._long = ROPE_INIT_FUNCTIONS[self.kind](self._config, "cpu", seq_len=self.unchanged + 1)[0].float()
        else:
            self.unchanged = int(rotary_embedding.original_max_seq_len)

    def angles(self, positions: torch.Tensor, lengths: torch.Tensor) -> Angles:
        """Of int64 `[n]` positions in sequences of int64 `[n or 1]` lengths: float32 `[n, num_pairs]` each."""
        turned = positions.unsqueeze(1).float() * self._by_length(lengths.unsqueeze(1))
        return turned.cos() * self._scaling, turned.sin() * self._scaling

    def _by_length(self, lengths: torch.Tensor) -> torch.Tensor:
        if self.kind == "longrope":
            return torch.where(lengths > self.unchanged, self._long, self._original)
        grown = ROPE_INIT_FUNCTIONS[self.kind](self._config, "cpu", seq_len=lengths)[0].float()
        return torch.where(lengths > self.unchanged, grown, self._original)


def angles_for(rotary_embedding: Any, max_positions: int) -> FixedAngles | MovingAngles:
    """The angles that a model's rotary embedding gives.

    Raises:
        UnsupportedModelError: it computes them in a way that is not known here.
    """
    kind = MovingAngles if rope_type_of(rotary_embedding) in MOVING_ROPES else FixedAngles
    return kind(rotary_embedding, max_positions)
