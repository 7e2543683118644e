"""Conversations with a model on a GPU: in Triton's interpreter where there is none."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from tests.engine.test_gpu import ON_GPU, VOCAB_SIZE, checkpoint_of, inputs, on_gpu
from tests.tiny_tokenizer import make_tiny_tokenizer

from moesaic.engine.answer import Sampling
from moesaic.engine.serving.params import SamplingParams
from moesaic.engine.serving.sampler import RequestSampler
from moesaic.engine.serving.stream_answers import StreamAnswers
from moesaic.engine.serving.token_stream import token_stream_of
from moesaic.engine.session import Session
from moesaic.kvcache.paged import PagedSequence


@pytest.mark.parametrize(("family", "num_layers"), [("qwen3_moe", None), ("deepseek_v3", 1)])
def test_tokens_are_those_of_the_stock_model(family: str, num_layers: int | None) -> None:
    """By the steps of the serving engine, also behind a split; what is computed is kept for a longer conversation."""
    stock, stream = checkpoint_of(family)[0], token_stream_of(on_gpu(family, ON_GPU, num_layers=num_layers))
    assert stream is not None

    def check(ids: list[int], kept: int) -> list[int]:
        sampler = RequestSampler(SamplingParams(temperature=0), {}, VOCAB_SIZE, ids)
        assert stream.begin(ids) == kept
        tokens = [token for token, _ in zip(stream.generate(ids, sampler), range(3), strict=False)]
        found = stock.generate(torch.tensor([ids]), max_new_tokens=3, do_sample=False)[0, len(ids) :].tolist()
        assert tokens == found
        return tokens

    ids = inputs(1, 6)[0].tolist()
    longer = [*ids, *check(ids, 0)[:2], 7, 8]
    check(longer, 8)
    stream.forget()
    assert stream.runner.pool.num_free == stream.runner.pool.num_blocks


def test_a_session_answers_by_steps() -> None:
    ours = on_gpu("qwen3_moe")
    session = Session(ours, make_tiny_tokenizer())
    assert isinstance(session._answers, StreamAnswers)
    answer = session.answer([5, 6, 7], Sampling(max_tokens=2, temperature=0.0))
    assert (answer.generated_tokens, answer.prompt_tokens, answer.finish_reason) == (2, 3, "length")
    session.forget()
    assert ours.runner.pool.num_free == ours.runner.pool.num_blocks


class NoWork:
    """A prompt on its way, of which nothing is computed: that is not what is looked at here."""

    num_layers_left = 0

    def advance(self, num_layers: int) -> None:
        pass

    def abandon(self) -> None:
        pass

    def logits(self) -> torch.Tensor:
        return torch.zeros(1, VOCAB_SIZE)


def test_a_prompt_goes_in_pieces_that_the_gpu_wants(monkeypatch: pytest.MonkeyPatch) -> None:
    """Experts on their way to the GPU pass once for each piece. What was computed is kept."""
    ours = on_gpu("qwen3_moe")
    object.__setattr__(ours.runner.options, "max_chunk", 16)
    pieces = list[int]()

    def start_prefill(parts: list[tuple[PagedSequence, torch.Tensor]]) -> NoWork:
        ((sequence, ids),) = parts
        sequence.append(len(ids))
        pieces.append(len(ids))
        return NoWork()

    monkeypatch.setattr(ours.runner, "start_prefill", start_prefill)
    session, ids = Session(ours, make_tiny_tokenizer()), list(range(3, 39))
    session.answer(ids, Sampling(max_tokens=1, temperature=0.0))
    assert pieces == [16, 16, 4]
    answer = session.answer([*ids, 5, 6], Sampling(max_tokens=1, temperature=0.0))
    assert answer.cached_tokens == 36 and pieces == [16, 16, 4, 2]
