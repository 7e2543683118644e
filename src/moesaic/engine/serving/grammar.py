"""Grammars as masks of tokens, by llguidance: JSON schemas, JSON objects, regular expressions, its Lark dialect.

A `GrammarVocabulary` is made once per model, a `CompiledGrammar` per grammar, a `GrammarMatcher` per answer.
`GrammarCompiler` (grammar_compiler.py) compiles what comes from strangers. This module knows no sampling.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable
from copy import copy
from dataclasses import dataclass

import llguidance
import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from moesaic.engine.serving.grammar_trial import TokenizerSource, build_matcher
from moesaic.engine.serving.params import Grammar
from moesaic.errors import GenerationError, TokenizerError

__all__ = ["CompiledGrammar", "GrammarMatcher", "GrammarVocabulary", "compile_grammar"]


class GrammarVocabulary:
    """The tokens of a model, as grammars see them.

    Args:
        tokenizer: the model's; a fast one.
        vocab_size: of the logits: rows without a token are never allowed, tokens without a row do not matter.
        eos_ids: tokens at which the model stops; the tokenizer's own if there are none.

    Attributes:
        source: what the tokenizer is made of.
        vocab_size: of the logits.

    Raises:
        TokenizerError: it is no fast tokenizer, or nothing says how answers end.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, vocab_size: int, eos_ids: Iterable[int] = ()) -> None:
        backend = getattr(tokenizer, "backend_tokenizer", None)
        if backend is None:
            raise TokenizerError(
                f"grammars need a tokenizer with a tokenizer.json: {type(tokenizer).__name__} has none."
            )
        ends = list(dict.fromkeys(eos_ids)) or ([] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id])
        if not ends:
            raise TokenizerError("grammars need a token that ends an answer: this model has none.")
        backend = copy(backend)
        backend.no_padding()
        backend.no_truncation()
        self.vocab_size = vocab_size
        self.source = TokenizerSource(backend.to_str(), max(vocab_size, len(tokenizer)), ends)
        self._lock = threading.Lock()
        self._made: llguidance.LLTokenizer | None = None

    def tokenizer(self) -> llguidance.LLTokenizer:
        """The tokenizer of llguidance, made when it is first asked for."""
        with self._lock:
            if self._made is None:
                try:
                    self._made = self.source.make()
                except ValueError as error:
                    raise TokenizerError(f"this model's tokenizer takes no grammars: {error}") from error
            return self._made


class GrammarMatcher:
    """Where one answer is in its grammar."""

    def __init__(self, matcher: llguidance.LLMatcher) -> None:
        self._matcher = matcher

    def copy(self) -> GrammarMatcher:
        """Another one at the same place, that goes its own way."""
        return GrammarMatcher(self._matcher.deep_copy())

    @property
    def is_complete(self) -> bool:
        """Whether the text so far is what the grammar asks for; it may be allowed to go on."""
        return bool(self._matcher.is_accepting())

    @property
    def is_finished(self) -> bool:
        """Whether it is complete and nothing can follow: the answer ends here, whatever the model would say next."""
        return bool(self._matcher.is_stopped() and not self._matcher.is_error())

    def mask_(self, row: NDArray[np.float32]) -> None:
        """Set logits, float32 `[vocab_size]`, of tokens that may not come next to -inf, in place.

        Tokens that end the answer are allowed once the text is complete, and only those when it is finished.

        Raises:
            GenerationError: the grammar became too complex.
        """
        bits = np.unpackbits(np.frombuffer(self._matcher.compute_bitmask(), np.uint8), bitorder="little")
        self._check()
        np.copyto(row, np.float32(-np.inf), where=bits[: row.size] == 0)

    def accept(self, token: int) -> None:
        """Go on by a token.

        Raises:
            GenerationError: the grammar does not allow it here.
        """
        self._matcher.consume_token(token)
        self._check()

    def _check(self) -> None:
        if self._matcher.is_error():
            reason = " ".join(self._matcher.get_error().replace("<non-verbose/>", "").split())
            raise GenerationError(f"the grammar cannot go on: {reason[:300]}")


@dataclass(frozen=True, slots=True)
class CompiledGrammar:
    """A grammar for one vocabulary; any number of answers may use it, from any thread."""

    grammar: Grammar
    start: GrammarMatcher

    def matcher(self) -> GrammarMatcher:
        """A matcher for a new answer."""
        return self.start.copy()


def compile_grammar(grammar: Grammar, vocabulary: GrammarVocabulary) -> CompiledGrammar:
    """Compile a grammar here and now. It may take very long: use `GrammarCompiler` where others wait.

    Raises:
        RequestError: the grammar is wrong, too large, or nothing fits it.
        TokenizerError: the tokenizer takes no grammars.
    """
    matcher = build_matcher(grammar, vocabulary.tokenizer())
    return CompiledGrammar(grammar, GrammarMatcher(matcher))
