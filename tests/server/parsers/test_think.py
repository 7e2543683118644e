from __future__ import annotations

import pytest
from tests.server.parsers.cutting import check

from moesaic.server.parsers.scanner import Scanner
from moesaic.server.parsers.think import BRACKETS, THINK

BOTH = [("reasoning", "a\n\nb < c"), ("text", "Answer. \n")]


@pytest.mark.parametrize("style", [THINK, BRACKETS], ids=["think", "brackets"])
@pytest.mark.parametrize("blanks", ["", "\n", "\n\n"])
def test_the_model_opens(style: object, blanks: str) -> None:
    opener, closer = style.opener, style.closer
    text = f"{blanks}{opener}{blanks}a\n\nb < c{blanks}{closer}{blanks}Answer. \n"
    check(lambda: Scanner(style), text, BOTH)


def test_the_prompt_opened() -> None:
    check(lambda: Scanner(THINK, opened=True), "\na\n\nb < c\n</think>\n\nAnswer. \n", BOTH)


def test_no_thoughts() -> None:
    check(lambda: Scanner(THINK), "\nAnswer <think> </think>", [("text", "\nAnswer <think> </think>")])
    check(lambda: Scanner(THINK), "<th", [("text", "<th")])
    check(lambda: Scanner(THINK), "", [])
    check(lambda: Scanner(THINK), " \n ", [("text", " \n ")])


def test_empty_thoughts() -> None:
    check(lambda: Scanner(THINK), "<think>\n\n</think>\n\nAnswer.", [("text", "Answer.")])
    check(lambda: Scanner(THINK), "</think>\n\nAnswer.", [("text", "Answer.")])
    check(lambda: Scanner(THINK, opened=True), "</think>Answer.", [("text", "Answer.")])


def test_thoughts_that_never_end() -> None:
    check(lambda: Scanner(THINK), "<think>a and </thin", [("reasoning", "a and </thin")])
    check(lambda: Scanner(THINK, opened=True), "a \n", [("reasoning", "a")])


def test_special_tokens_are_taken_out() -> None:
    text = "<think>a<|pad|>b</think>c<|pad|> d<|end|>"
    check(lambda: Scanner(THINK, drop=("<|pad|>", "<|end|>")), text, [("reasoning", "ab"), ("text", "c d")])


def test_plain_text_is_given_out_at_once() -> None:
    parser = Scanner()
    for text in ("a ", "<think>", "\n", "<|"):
        assert [piece.text for piece in parser.feed(text)] == [text]


def test_text_waits_only_while_it_may_be_a_marker() -> None:
    parser = Scanner(THINK, opened=True)
    given = [
        "".join(getattr(piece, "text", "") for piece in parser.feed(text)) for text in ("a", " ", "b<", "/x", "</")
    ]
    assert given == ["a", "", " b", "</x", ""]
