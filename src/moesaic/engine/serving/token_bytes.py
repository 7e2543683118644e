"""The bytes that each token stands for, which need not be whole characters.

Byte-level vocabularies spell every byte as a character of its own; those of SentencePiece have tokens `<0x0A>` for
bytes without a token. Any other token's bytes are the text that it adds after another token. Tables are made as tokens
come by and kept as long as their tokenizer.
"""

from __future__ import annotations

import json
import re
import weakref
from typing import Any

from transformers import PreTrainedTokenizerBase

__all__ = ["TokenTable", "token_bytes"]

_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_tables: weakref.WeakKeyDictionary[PreTrainedTokenizerBase, TokenTable] = weakref.WeakKeyDictionary()


class TokenTable:
    """Bytes of the tokens of one tokenizer; use `TokenTable.of`, which keeps them.

    Attributes:
        special_ids: tokens that `skip_special_tokens` leaves out.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        # No reference to the tokenizer itself: it is the key under which this table is kept.
        self._tokenizer = weakref.ref(tokenizer)
        self._bytes: dict[int, bytes] = {}
        self.special_ids = _special_ids(tokenizer)
        kinds = _kinds_of_decoders(tokenizer)
        self._byte_level = _byte_level_alphabet() if "ByteLevel" in kinds else None
        self._byte_tokens = "ByteFallback" in kinds or not kinds
        self._anchor = None if self._byte_level else self._find_anchor(tokenizer)

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase) -> TokenTable:
        """The table of a tokenizer."""
        table = _tables.get(tokenizer)
        if table is None:
            table = _tables.setdefault(tokenizer, cls(tokenizer))
        return table

    def __getitem__(self, token: int) -> bytes:
        """Bytes that a token adds to a text; none for a number that is no token."""
        found = self._bytes.get(token)
        if found is None:
            found = self._bytes[token] = self._make(token)
        return found

    def first(self, token: int) -> bytes:
        """Bytes of a token with which a text begins: some tokenizers leave a space out there."""
        raw = self[token]
        if self._byte_level is not None or not raw.startswith(b" "):
            return raw
        return self._decode([token]).encode()

    def _make(self, token: int) -> bytes:
        name = self._name(token)
        if name is None:
            return b""
        if self._byte_level is not None:
            spelled = [self._byte_level.get(character) for character in name]
            # A name with characters outside of the alphabet, as added tokens may have, stands for itself.
            return name.encode() if None in spelled else bytes(byte for byte in spelled if byte is not None)
        byte = _BYTE_TOKEN.fullmatch(name) if self._byte_tokens else None
        if byte is not None:
            return bytes.fromhex(byte[1])
        if self._anchor is None:
            return self._decode([token]).encode()
        anchor = self._decode([self._anchor])
        return self._decode([self._anchor, token])[len(anchor) :].encode()

    def _name(self, token: int) -> str | None:
        try:
            name = self._tokenizer_now().convert_ids_to_tokens(int(token)) if token >= 0 else None
        except (IndexError, KeyError, OverflowError):
            return None
        return name if isinstance(name, str) else None

    def _find_anchor(self, tokenizer: PreTrainedTokenizerBase) -> int | None:
        """A token after which others are decoded, to see what they add to a text."""
        for token in range(len(tokenizer)):
            text = self._decode([token])
            if text.isascii() and text.isalpha() and self._decode([token, token]).startswith(text):
                return token
        return None

    def _decode(self, ids: list[int]) -> str:
        text = self._tokenizer_now().decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        return str(text)

    def _tokenizer_now(self) -> Any:
        tokenizer = self._tokenizer()
        assert tokenizer is not None, "whoever asks has the tokenizer"
        return tokenizer


def token_bytes(tokenizer: PreTrainedTokenizerBase, token: int) -> bytes:
    """The bytes that a token adds to a text, exactly, even if they are only part of a character."""
    return TokenTable.of(tokenizer)[token]


def _special_ids(tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    added = getattr(tokenizer, "added_tokens_decoder", {})
    marked = {token for token, entry in added.items() if getattr(entry, "special", False)}
    return frozenset(marked | set(tokenizer.all_special_ids))


def _kinds_of_decoders(tokenizer: PreTrainedTokenizerBase) -> set[str]:
    """Types of the steps by which a fast tokenizer decodes; empty for others."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    decoder = None if backend is None else backend.decoder
    if decoder is None:
        return set()
    state = decoder.__getstate__()  # the part of tokenizer.json that describes it
    description = json.loads(state)
    return {step["type"] for step in description.get("decoders", [description])}


def _byte_level_alphabet() -> dict[str, int]:
    """Which byte a character of a byte-level vocabulary stands for (GPT-2).

    Printable bytes are written as themselves, the others as characters from 256 on.
    """
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [byte for byte in range(256) if byte not in printable]
    alphabet = {chr(byte): byte for byte in printable}
    return alphabet | {chr(256 + index): byte for index, byte in enumerate(others)}
