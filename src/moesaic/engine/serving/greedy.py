"""Stand-in until sampler.py and text.py land."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from moesaic.engine.serving.outputs import TokenLogprob


class RequestSampler:
    def __init__(
        self,
        params: Any,
        defaults: dict[str, Any],
        vocab_size: int,
        prompt_ids: Sequence[int],
        seed: int,
        grammar_matcher: Any = None,
    ) -> None:
        self.seed = None

    def accept(self, token: int) -> None:
        pass


def sample(logits: torch.Tensor, samplers: list[RequestSampler]) -> tuple[list[int], list[TokenLogprob | None]]:
    return logits.argmax(-1).tolist(), [None] * len(samplers)


class Detokenizer:
    def __init__(self, tokenizer: Any, params: Any, prompt_tail: Sequence[int] = ()) -> None:
        self._tokenizer, self._params = tokenizer, params
        self._ids: list[int] = []
        self._given = 0
        self.stopped: str | None = None

    def push(self, token_ids: Sequence[int]) -> str:
        self._ids.extend(token_ids)
        return self._text(False)

    def finish(self) -> str:
        return self._text(True)

    def _text(self, final: bool) -> str:
        text = str(self._tokenizer.decode(self._ids, skip_special_tokens=True))
        if text.endswith("\ufffd") and not final:
            return ""
        new, self._given = text[self._given :], len(text)
        return new
