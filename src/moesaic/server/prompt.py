"""Text to tokens and back, such that what a client wrote never becomes a special token.

In a rendered conversation the template's own special tokens are told from equal text of a client's as follows. Where a
client's text spells one out, a private character that occurs nowhere takes its place before rendering, and is encoded
as plain text afterwards. Against tokens that only come about by rendering (a name between the template's `<` and `>`),
the conversation is rendered again with every text of the client's blotted out: the special tokens of both have to be
the same ones. A conversation without such texts has exactly the tokens that transformers gives it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from typing import Any

from tokenizers import Tokenizer

from moesaic.errors import RequestError, TokenizerError
from moesaic.server.parsers.markers import find_any

__all__ = ["Codec", "Mask", "Rename", "blot_out"]

Rename = Callable[[str], str]
"""Applied to every text of a client's in a conversation."""

_PRIVATE = range(0xE000, 0xF900)


class Codec:
    """A tokenizer's two ways of reading text: with names of special tokens, and without.

    Args:
        tokenizer: of transformers, a fast one.
        template: source of the chat template; added tokens of which it speaks are special here, whatever they are
            marked as.
        markers: further such texts.

    Raises:
        TokenizerError: it is not a fast tokenizer.
    """

    def __init__(self, tokenizer: Any, template: str = "", markers: Sequence[str] = ()) -> None:
        backend = getattr(tokenizer, "backend_tokenizer", None)
        if not isinstance(backend, Tokenizer):
            kind = type(tokenizer).__name__
            raise TokenizerError(f"a {kind} cannot be served: expected a tokenizer with a tokenizer.json.")
        description = json.loads(backend.to_str())
        description["truncation"] = description["padding"] = None
        self._usual = Tokenizer.from_str(json.dumps(description))
        self._special: dict[str, int] = {}  # shown as text only on demand
        self._controls: dict[str, int] = {}
        for entry in description["added_tokens"]:
            text = entry["content"]
            if entry["special"]:
                self._special[text] = entry["id"]
            control = entry["special"] or (not text.isspace() and (text in template or text in markers))
            if control and text:
                self._controls[text] = entry["id"]
            entry["special"] = control
        self._plain = Tokenizer.from_str(json.dumps(description))
        self._plain.encode_special_tokens = True
        self._control_ids = frozenset(self._controls.values())
        self.pattern = find_any(self._controls)
        self.size = 1 + max(self._usual.get_vocab(with_added_tokens=True).values(), default=0)

    @property
    def special(self) -> dict[str, int]:
        """Special tokens, which an answer's text does not show unless asked."""
        return dict(self._special)

    def plain(self, text: str, add_special_tokens: bool = False) -> list[int]:
        """Tokens of text in which names of special tokens are text.

        Raises:
            RequestError: the vocabulary itself makes a special token of it.
        """
        ids = _encode(self._plain, text)
        if not self._control_ids.isdisjoint(ids):
            raise RequestError("the text holds a special token of the model's that cannot be taken as text.", "prompt")
        if add_special_tokens:
            ids = _encode(self._plain, text, add_special_tokens=True)
        return ids

    def usual(self, text: str) -> list[int]:
        """Tokens of text as templates write it: names of special tokens are those tokens."""
        return _encode(self._usual, text)

    def controls(self, text: str) -> list[str]:
        """The special tokens in a text, in order, also those that are there only once it is normalised."""
        found = self.pattern.findall(text)
        normalizer = self._usual.normalizer
        normalized = normalizer.normalize_str(text) if normalizer is not None else text
        return found if normalized == text else [*found, *self.pattern.findall(normalized)]

    def rendered(self, text: str, mask: Mask) -> list[int]:
        """Tokens of a rendered conversation, with masked texts as text."""
        if not mask.used:
            return self.usual(text)
        ids: list[int] = []
        done = 0
        hidden = re.compile(f"[{''.join(mask.used)}]")
        while (found := hidden.search(text, done)) is not None:
            start = max((match.end() for match in self.pattern.finditer(text, done, found.start())), default=done)
            after = self.pattern.search(text, found.end())
            end = after.start() if after is not None else len(text)
            ids += self.usual(text[done:start])
            ids += self.plain(mask.undo(text[start:end]))
            done = end
        return ids + self.usual(text[done:])

    def check(self, ids: Sequence[int]) -> None:
        """Refuse numbers that are no tokens."""
        if any(not 0 <= number < self.size for number in ids):
            raise RequestError(f"tokens are numbers from 0 to {self.size - 1} for this model.", "tokens")

    def decode(self, ids: Sequence[int]) -> str:
        """Text of tokens, special ones included."""
        self.check(ids)
        text: str = self._usual.decode(list(ids), skip_special_tokens=False)
        return text


def _encode(tokenizer: Tokenizer, text: str, add_special_tokens: bool = False) -> list[int]:
    """Token ids; other threads go on meanwhile, as they do not while `encode` takes a text that is not in a list."""
    ids: list[int] = tokenizer.encode_batch_fast([text], add_special_tokens=add_special_tokens)[0].ids
    return ids


class Mask:
    """Puts private characters in place of special tokens in a client's texts.

    Args:
        codec: knows the special tokens.
        texts: all of the client's.
    """

    def __init__(self, codec: Codec, texts: Sequence[str]) -> None:
        self._pattern = codec.pattern
        found = sorted({match for text in texts for match in codec.pattern.findall(text)})
        self.used: dict[str, str] = {}
        free = (chr(code) for code in _PRIVATE if not self._occurs(code, texts)) if found else iter(())
        for text in found:
            character = next(free, None)
            if character is None:
                raise RequestError("the conversation holds too many private characters.", "messages")
            self.used[character] = text
        self._characters = {text: character for character, text in self.used.items()}

    @staticmethod
    def _occurs(code: int, texts: Sequence[str]) -> bool:
        return any(chr(code) in text or f"\\u{code:04x}" in text for text in texts)

    def __call__(self, text: str) -> str:
        """The text with its special tokens masked."""
        return self._pattern.sub(lambda match: self._characters.get(match[0], match[0]), text) if self.used else text

    def undo(self, text: str) -> str:
        """The text as it was; also where the template wrote characters as JSON escapes."""
        for character, original in self.used.items():
            text = text.replace(character, original)
        return text

    def plain_escapes(self, text: str) -> str:
        """A rendered text in which the private characters are no JSON escapes, as some templates write them."""
        for character in self.used:
            text = text.replace(f"\\u{ord(character):04x}", character)
        return text


def blot_out(text: str) -> str:
    """A text of the same length and blanks that says nothing."""
    return re.sub(r"\S", "x", text)
