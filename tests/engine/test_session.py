"""Conversations: the same tokens as one plain generate(), cache reuse that changes nothing, stops, limits, refusals.

The model is a stock one: a session knows only `generate()`.
"""

from __future__ import annotations

import functools

import pytest
import torch
from tests.tiny_models import make_tiny_model
from tests.tiny_tokenizer import make_tiny_tokenizer
from transformers import PreTrainedModel

from moesaic.engine.answer import Sampling
from moesaic.engine.session import Session
from moesaic.errors import ConfigError, GenerationError

GREEDY = Sampling(max_tokens=12, temperature=0)


@functools.cache
def models(family: str) -> PreTrainedModel:
    return make_tiny_model(family, vocab_size=259)


@pytest.fixture
def model() -> PreTrainedModel:
    return models("qwen3_moe")


@pytest.fixture
def session(model: PreTrainedModel) -> Session:
    return Session(model, make_tiny_tokenizer())


def stock_greedy(model: PreTrainedModel, ids: list[int], count: int) -> list[int]:
    """Greedy decoding without any cache or generate(): the oracle."""
    new: list[int] = []
    while len(new) < count:
        with torch.no_grad():
            logits = model(torch.tensor([ids + new]), use_cache=False).logits
        new.append(int(logits[0, -1].argmax()))
        if new[-1] == 2:
            break
    return new


def test_text_is_that_of_greedy_decoding(model: PreTrainedModel, session: Session) -> None:
    ids = session.encode_chat([{"role": "user", "content": "héllo 你好"}])
    pieces: list[str] = []
    answer = session.answer(ids, GREEDY, on_text=pieces.append)
    expected = stock_greedy(model, ids, 12)
    assert answer.text == session.tokenizer.decode(expected, skip_special_tokens=True) == "".join(pieces)
    assert (answer.prompt_tokens, answer.cached_tokens, answer.generated_tokens) == (len(ids), 0, len(expected))
    assert answer.finish_reason == ("stop" if expected[-1] == 2 else "length")
    assert answer.prefill_seconds > 0
    assert answer.decode_seconds > 0
    assert answer.seed is None


@pytest.mark.parametrize("family", ["qwen3_moe", "deepseek_v3", "gpt_oss", "qwen3_next"])
def test_a_kept_cache_changes_nothing(family: str) -> None:
    session = Session(models(family), make_tiny_tokenizer())
    first = session.encode_raw("The first turn of a conversation, ")
    answer = session.answer(first, GREEDY)
    longer = [*first, *session.encode_raw(answer.text + " and the second")]
    changed = [*first[:20], *session.encode_raw("quite another end")]
    for ids in (longer, changed, longer):
        kept = session.answer(ids, GREEDY)
        fresh = Session(session.model, session.tokenizer).answer(ids, GREEDY)
        assert kept.text == fresh.text
        assert fresh.cached_tokens == 0
        if family in ("qwen3_moe", "deepseek_v3"):
            assert 20 <= kept.cached_tokens < len(ids)


