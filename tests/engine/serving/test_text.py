"""Text from tokens in pieces: equal to the tokenizer's own decoding, up to where a stop string begins."""

from __future__ import annotations

import time
from functools import cache
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.engine.serving.tokenizers_for_tests import demo_tokenizer, sentencepiece_like, tiny_tokenizer, word_piece
from transformers import PreTrainedTokenizerBase

from moesaic.engine.serving.params import SamplingParams
from moesaic.engine.serving.text import Detokenizer


@cache
def make(kind: str) -> PreTrainedTokenizerBase:
    makers = {"demo": demo_tokenizer, "tiny": tiny_tokenizer, "words": word_piece}
    return makers[kind]() if kind in makers else sentencepiece_like(kind)


def stream(
    tokenizer: PreTrainedTokenizerBase, ids: list[int], tail: list[int] | None = None, **params: Any
) -> list[str]:
    """All pieces; the last one is what `finish` gives."""
    detokenizer = Detokenizer(tokenizer, SamplingParams(**params), tail or [])
    return [*(detokenizer.push([token]) for token in ids), detokenizer.finish()]


def encode(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


@pytest.mark.parametrize("kind", ["demo", "tiny"])
@settings(deadline=None, max_examples=300)
@given(st.data())
def test_any_tokens(kind: str, data: st.DataObject) -> None:
    """Invalid bytes, special tokens and numbers that are no tokens included."""
    tokenizer = make(kind)
    ids = data.draw(st.lists(st.integers(0, len(tokenizer) + 2)))
    for skip in (True, False):
        pieces = stream(tokenizer, ids, skip_special_tokens=skip)
        assert "".join(pieces) == tokenizer.decode(ids, skip_special_tokens=skip)


@pytest.mark.parametrize("kind", ["demo", "tiny"])
@settings(deadline=None, max_examples=200)
@given(text=st.text())
def test_text_comes_back_in_whole_characters(kind: str, text: str) -> None:
    tokenizer = make(kind)
    ids = encode(tokenizer, text)
    pieces = stream(tokenizer, ids)
    assert "".join(pieces) == tokenizer.decode(ids)
    if "�" not in text:
        assert "�" not in "".join(pieces)
        assert pieces[-1] == ""  # nothing is late


@settings(deadline=None, max_examples=400)
@given(
    text=st.text("abAB", max_size=40),
    stops=st.lists(st.text("abAB", min_size=1, max_size=5), min_size=1, max_size=4),
    cuts=st.lists(st.integers(0, 40), max_size=6),
)
def test_stop_strings(text: str, stops: list[str], cuts: list[int]) -> None:
    """Against a search in the whole text: the stop that is complete first ends it, the longest of several."""
    tokenizer = make("tiny")
    ends = [(text.find(stop) + len(stop), -len(stop)) for stop in stops if stop in text]
    end, length = min(ends, default=(len(text), 0))
    detokenizer = Detokenizer(tokenizer, SamplingParams(stop=tuple(stops)))
    edges = sorted({0, len(text), *(cut for cut in cuts if cut < len(text))})
    pieces = []
    for start, stop in pairwise(edges):
        pieces.append(detokenizer.push(encode(tokenizer, text[start:stop])))
        assert text.startswith("".join(pieces))
    pieces.append(detokenizer.finish())
    assert "".join(pieces) == text[: end + length]
    assert detokenizer.stopped == (text[end + length : end] or None)
    if ends:
        assert detokenizer.push(encode(tokenizer, "more")) == detokenizer.finish() == ""


def test_only_what_may_be_a_stop_is_held_back() -> None:
    tokenizer = make("tiny")
    detokenizer = Detokenizer(tokenizer, SamplingParams(stop=("User:", "\n\n")))
    pieces = [detokenizer.push([token]) for token in encode(tokenizer, "Hi\nUsUser")]
    assert pieces == ["H", "i", "", "\n", "", "Us", "", "", ""]
    assert detokenizer.finish() == "User"
    assert detokenizer.stopped is None


def test_a_stop_string_within_a_token_and_over_characters() -> None:
    tokenizer = make("demo")
    detokenizer = Detokenizer(tokenizer, SamplingParams(stop=("语",)))
    assert detokenizer.push(encode(tokenizer, "中文语言")) == "中文"
    assert detokenizer.stopped == "语"


def test_no_stop_string_before_min_tokens() -> None:
    tokenizer = make("tiny")
    for minimum, wanted in ((0, ""), (1, ""), (2, "xy"), (3, "xy"), (4, "xyxy"), (6, "xyxyx")):
        pieces = stream(tokenizer, encode(tokenizer, "xyxyx"), stop=("x",), min_tokens=minimum)
        assert "".join(pieces) == wanted, minimum


@pytest.mark.parametrize("kind", ["strip", "keep", "metaspace"])
@settings(deadline=None, max_examples=300)
@given(st.data())
def test_sentencepiece(kind: str, data: st.DataObject) -> None:
    tokenizer = make(kind)
    words = st.integers(259, len(tokenizer) - 1).map(lambda token: [token])
    characters = st.characters(codec="utf-8").map(lambda c: [3 + byte for byte in c.encode()])
    specials = st.integers(0, 2).map(lambda token: [token])
    ids = [i for part in data.draw(st.lists(st.one_of(words, characters, specials))) for i in part]
    for skip in (True, False):
        pieces = stream(tokenizer, ids, skip_special_tokens=skip)
        assert "".join(pieces) == tokenizer.decode(ids, skip_special_tokens=skip)


@pytest.mark.parametrize("kind", ["strip", "keep", "metaspace", "words"])
def test_the_space_after_a_prompt(kind: str) -> None:
    """After ordinary text it belongs to the answer; after a special token the answer begins a text."""
    tokenizer = make(kind)
    prompt, ids = (["hello"], ["world", "##s"]) if kind == "words" else (["▁Hello"], ["▁world", "!"])
    prompt, ids = tokenizer.convert_tokens_to_ids(prompt), tokenizer.convert_tokens_to_ids(ids)
    whole = tokenizer.decode([*prompt, *ids])
    assert "".join(stream(tokenizer, ids, tail=prompt)) == whole[len(tokenizer.decode(prompt)) :]
    assert whole.count(" ") == 1 + (kind == "keep")
    assert "".join(stream(tokenizer, ids, tail=[tokenizer.eos_token_id])) == tokenizer.decode(ids)


def test_bytes_that_are_no_characters_leave_their_neighbours() -> None:
    tokenizer = make("strip")
    ids = [3 + byte for byte in "中".encode() + b"\xe4\xff"]
    assert tokenizer.decode(ids) == "�����"
    assert "".join(stream(tokenizer, ids)) == "中��"


def test_long_answers_take_no_longer_per_token() -> None:
    tokenizer = make("tiny")
    garbage = encode(tokenizer, "a")[0]
    byte = tokenizer.convert_tokens_to_ids("ä")  # 0xE4, which begins a character
    times = []
    for length in (2_000, 40_000):
        detokenizer = Detokenizer(tokenizer, SamplingParams(stop=("aaaaaaaaab", "a" * 30 + "b")))
        begin = time.process_time()
        for _ in range(length):
            detokenizer.push([garbage])
            detokenizer.push([byte])
        times.append((time.process_time() - begin) / length)
    assert times[1] < 4 * times[0]
