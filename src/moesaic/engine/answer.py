"""What is asked of a conversation and what comes back: sampling options, and an answer with its timings.

It imports neither torch nor transformers, so that wrong options are refused before anything is loaded.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from moesaic.errors import ConfigError

__all__ = ["Answer", "Sampling"]


@dataclass(frozen=True, slots=True)
class Sampling:
    """How the next token is chosen; None leaves it to the model's `generation_config`.

    Attributes:
        max_tokens: most tokens to generate; None until the model stops or its context is full.
        temperature: 0 always takes the likeliest token.
        top_p: keep the likeliest tokens that together have this probability.
        top_k: keep this many of the likeliest tokens; 0 keeps all.
        seed: for the same answer again; None draws one.

    Raises:
        ConfigError: a value is out of range.
    """

    max_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    seed: int | None = None

    def __post_init__(self) -> None:
        ranges = {"max_tokens": (1, math.inf), "temperature": (0, 100), "top_p": (0, 1), "top_k": (0, math.inf)}
        for name, (low, high) in ranges.items():
            value = getattr(self, name)
            if value is not None and not low <= value <= high:  # neither is NaN
                upper = "" if high == math.inf else f" and at most {high}"
                raise ConfigError(f"{name} is {value}: expected at least {low}{upper}.")

    def asked(self) -> dict[str, float]:
        """The values that change the model's generation config, by their names there."""
        values = {"temperature": self.temperature, "top_p": self.top_p, "top_k": self.top_k}
        return {name: value for name, value in values.items() if value is not None}


@dataclass(slots=True)
class Answer:
    """What was generated, and how fast.

    Attributes:
        text: the answer without special tokens.
        finish_reason: the model stopped, the length was reached, or the caller stopped it.
        prompt_tokens: tokens of the prompt.
        cached_tokens: how many of them the cache still held.
        generated_tokens: tokens generated, the one that stops included.
        prefill_seconds: until the first token was chosen.
        decode_seconds: from there to the last.
        seed: that sampled it, None where nothing was sampled.
    """

    text: str = ""
    finish_reason: Literal["stop", "length", "interrupted"] = "stop"
    prompt_tokens: int = 0
    cached_tokens: int = 0
    generated_tokens: int = 0
    prefill_seconds: float = 0.0
    decode_seconds: float = 0.0
    seed: int | None = None

    @property
    def prefill_rate(self) -> float | None:
        """Prompt tokens computed per second; None before the first token."""
        return (self.prompt_tokens - self.cached_tokens) / self.prefill_seconds if self.prefill_seconds else None

    @property
    def decode_rate(self) -> float | None:
        """Tokens per second after the first; None if there was only one."""
        return (self.generated_tokens - 1) / self.decode_seconds if self.generated_tokens > 1 else None