@pytest.mark.parametrize("family", ["qwen3_moe", "deepseek_v3", "gpt_oss", "qwen3_next"])
def test_a_long_prompt_in_pieces_changes_nothing(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    session = Session(models(family), make_tiny_tokenizer())
    ids = session.encode_raw("A prompt that is longer than one piece of it, by a few tokens.")
    whole = session.answer(ids, GREEDY).text
    monkeypatch.setattr("moesaic.engine.generated_answers._PREFILL_CHUNK", 25)
    session.forget()
    assert session.answer(ids, GREEDY).text == whole
    longer = [*ids, *session.encode_raw(whole), *session.encode_raw("And a second turn of the same length or so.")]
    lengths: list[int] = []
    hook = session.model.get_input_embeddings().register_forward_pre_hook(
        lambda module, inputs: lengths.append(inputs[0].shape[1])
    )
    in_pieces = session.answer(longer, GREEDY)
    hook.remove()
    decoded = in_pieces.generated_tokens - 1
    assert max(lengths) == 25 and sum(lengths) == len(longer) - in_pieces.cached_tokens + decoded  # nothing twice
    session.forget()
    monkeypatch.undo()
    assert session.answer(longer, GREEDY).text == in_pieces.text


def test_the_same_prompt_again_computes_only_its_last_token(session: Session) -> None:
    ids = session.encode_raw("once more")
    first = session.answer(ids, GREEDY)
    again = session.answer(ids, GREEDY)
    assert (again.text, again.cached_tokens) == (first.text, len(ids) - 1)


def test_a_seed_gives_the_same_answer_again(session: Session) -> None:
    ids = session.encode_raw("random")
    hot = [session.answer(ids, Sampling(20, 1.5, seed=seed)) for seed in (1, 1, 2)]
    assert hot[0].text == hot[1].text != hot[2].text
    assert [answer.seed for answer in hot] == [1, 1, 2]
    assert session.answer(ids, Sampling(2, 1.5)).seed is not None


def test_the_caller_can_stop(session: Session) -> None:
    calls: list[int] = []

    def should_stop() -> bool:
        calls.append(1)
        return len(calls) >= 3

    answer = session.answer(session.encode_raw("stop me"), Sampling(50, 0), should_stop=should_stop)
    assert (answer.finish_reason, answer.generated_tokens) == ("interrupted", 3)


def test_ctrl_c_in_a_forward_keeps_the_text_and_drops_the_cache(session: Session) -> None:
    ids = session.encode_raw("break")
    expected = session.answer(ids, Sampling(6, 0)).text
    session.forget()
    calls = 0

    def interrupt(*_: object) -> None:
        nonlocal calls
        calls += 1
        if calls == 4:
            raise KeyboardInterrupt

    hook = session.model.model.layers[1].register_forward_pre_hook(interrupt)
    try:
        answer = session.answer(ids, Sampling(6, 0))
    finally:
        hook.remove()
    assert (answer.finish_reason, answer.generated_tokens) == ("interrupted", 3)
    assert expected.startswith(answer.text)
    again = session.answer(ids, Sampling(6, 0))
    assert (again.text, again.cached_tokens) == (expected, 0)


def test_sampling_options_overrule_the_model(model: PreTrainedModel, session: Session) -> None:
    ids = session.encode_raw("sample")
    model.generation_config.do_sample, model.generation_config.temperature = True, 5.0
    try:
        assert session.answer(ids, Sampling(4)).seed is not None
        assert session.answer(ids, Sampling(4, temperature=0)).seed is None
        assert session.answer(ids, Sampling(4, top_k=1, seed=3)).text == session.answer(ids, Sampling(4, 0)).text
        model.generation_config.do_sample, model.generation_config.temperature = False, None
        assert session.answer(ids, Sampling(4)).seed is None
    finally:
        model.generation_config.do_sample = model.generation_config.temperature = None


@pytest.mark.parametrize(
    "values",
    [{"temperature": -1.0}, {"temperature": float("nan")}, {"top_p": 1.5}, {"top_k": -1}, {"max_tokens": 0}],
)
def test_options_out_of_range_are_refused(values: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match="expected at least"):
        Sampling(**values)


def test_prompts_that_cannot_be_answered(session: Session) -> None:
    with pytest.raises(GenerationError, match=r"512 tokens.*context is 512"):
        session.answer([5] * 512, GREEDY)
    with pytest.raises(GenerationError, match="empty"):
        session.answer([], GREEDY)
    assert session.answer([5] * 510, Sampling(50, 0)).generated_tokens <= 2
    with pytest.raises(GenerationError, match="no such role"):
        session.encode_chat([{"role": "forbidden", "content": ""}])
    with pytest.raises(GenerationError, match=r"U\+DCFF at position 1"):
        session.encode_raw("x\udcff")
    plain = Session(session.model, make_tiny_tokenizer(chat_template=None))
    with pytest.raises(GenerationError, match="--raw"):
        plain.encode_chat([{"role": "user", "content": "x"}])
