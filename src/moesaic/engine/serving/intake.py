"""Requests as they come in: refused, or made into answers that a scheduler may begin.

It knows tokenizer and vocabulary, and neither whose turn it is nor what computes.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from moesaic.engine.serving.answer import Answer
from moesaic.engine.serving.defaults import GenerationDefaults
from moesaic.engine.serving.outputs import RequestStats
from moesaic.engine.serving.params import SamplingParams
from moesaic.engine.serving.sampler import RequestSampler
from moesaic.engine.serving.text import Detokenizer
from moesaic.engine.serving.token_bytes import token_bytes
from moesaic.errors import ContextError, RequestError, TokenizerError

if TYPE_CHECKING:
    from moesaic.engine.serving.grammar import GrammarVocabulary

__all__ = ["Intake"]

_PROMPT_TAIL = 8
"""Last tokens of a prompt, whose text the first of the answer may depend on."""


class Intake:
    """Makes answers of requests.

    Args:
        tokenizer: of the model library; None: tokens without text.
        defaults: what holds where a request says nothing.
        vocab_size: of the logits.
        context_length: most tokens of prompt and answer.
    """

    def __init__(self, tokenizer: Any, defaults: GenerationDefaults, vocab_size: int, context_length: int) -> None:
        self._tokenizer, self._defaults = tokenizer, defaults
        self._vocab_size, self._context_length = vocab_size, context_length
        self._token_bytes = None if tokenizer is None else partial(token_bytes, tokenizer)

    def grammar_vocabulary(self) -> GrammarVocabulary:
        """What grammars are compiled for; made anew.

        Raises:
            TokenizerError: there is no tokenizer, or it takes no grammars.
        """
        from moesaic.engine.serving.grammar import GrammarVocabulary  # what it needs is needed for nothing else

        if self._tokenizer is None:
            raise TokenizerError("grammars need a tokenizer, and this model has none.")
        return GrammarVocabulary(self._tokenizer, self._vocab_size, self._defaults.stop_ids)

    def check(self, prompt_ids: Sequence[int], params: SamplingParams) -> None:
        """Refuse what cannot be answered.

        Raises:
            RequestError: the prompt is empty or too long, or something names a token that the model does not have.
        """
        if not prompt_ids:
            raise RequestError("the prompt is empty: nothing to continue.", "prompt")
        least = 0 if params.max_tokens == 0 else 1
        if len(prompt_ids) + least > self._context_length:
            raise ContextError(len(prompt_ids), self._context_length)
        vocab_size = self._vocab_size
        for name, ids in (
            ("prompt", prompt_ids),
            ("stop_token_ids", params.stop_token_ids),
            ("logit_bias", params.logit_bias),
        ):
            if ids and not (min(ids) >= 0 and max(ids) < vocab_size):
                wrong = min(ids) if min(ids) < 0 else max(ids)
                raise RequestError(f"{name} has token {wrong}: expected 0 to {vocab_size - 1}.", name)

    def answers(
        self, request_id: str, prompt_ids: Sequence[int], params: SamplingParams, matchers: Sequence[Any], now: float
    ) -> list[Answer]:
        """The answers to a request that `check` lets pass, nothing of them computed.

        Raises:
            GenerationError: what the model says of sampling cannot be used.
        """
        return [
            self._answer(request_id, index, prompt_ids, params, matchers[index] if matchers else None, now)
            for index in range(params.n)
        ]

    def _answer(
        self, request_id: str, index: int, prompt_ids: Sequence[int], params: SamplingParams, matcher: Any, now: float
    ) -> Answer:
        room = self._context_length - len(prompt_ids)
        eos_ids = frozenset() if params.ignore_eos else self._defaults.stop_ids
        sampler = RequestSampler(
            params,
            self._defaults.sampling,
            self._vocab_size,
            prompt_ids,
            None if params.seed is None else params.seed + index,
            matcher,
            eos_ids=eos_ids,
            token_bytes=self._token_bytes,
        )
        tokenizer = self._tokenizer
        return Answer(
            ids=list(prompt_ids),
            request_id=request_id,
            index=index,
            params=params,
            sampler=sampler,
            text=None if tokenizer is None else Detokenizer(tokenizer, params, prompt_ids[-_PROMPT_TAIL:]),
            stop_ids=eos_ids | frozenset(params.stop_token_ids),
            limit=room if params.max_tokens is None else min(params.max_tokens, room),
            added=now,
            stats=RequestStats(prompt_tokens=len(prompt_ids), seed=sampler.seed),
        )
