"""What a request does to logits before a token is chosen: penalties on tokens that were used, and a bias.

Only the tokens concerned are touched, so that nothing is paid for the rest of the vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np
from numpy.typing import NDArray

from moesaic.engine.serving.params import SamplingParams
from moesaic.errors import RequestError

__all__ = ["Penalties"]


class Penalties:
    """Penalties and bias of one answer.

    The repetition penalty (arXiv 1909.05858) counts tokens of prompt and answer, the others those of the answer. Its
    order is: repetition, presence and frequency, bias.

    Args:
        params: the request's.
        repetition_penalty: what holds for the request or, if it has none, for its model; 1 changes nothing.
        vocab_size: of the logits.
        prompt_ids: of the prompt; looked at only for a repetition penalty.

    Raises:
        RequestError: a bias or a prompt token is outside the vocabulary.
    """

    def __init__(
        self, params: SamplingParams, repetition_penalty: float, vocab_size: int, prompt_ids: Iterable[int]
    ) -> None:
        self._repetition = repetition_penalty
        self._presence, self._frequency = params.presence_penalty, params.frequency_penalty
        self._bias_ids, self._bias = _bias(params.logit_bias, vocab_size)
        self._counts_used = self._presence != 0 or self._frequency != 0
        self._tracks = self._repetition != 1 or self._counts_used
        self._slots: dict[int, int] = {}
        self._ids = np.zeros(64, np.int64)
        self._counts = np.zeros(64, np.float32)
        if self._repetition != 1:
            for token in prompt_ids:
                if not 0 <= token < vocab_size:
                    raise RequestError(f"the prompt has token {token}: expected 0 to {vocab_size - 1}.", "prompt")
                self._slot(token)

    @property
    def active(self) -> bool:
        """Whether `apply_` would change anything."""
        return bool(self._slots) or self._bias_ids.size > 0

    def accept(self, token: int) -> None:
        """Count a token of the answer."""
        if self._tracks:
            slot = self._slot(token)  # may replace the arrays
            self._counts[slot] += 1

    def apply_(self, row: NDArray[np.float32]) -> None:
        """Change logits, float32 `[vocab_size]`, in place."""
        used = len(self._slots)
        if used:
            ids, counts = self._ids[:used], self._counts[:used]
            values = row[ids]
            if self._repetition != 1:
                factor = np.float32(self._repetition)
                values = np.where(values < 0, values * factor, values / factor)
            if self._counts_used:
                values -= np.float32(self._frequency) * counts + np.float32(self._presence) * (counts > 0)
            row[ids] = values
        if self._bias_ids.size:
            row[self._bias_ids] += self._bias

    def _slot(self, token: int) -> int:
        slot = self._slots.setdefault(token, len(self._slots))
        if slot == self._ids.size:
            self._ids = np.concatenate([self._ids, np.zeros_like(self._ids)])
            self._counts = np.concatenate([self._counts, np.zeros_like(self._counts)])
        self._ids[slot] = token
        return slot


def _bias(logit_bias: Mapping[int, float], vocab_size: int) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    for token in logit_bias:
        if not 0 <= token < vocab_size:
            raise RequestError(f"logit_bias names token {token}: expected 0 to {vocab_size - 1}.", "logit_bias")
    return np.array(list(logit_bias), np.int64), np.array(list(logit_bias.values()), np.float32)
