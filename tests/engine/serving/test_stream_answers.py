"""Answers of a conversation on a loaded model: text, stops, limits, seeds, what an interruption leaves."""

from __future__ import annotations

import pytest
import torch
from tests.engine.pairs import load_tiny
from tests.tiny_tokenizer import make_tiny_tokenizer

from moesaic.engine.answer import Sampling
from moesaic.engine.generated_answers import GeneratedAnswers
from moesaic.engine.serving.defaults import GenerationDefaults
from moesaic.engine.serving.stream_answers import StreamAnswers
from moesaic.engine.serving.token_stream import token_stream_of
from moesaic.engine.session import Session

GREEDY = Sampling(max_tokens=12, temperature=0)


@pytest.fixture
def session() -> Session:
    """Its cache stores float32, as that of generate()."""
    session = Session(load_tiny("qwen3_moe"), make_tiny_tokenizer())
    assert isinstance(session._answers, StreamAnswers)
    stream = token_stream_of(session.model, torch.float32)
    assert stream is not None
    defaults = GenerationDefaults.of(session.model.generation_config, session.tokenizer)
    session._answers = StreamAnswers(stream, session.tokenizer, defaults)
    return session


def logits_of_parts(session: Session, ids: list[int]) -> torch.Tensor:
    with torch.no_grad():
        return session.model(torch.tensor([ids]), use_cache=False).logits[0, -1]


def test_text_is_that_of_the_tokens(session: Session) -> None:
    ids = session.encode_raw("The beginning of a story")
    pieces: list[str] = []
    answer = session.answer(ids, GREEDY, on_text=pieces.append)
    out = session.model.generate(torch.tensor([ids]), max_new_tokens=12, do_sample=False)[0, len(ids) :].tolist()
    stops = [place for place, token in enumerate(out) if token == session.tokenizer.eos_token_id]
    expected = out[: stops[0] + 1] if stops else out
    assert answer.text == "".join(pieces) == session.tokenizer.decode(expected, skip_special_tokens=True)
    assert (answer.prompt_tokens, answer.cached_tokens, answer.generated_tokens) == (len(ids), 0, len(expected))
    assert answer.finish_reason == ("stop" if stops else "length")
    assert answer.prefill_seconds > 0 and answer.decode_seconds > 0 and answer.seed is None


def test_a_stop_token_ends_the_answer_and_gives_no_text(session: Session) -> None:
    ids = session.encode_raw("stop")
    first = int(logits_of_parts(session, ids).argmax())
    session._answers._defaults = type(session._answers._defaults)({}, frozenset({first}))  # type: ignore[attr-defined]
    answer = session.answer(ids, GREEDY)
    assert (answer.finish_reason, answer.generated_tokens, answer.text) == ("stop", 1, "")


def test_a_seed_gives_the_same_answer_again(session: Session) -> None:
    ids = session.encode_raw("random")
    hot = [session.answer(ids, Sampling(20, 1.5, seed=seed)) for seed in (1, 1, 2)]
    assert hot[0].text == hot[1].text != hot[2].text
    assert [answer.seed for answer in hot] == [1, 1, 2]
    assert session.answer(ids, Sampling(2, 1.5)).seed is not None


def test_the_caller_can_stop(session: Session) -> None:
    calls: list[int] = []
    answer = session.answer(
        session.encode_raw("stop me"), Sampling(50, 0), should_stop=lambda: calls.append(1) or len(calls) >= 3
    )
    assert (answer.finish_reason, answer.generated_tokens) == ("interrupted", 3)


def test_ctrl_c_keeps_the_text_and_forgets_the_cache(session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    ids = session.encode_raw("break")
    expected = session.answer(ids, Sampling(6, 0)).text
    session.forget()
    runner = session._answers._stream.runner  # type: ignore[attr-defined]
    decode, calls = runner.decode, []

    def interrupt(*arguments: object) -> torch.Tensor:
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return decode(*arguments)

    monkeypatch.setattr(runner, "decode", interrupt)
    answer = session.answer(ids, Sampling(6, 0))
    assert (answer.finish_reason, answer.generated_tokens) == ("interrupted", 3)
    assert expected.startswith(answer.text)
    again = session.answer(ids, Sampling(6, 0))
    assert (again.text, again.cached_tokens) == (expected, 0)
    assert session.answer(ids, Sampling(6, 0)).cached_tokens == len(ids) - 1


def test_models_without_a_paged_cache_go_on_with_generate(session: Session) -> None:
    model = load_tiny("qwen3_moe")
    model._shared_state.stack, model._shared_state.has_stock_parts = None, True
    other, ids = Session(model, make_tiny_tokenizer()), session.encode_raw("either way")
    assert isinstance(other._answers, GeneratedAnswers)
    assert other.answer(ids, GREEDY).text == session.answer(ids, GREEDY).text
