"""Text of an answer while its tokens come, up to where a stop string begins.

Text is given out as soon as it is certain: not within a character, and not where a stop string may have begun. Every
token is decoded once. Joined, the pieces are what the tokenizer makes of all tokens at once, with one difference: if
tokens for single bytes are not all of them characters, those that are stay (some tokenizers drop the whole run).
`clean_up_tokenization_spaces`, which rewrites text between tokens, is left out: it would change code.
"""

from __future__ import annotations

import codecs
from collections.abc import Iterable, Sequence

from transformers import PreTrainedTokenizerBase

from moesaic.engine.serving.params import SamplingParams
from moesaic.engine.serving.token_bytes import TokenTable
from moesaic.errors import RequestError

__all__ = ["Detokenizer", "encode_text"]


def encode_text(tokenizer: PreTrainedTokenizerBase, text: str, add_special_tokens: bool = True) -> list[int]:
    """Token ids of a text, with the tokenizer's own special tokens around it if asked for.

    Raises:
        RequestError: it holds lone surrogates, as text has that was decoded wrongly.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise RequestError(
            f"the prompt has U+{ord(text[error.start]):04X} at position {error.start}, which is no character: "
            "decode its bytes as UTF-8.",
            "prompt",
        ) from None
    return list(tokenizer(text, add_special_tokens=add_special_tokens)["input_ids"])


class Detokenizer:
    """Turns the tokens of one answer into text.

    Args:
        tokenizer: the model's.
        params: of the request: `stop`, `min_tokens` (no stop string counts before), `skip_special_tokens`.
        prompt_tail_ids: the last tokens of the prompt; one is enough. If the last is an ordinary token, the answer
            goes on with its text, and a space at the beginning counts.

    Attributes:
        stopped: the stop string that ended the text, None before.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, params: SamplingParams, prompt_tail_ids: Sequence[int] = ()
    ) -> None:
        self._tokenizer = tokenizer  # the table keeps no reference
        self._table = TokenTable.of(tokenizer)
        self._skips = self._table.special_ids if params.skip_special_tokens else frozenset()
        self._begins = not prompt_tail_ids or prompt_tail_ids[-1] in self._table.special_ids
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._stops = _Stops(params.stop)
        self._unstoppable = max(params.min_tokens - 1, 0)  # tokens still to come before one may stop
        self.stopped: str | None = None

    def push(self, token_ids: Iterable[int]) -> str:
        """Take the next tokens; returns new text that is certain."""
        if self.stopped is not None:
            return ""
        return "".join(self._push(token) for token in token_ids)

    def finish(self) -> str:
        """No token follows; returns the rest of the text."""
        if self.stopped is not None:
            return ""
        text = self._decoder.decode(b"", final=True)
        certain = self._find_stop(text) if self._unstoppable == 0 else text
        return certain if self.stopped is not None else certain + self._stops.release()

    def _push(self, token: int) -> str:
        if self.stopped is not None:
            return ""
        text = ""
        if token not in self._skips:
            raw = self._table.first(token) if self._begins else self._table[token]
            self._begins = False
            text = self._decoder.decode(raw)
        if self._unstoppable > 0:
            self._unstoppable -= 1
            return text
        return self._find_stop(text)

    def _find_stop(self, text: str) -> str:
        certain, self.stopped = self._stops.push(text)
        return certain


class _Stops:
    """Finds the first of some strings in a text that comes in pieces, by the automaton of Knuth, Morris and Pratt.

    Of strings that end at the same place, the longest is found; which one does not depend on the pieces.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = sorted(set(stops), key=len, reverse=True)
        self._borders = [_borders(stop) for stop in self._stops]
        self._matched = [0] * len(self._stops)  # how much of each string the text ends with
        self._held = ""

    def push(self, text: str) -> tuple[str, str | None]:
        """Text that belongs to no stop string, and the string that was found."""
        if not self._stops:
            return text, None
        held = self._held + text
        for position, character in enumerate(text, len(self._held)):
            for index, stop in enumerate(self._stops):
                matched = self._matched[index]
                while matched and stop[matched] != character:
                    matched = self._borders[index][matched - 1]
                if stop[matched] == character:
                    matched += 1
                if matched == len(stop):
                    self._held = ""
                    return held[: position + 1 - len(stop)], stop
                self._matched[index] = matched
        certain = len(held) - max(self._matched)
        self._held = held[certain:]
        return held[:certain], None

    def release(self) -> str:
        """What was held back."""
        held, self._held = self._held, ""
        return held


def _borders(text: str) -> list[int]:
    """For each beginning of a text, the length of its longest proper beginning that is also its end."""
    borders = [0] * len(text)
    length = 0
    for position in range(1, len(text)):
        while length and text[position] != text[length]:
            length = borders[length - 1]
        if text[position] == text[length]:
            length += 1
        borders[position] = length
    return borders
