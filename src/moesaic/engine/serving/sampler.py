"""The next token of each answer of a step: penalties, bias and grammar, then a choice, and log-probabilities.

What a token depends on is the request alone: its logits, its parameters, and noise made of its seed and the position
in the answer. So it does not matter who else is in the batch, in which order, or whether a step is done again. This
module knows neither models nor schedulers.
"""

from __future__ import annotations

import hashlib
import math
import secrets
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from moesaic.engine.serving.choice import Filters, choose, largest, log_sum_exp
from moesaic.engine.serving.outputs import TokenLogprob
from moesaic.engine.serving.params import SamplingParams
from moesaic.engine.serving.penalties import Penalties
from moesaic.errors import GenerationError, LogitsError, RequestError
from moesaic.kernels.ops import argmax

__all__ = ["Matcher", "RequestSampler", "sample"]

# Where neither the request nor the model's generation_config says anything.
_DEFAULT_TEMPERATURE = 0.7
_DEFAULT_TOP_P = 0.95
_NAMES = ("temperature", "top_k", "top_p", "min_p")
_COLDEST = 1e-6
"""Below this, differences that float32 logits can have at all decide: the likeliest token is taken."""


class Matcher(Protocol):
    """What allows tokens: see `moesaic.engine.serving.grammar.GrammarMatcher`."""

    @property
    def is_finished(self) -> bool:
        """Whether no text can follow."""
        ...

    def mask_(self, row: NDArray[np.float32]) -> None:
        """Set the logits of tokens that may not come next to -inf, float32 `[vocab_size]`, in place."""
        ...

    def accept(self, token: int) -> None:
        """Go on by a token."""
        ...


class RequestSampler:
    """How the tokens of one answer are chosen, and which were.

    Where the request says nothing about temperature, top-k, top-p and min-p, the model's `generation_config` decides;
    as soon as it says one of them, tokens are drawn unless its temperature is 0, and the rest comes from there. Unlike
    transformers' `generate`, nothing is cut to 50 tokens where nobody asks for it.

    Args:
        params: the request's.
        defaults: the model's: `temperature`, `top_k`, `top_p`, `min_p`, `repetition_penalty`, `do_sample`.
        vocab_size: of the logits.
        prompt_ids: of the prompt.
        seed: of this answer; None draws one.
        matcher: of its grammar, if it has one; `accept` passes tokens on to it.
        eos_ids: tokens at which the model stops; not chosen before `params.min_tokens`.
        token_bytes: the bytes of a token, for log-probabilities.

    Attributes:
        seed: that tokens are drawn with; None if the likeliest is always taken.
        position: tokens of the answer so far.
        matcher: as given.

    Raises:
        RequestError: the bias or the prompt names a token outside the vocabulary.
        GenerationError: a value of `defaults` that would be used is out of range.
    """

    def __init__(
        self,
        params: SamplingParams,
        defaults: Mapping[str, Any],
        vocab_size: int,
        prompt_ids: Iterable[int],
        seed: int | None = None,
        matcher: Matcher | None = None,
        *,
        eos_ids: Collection[int] = (),
        token_bytes: Callable[[int], bytes] | None = None,
    ) -> None:
        _check_defaults(params, defaults)
        self.params, self.matcher, self.position = params, matcher, 0
        self.filters = _filters(params, defaults)
        self.seed: int | None = None
        if self.filters is not None:
            self.seed = secrets.randbits(31) if seed is None else seed
            self._key = hashlib.blake2b(f"{self.seed:x}".encode(), digest_size=32).digest()
        repetition = params.repetition_penalty
        if repetition is None:
            repetition = 1.0 if defaults.get("repetition_penalty") is None else float(defaults["repetition_penalty"])
        self._penalties = Penalties(params, repetition, vocab_size, prompt_ids)
        stops = {*params.stop_token_ids, *(() if params.ignore_eos else eos_ids)}
        self._stop_ids = np.array([token for token in stops if 0 <= token < vocab_size], np.int64)
        self._token_bytes = token_bytes

    @property
    def takes_likeliest(self) -> bool:
        """Whether all that is needed of the next logits, as the model gives them, is which is the largest."""
        plain = self.filters is None and self.matcher is None and self.params.logprobs is None
        return plain and not self._is_early and not self._penalties.active

    @property
    def _is_early(self) -> bool:
        """Whether the answer may not end yet."""
        return self.position < self.params.min_tokens and self._stop_ids.size > 0

    def accept(self, token: int) -> None:
        """The next token of the answer is this one."""
        self.position += 1
        self._penalties.accept(token)
        if self.matcher is not None and not self.matcher.is_finished:
            self.matcher.accept(token)

    def adjusted(self, row: NDArray[np.float32]) -> NDArray[np.float32]:
        """The logits that a token is chosen by, `[vocab_size]`; those of the model themselves if nothing changes."""
        grammar = self.matcher is not None
        early = self._is_early
        if not (grammar or early or self._penalties.active):
            return row
        row = row.copy()
        self._penalties.apply_(row)
        if self.matcher is not None:
            self.matcher.mask_(row)
        if early:
            stops = row[self._stop_ids]
            row[self._stop_ids] = -np.inf
            if grammar and row.max() == -np.inf:  # the grammar allows nothing else
                row[self._stop_ids] = stops
        return row

    def noise(self, index: int = 0) -> float:
        """At least 0 and below 1; a function of seed, position and index."""
        place = self.position.to_bytes(8, "little") + index.to_bytes(8, "little")
        digest = hashlib.blake2b(place, digest_size=8, key=self._key).digest()
        return (int.from_bytes(digest, "little") >> 11) * 2.0**-53

    def raw(self, token: int) -> bytes:
        """A token's bytes; empty if nobody knows them."""
        return b"" if self._token_bytes is None else self._token_bytes(token)


