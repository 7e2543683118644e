"""Log-probabilities of tokens in the two forms that OpenAI's API has: of chat, and of completions.

It does not know how tokens are chosen.
"""

from __future__ import annotations

import codecs
from collections.abc import Iterable

from msgspec import Struct

from moesaic.engine.serving.outputs import TokenLogprob

__all__ = ["ChatLogprob", "CompletionLogprobs", "Offsets", "TopLogprob", "chat_logprobs"]


class TopLogprob(Struct):
    """A token that might have been chosen; its text has replacement characters where its bytes are no whole ones."""

    token: str
    logprob: float
    bytes: list[int]


class ChatLogprob(Struct):
    """The token that was chosen, and the likeliest ones at its place."""

    token: str
    logprob: float
    bytes: list[int]
    top_logprobs: list[TopLogprob]


class CompletionLogprobs(Struct):
    """Of an answer's tokens in order.

    Attributes:
        tokens: their texts; `bytes:` and the bytes where these are no whole characters.
        token_logprobs: their log-probabilities.
        top_logprobs: of each, the likeliest tokens at its place, and itself.
        text_offset: of each, the character of the text at which it begins.
    """

    tokens: list[str]
    token_logprobs: list[float]
    top_logprobs: list[dict[str, float]]
    text_offset: list[int]


def chat_logprobs(tokens: Iterable[TokenLogprob]) -> list[ChatLogprob]:
    """In the form of chat completions and responses."""
    return [
        ChatLogprob(
            _text(each.raw),
            _finite(each.logprob),
            list(each.raw),
            [TopLogprob(_text(other.raw), _finite(other.logprob), list(other.raw)) for other in each.top],
        )
        for each in tokens
    ]


class Offsets:
    """Makes logprobs in the form of completions, for the pieces of one answer in order."""

    def __init__(self) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._length = 0

    def add(self, tokens: Iterable[TokenLogprob]) -> CompletionLogprobs:
        """Of the next tokens; a character's bytes in several tokens count for the one that completes it."""
        made = CompletionLogprobs([], [], [], [])
        for each in tokens:
            own = _name(each.raw)
            made.tokens.append(own)
            made.token_logprobs.append(_finite(each.logprob))
            made.top_logprobs.append(
                {_name(other.raw): _finite(other.logprob) for other in reversed(each.top)}
                | {own: _finite(each.logprob)}
            )
            made.text_offset.append(self._length)
            self._length += len(self._decoder.decode(each.raw))
        return made


def _text(raw: bytes) -> str:
    return raw.decode("utf-8", "replace")


def _name(raw: bytes) -> str:
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)


def _finite(logprob: float) -> float:
    """JSON has no infinity: the value that OpenAI's documentation names for what is very unlikely."""
    return max(logprob, -9999.0)
