"""Feeds answers to parsers in all ways of cutting them, and holds grammars against texts."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import llguidance.hf
from llguidance import LLMatcher
from tests.server.byte_tokenizer import byte_tokenizer

from moesaic.server.conversation import Tool
from moesaic.server.parsers.base import CallPiece, MarkerPiece, Parser, Piece, ReasoningPiece, ReasoningStyle, ToolStyle
from moesaic.server.parsers.rules import marker_terminal
from moesaic.server.parsers.scanner import Scanner

WEATHER = Tool(
    "get_weather",
    "Weather of a place.",
    {
        "type": "object",
        "properties": {"city": {"type": "string"}, "days": {"type": "integer"}, "hours": {"type": "array"}},
        "required": ["city"],
    },
)
TIME = Tool("get_time", "The time now.")
TOOLS = {tool.name: tool for tool in (WEATHER, TIME)}

Summary = list[tuple[str, ...]]


def summary(pieces: Iterable[Piece]) -> Summary:
    """What a client sees: neighbouring texts joined, calls as name, arguments and id."""
    result: Summary = []
    for piece in pieces:
        if isinstance(piece, MarkerPiece):
            continue
        if isinstance(piece, CallPiece):
            result.append(("call", piece.call.name, piece.call.arguments, piece.call.id or ""))
            continue
        kind = "reasoning" if isinstance(piece, ReasoningPiece) else "text"
        if result and result[-1][0] == kind:
            result[-1] = (kind, result[-1][1] + piece.text)
        else:
            result.append((kind, piece.text))
    return result


def parse(parser: Parser, text: str, cuts: Sequence[int] = ()) -> Summary:
    """The summary of a text fed in parts; the pieces' ends have to grow up to the text's length."""
    pieces: list[Piece] = []
    for start, end in zip((0, *cuts), (*cuts, len(text)), strict=True):
        new = parser.feed(text[start:end])
        assert all(piece.end <= end for piece in new), "more is dealt with than was fed"
        pieces += new
    pieces += parser.finish()
    ends = [piece.end for piece in pieces]
    assert ends == sorted(ends)
    assert not ends or ends[-1] == len(text)
    return summary(pieces)


def check(make: Callable[[], Parser], text: str, expected: Summary) -> None:
    """A text gives the same whole, cut in two at every position, and character by character."""
    assert parse(make(), text) == expected
    for cut in range(1, len(text)):
        assert parse(make(), text, (cut,)) == expected, f"cut after {text[:cut]!r}"
    assert parse(make(), text, range(1, len(text))) == expected
    for width in (2, 3, 7):
        assert parse(make(), text, range(width, len(text), width)) == expected


def scanner(style: ToolStyle, reasoning: ReasoningStyle | None = None, **options: Any) -> Callable[[], Parser]:
    """Makes scanners for `check`."""
    return lambda: Scanner(reasoning, style=style, tools=TOOLS, **options)


def forced(style: ToolStyle, *, parallel: bool = True, special: Sequence[str] = (), tools: Any = TOOLS) -> str:
    """The grammar of an answer that is calls."""
    _, numbers = tokens(tuple(special))
    terminal = marker_terminal(numbers)
    rules = style.grammar(tuple(tools.values()), parallel, terminal, terminal(style.start_of_calls()))
    assert rules is not None
    return f"%llguidance {{}}\nstart: calls\n{rules}\nTEXT: /(.|\\n)*/\n"


@functools.cache
def tokens(special: tuple[str, ...]) -> tuple[Any, dict[str, int]]:
    """A byte tokenizer with these special tokens, for llguidance, and the tokens' numbers."""
    tokenizer = byte_tokenizer(None, ("<|eos|>", *special))
    numbers = {text: tokenizer.convert_tokens_to_ids(text) for text in ("<|eos|>", *special)}
    return (tokenizer, llguidance.hf.from_tokenizer(tokenizer)), numbers


def accepted(lark: str, text: str, special: Sequence[str] = ()) -> str | None:
    """None if a grammar allows a text as a whole answer, otherwise how far it gets."""
    (tokenizer, ll_tokenizer), _ = tokens(tuple(special))
    grammar = LLMatcher.grammar_from_lark(lark)
    error = LLMatcher.validate_grammar(grammar, ll_tokenizer)
    assert not error, error
    matcher = LLMatcher(ll_tokenizer, grammar, log_level=0)
    done: list[int] = []
    for number in tokenizer(text)["input_ids"]:
        if not matcher.consume_token(number):
            return str(tokenizer.decode(done))
        done.append(number)
    return None if matcher.is_accepting() else "not the end"
