"""How a model's authors want it sampled and where it stops, as requests that leave it open get it.

It knows generation configs and tokenizers of the model library, and nothing of how tokens are drawn.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from transformers import GenerationConfig

__all__ = ["GenerationDefaults"]

# Where neither the request nor the model's generation_config says anything.
_TEMPERATURE, _TOP_P = 0.7, 0.95
_FIELDS = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")


@dataclass(frozen=True, slots=True)
class GenerationDefaults:
    """What holds where a request says nothing.

    Attributes:
        sampling: by the names in `SamplingParams`; always with a temperature, 0 for a model that is not sampled.
        stop_ids: tokens at which the model ends an answer.
    """

    sampling: dict[str, Any] = field(default_factory=lambda: {"temperature": 0.0})
    stop_ids: frozenset[int] = frozenset()

    @classmethod
    def of(cls, config: GenerationConfig | None, tokenizer: Any = None) -> GenerationDefaults:
        """As the session of one user takes them: what the config says, its end tokens and the tokenizer's."""
        stored = {} if config is None else config.to_diff_dict()
        sampling = {name: stored[name] for name in _FIELDS if stored.get(name) is not None}
        if stored.get("do_sample") is None and "temperature" not in sampling:
            sampling |= {"temperature": _TEMPERATURE, "top_p": _TOP_P}
        elif not stored.get("do_sample"):
            sampling["temperature"] = 0.0
        sampling.setdefault("temperature", 1.0)
        stops = stored.get("eos_token_id")
        ids = {int(each) for each in (stops if isinstance(stops, list | tuple) else [stops]) if each is not None}
        own = getattr(tokenizer, "eos_token_id", None)
        return cls(sampling, frozenset(ids if own is None else ids | {int(own)}))
