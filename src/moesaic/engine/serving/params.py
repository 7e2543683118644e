"""What a request asks for: how tokens are chosen, when to stop, what comes back beside the text.

It imports neither torch nor transformers, so that wrong parameters are refused before anything is loaded. It does not
know how any of it is done.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from numbers import Integral, Real
from types import MappingProxyType
from typing import Literal

from moesaic.errors import RequestError

__all__ = ["Grammar", "SamplingParams"]

MAX_LOGPROBS = 20
"""Most alternatives per token that a request may ask for."""
_NOTHING: Mapping[int, float] = MappingProxyType({})
_RANGES: dict[str, tuple[float, float]] = {
    "n": (1, 128),
    "max_tokens": (0, math.inf),
    "min_tokens": (0, math.inf),
    "temperature": (0, 100),
    "top_k": (0, math.inf),
    "top_p": (0, 1),
    "min_p": (0, 1),
    "repetition_penalty": (0.01, 100),
    "presence_penalty": (-2, 2),
    "frequency_penalty": (-2, 2),
    "logprobs": (0, MAX_LOGPROBS),
}
_WHOLE = ("n", "max_tokens", "min_tokens", "top_k", "seed", "logprobs")


@dataclass(frozen=True, slots=True)
class Grammar:
    """What the text has to look like.

    Attributes:
        kind: "json_schema", "json_object" (any JSON object; no text), "regex", or "lark" (llguidance's dialect).
        text: the schema as JSON, the expression, or the grammar.
    """

    kind: Literal["json_schema", "json_object", "regex", "lark"]
    text: str = ""


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How a request is answered; None leaves it to the model's `generation_config`.

    Attributes:
        n: answers to the same prompt.
        max_tokens: most tokens of an answer; None until the model stops or the context is full; 0: only the prompt.
        min_tokens: no stop before so many tokens.
        temperature: 0 always takes the likeliest token.
        top_k: keep so many of the likeliest tokens; 0 keeps all.
        top_p: keep the likeliest tokens that together have this probability (after the temperature).
        min_p: keep tokens at least this fraction as likely as the likeliest.
        repetition_penalty: divides (or multiplies negative) logits of tokens in prompt or answer (arXiv 1909.05858).
        presence_penalty: subtracted from logits of tokens in the answer.
        frequency_penalty: subtracted once for every time that a token is in the answer.
        logit_bias: added to logits of these tokens.
        seed: for the same answer again, whoever else is served; None draws one. Answer i uses seed + i.
        stop: the answer ends before the first of these; one text may stand alone.
        stop_token_ids: the answer ends with one of these, beside the model's own.
        ignore_eos: go on where the model would stop.
        logprobs: report the chosen tokens' log-probabilities (of the unmodified logits) and so many alternatives.
        grammar: only text of this form is generated.
        skip_special_tokens: special tokens give no text.

    Raises:
        RequestError: a value has a wrong type or is out of range; `param` names it.
    """

    n: int = 1
    max_tokens: int | None = None
    min_tokens: int = 0
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=lambda: _NOTHING)
    seed: int | None = None
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    logprobs: int | None = None
    grammar: Grammar | None = None
    skip_special_tokens: bool = True

    def __post_init__(self) -> None:
        self._check_types()
        for name, (low, high) in _RANGES.items():
            value = getattr(self, name)
            if value is not None and not low <= value <= high:  # neither is NaN
                upper = "" if high == math.inf else f" and at most {high}"
                raise RequestError(f"{name} is {value}: expected at least {low}{upper}.", name)
        if any(not text for text in self.stop):
            raise RequestError("stop holds an empty string: expected text at which to stop.", "stop")
        if any(not math.isfinite(bias) or abs(bias) > 100 for bias in self.logit_bias.values()):
            raise RequestError("logit_bias holds a value that is not between -100 and 100.", "logit_bias")

    def _check_types(self) -> None:
        """Refuse what would fail, or mean something else, in the middle of an answer."""
        for name in (*_RANGES, "seed"):
            value, whole = getattr(self, name), name in _WHOLE
            if value is not None and not isinstance(value, Integral if whole else Real):
                raise RequestError(f"{name} is {value!r}: expected a {'whole ' * whole}number.", name)
        if isinstance(self.stop, str):
            object.__setattr__(self, "stop", (self.stop,))
        for name, kind, expected in (("stop", str, "texts"), ("stop_token_ids", Integral, "numbers of tokens")):
            values = getattr(self, name)
            if not isinstance(values, Iterable) or not all(isinstance(value, kind) for value in values):
                raise RequestError(f"{name} is {values!r}: expected {expected}.", name)
        if not all(isinstance(token, Integral) and isinstance(bias, Real) for token, bias in self.logit_bias.items()):
            raise RequestError("logit_bias: expected a number for each number of a token.", "logit_bias")
