"""Bytes of tokens, for every token of some vocabularies."""

from __future__ import annotations

import gc

import pytest
from tests.engine.serving.tokenizers_for_tests import demo_tokenizer, sentencepiece_like, tiny_tokenizer, word_piece

from moesaic.engine.serving import token_bytes as module
from moesaic.engine.serving.token_bytes import TokenTable, token_bytes


def test_every_token_of_the_demo() -> None:
    tokenizer = demo_tokenizer()
    for token in range(len(tokenizer)):
        raw = token_bytes(tokenizer, token)
        assert raw.decode(errors="replace") == tokenizer.decode([token])
    partial = [token for token in range(len(tokenizer)) if "�" in tokenizer.decode([token])]
    assert len(partial) > 100
    assert all(token_bytes(tokenizer, token) for token in partial)


def test_parts_of_characters_make_the_text() -> None:
    tokenizer = demo_tokenizer()
    text = "naïve 🙂 龘 ελ\t"
    ids = tokenizer(text)["input_ids"]
    assert b"".join(token_bytes(tokenizer, token) for token in ids) == text.encode()
    assert any("�" in tokenizer.decode([token]) for token in ids)


def test_every_byte_of_the_tiny_tokenizer() -> None:
    tokenizer = tiny_tokenizer()
    assert sorted(token_bytes(tokenizer, token) for token in range(3, 259)) == [bytes([b]) for b in range(256)]
    assert token_bytes(tokenizer, 2) == b"<|end|>"


@pytest.mark.parametrize("kind", ["strip", "keep", "metaspace"])
def test_sentencepiece(kind: str) -> None:
    tokenizer = sentencepiece_like(kind)
    names = {"<0xE4>": b"\xe4", "<0x20>": b" ", "▁Hello": b" Hello", "▁▁": b"  ", "中": "中".encode(), "ld": b"ld"}
    for name, raw in names.items():
        assert token_bytes(tokenizer, tokenizer.convert_tokens_to_ids(name)) == raw, name


def test_words() -> None:
    tokenizer = word_piece()
    names = {"hello": b" hello", "##s": b"s", "a": b" a"}
    for name, raw in names.items():
        assert token_bytes(tokenizer, tokenizer.convert_tokens_to_ids(name)) == raw, name


@pytest.mark.parametrize("token", [-1, 10**6, 2**31, 2**70])
def test_numbers_that_are_no_tokens(token: int) -> None:
    assert token_bytes(tiny_tokenizer(), token) == b""
    assert token_bytes(sentencepiece_like("strip"), token) == b""


def test_a_table_lives_as_long_as_its_tokenizer() -> None:
    tokenizer = tiny_tokenizer()
    assert TokenTable.of(tokenizer) is TokenTable.of(tokenizer)
    gc.collect()
    kept = len(module._tables)
    del tokenizer
    gc.collect()
    assert len(module._tables) == kept - 1
