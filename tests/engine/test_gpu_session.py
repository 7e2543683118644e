"""Conversations with a model on a GPU: in Triton's interpreter where there is none."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("triton")

from tests.engine.test_gpu import VOCAB_SIZE, on_gpu

from moesaic.engine.answer import Sampling
from moesaic.engine.session import Session
from moesaic.kvcache.paged import PagedSequence


def test_a_prompt_goes_in_pieces_that_the_gpu_wants(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not in the CPU's: experts on their way to the GPU pass once for each piece. What was computed is kept."""
    ours = on_gpu("qwen3_moe")
    monkeypatch.setattr("moesaic.engine.generated_answers._PREFILL_CHUNK", 3)
    object.__setattr__(ours.runner.options, "max_chunk", 16)
    pieces = list[int]()

    def prefill(parts: list[tuple[PagedSequence, torch.Tensor]], wanted: str = "last") -> torch.Tensor:
        """Computes nothing, which is not what is looked at here."""
        ((sequence, ids),) = parts
        sequence.append(len(ids))
        pieces.append(len(ids))
        return torch.zeros(1, VOCAB_SIZE)

    monkeypatch.setattr(ours.runner, "prefill", prefill)
    tokenizer = SimpleNamespace(eos_token_id=None, pad_token_id=0, decode=lambda ids, **_: "")
    session, ids = Session(ours, tokenizer), list(range(3, 39))  # type: ignore[arg-type]
    session.answer(ids, Sampling(max_tokens=1, temperature=0.0))
    assert pieces == [16, 16, 4]
    answer = session.answer([*ids, 5, 6], Sampling(max_tokens=1, temperature=0.0))
    assert answer.cached_tokens == 36 and pieces == [16, 16, 4, 2]