def sample(logits: torch.Tensor, samplers: Sequence[RequestSampler]) -> tuple[list[int], list[TokenLogprob | None]]:
    """Choose the next token of each answer. Nothing is changed: `accept` takes the tokens over.

    Args:
        logits: float32 `[answers, vocab_size]` on the CPU; not changed.
        samplers: of the answers.

    Returns:
        Tokens, and log-probabilities by the logits as the model gave them, for those who asked.

    Raises:
        LogitsError: logits of an answer are no numbers, or none of its tokens is allowed; `row` says whose. The others
            may be sampled again without it.
    """
    if logits.dtype != torch.float32 or logits.dim() != 2 or logits.shape[0] != len(samplers):
        raise LogitsError(
            f"logits are {logits.dtype} {list(logits.shape)}: expected float32, one row for each of {len(samplers)}.", 0
        )
    tokens: list[int] = []
    logprobs: list[TokenLogprob | None] = []
    likeliest = argmax(logits).tolist()
    for index, (row, sampler) in enumerate(zip(logits.detach().numpy(), samplers, strict=True)):
        token = _sample_row(row, sampler, index, likeliest[index])
        tokens.append(token)
        logprobs.append(None if sampler.params.logprobs is None else _logprob(row, token, sampler))
    return tokens, logprobs


def _sample_row(row: NDArray[np.float32], sampler: RequestSampler, index: int, likeliest: int) -> int:
    if not math.isfinite(row[likeliest]):  # the first NaN, if there is one
        raise LogitsError(
            f"the model's logits are no numbers: {row[likeliest]} for token {likeliest}. Its weights may be damaged.",
            index,
        )
    try:
        adjusted = sampler.adjusted(row)
    except GenerationError as error:  # of the grammar
        raise LogitsError(str(error), index) from error
    if adjusted is not row:
        likeliest = int(adjusted.argmax())
        if not np.isfinite(adjusted[likeliest]):
            raise LogitsError("no token is allowed: grammar, bias and minimum length leave none.", index)
    if sampler.filters is None:
        return likeliest
    return choose(adjusted, sampler.filters, sampler.noise)


def _logprob(row: NDArray[np.float32], token: int, sampler: RequestSampler) -> TokenLogprob:
    norm = log_sum_exp(row)
    count = sampler.params.logprobs or 0
    top: list[TokenLogprob] = []
    if count:
        ids = largest(row, count)
        order = np.argsort(-row[ids], kind="stable")[:count]  # of equal ones the first
        top = [TokenLogprob(int(i), sampler.raw(int(i)), float(row[i]) - norm) for i in ids[order]]
    return TokenLogprob(token, sampler.raw(token), float(row[token]) - norm, tuple(top))


def _filters(params: SamplingParams, defaults: Mapping[str, Any]) -> Filters | None:
    """What is kept; None if the likeliest token is always taken."""
    asked = {name: value for name in _NAMES if (value := getattr(params, name)) is not None}
    stored = {name: defaults[name] for name in _NAMES if defaults.get(name) is not None and name not in asked}
    values = stored | asked
    if not asked:
        sampled = defaults.get("do_sample")
        if sampled is None and "temperature" not in stored:
            values |= {"temperature": _DEFAULT_TEMPERATURE, "top_p": _DEFAULT_TOP_P}
        elif not sampled:
            return None
    if values.get("temperature", 1.0) < _COLDEST:
        return None
    return Filters(
        float(values.get("temperature", 1.0)),
        int(values.get("top_k", 0)),
        float(values.get("top_p", 1.0)),
        float(values.get("min_p", 0.0)),
    )


def _check_defaults(params: SamplingParams, defaults: Mapping[str, Any]) -> None:
    """Refuse values of a model's file that cannot be used, unless the request has its own."""
    for name in (*_NAMES, "repetition_penalty"):
        value = defaults.get(name)
        if value is None or getattr(params, name) is not None:
            continue
        try:
            whole = isinstance(value, float) and value.is_integer()  # JSON has one kind of number
            wanted: dict[str, Any] = {name: int(value) if whole else value}
            SamplingParams(**wanted)
        except (RequestError, TypeError) as error:
            raise GenerationError(
                f"the model's generation_config has {name} = {value!r}, which cannot be used: ask for another {name}."
            ) from error
