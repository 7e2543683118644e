"""How a model's authors want it sampled and where it stops: what holds where a request says nothing.

It knows generation configs and tokenizers of the model library, and nothing of how tokens are drawn.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from transformers import GenerationConfig

__all__ = ["GenerationDefaults"]

_FIELDS = ("do_sample", "temperature", "top_k", "top_p", "min_p", "repetition_penalty")


@dataclass(frozen=True, slots=True)
class GenerationDefaults:
    """What the model says.

    Attributes:
        sampling: what its generation config says of `do_sample`, `temperature`, `top_k`, `top_p`, `min_p` and
            `repetition_penalty`; see `RequestSampler` for what follows.
        stop_ids: tokens at which it ends an answer.
    """

    sampling: Mapping[str, Any] = field(default_factory=dict)
    stop_ids: frozenset[int] = frozenset()

    @classmethod
    def of(cls, config: GenerationConfig | None, tokenizer: Any = None) -> GenerationDefaults:
        """Of a generation config; the tokenizer's end token stops an answer too."""
        stored = {} if config is None else config.to_diff_dict()
        stops = stored.get("eos_token_id")
        ids = {int(each) for each in (stops if isinstance(stops, list | tuple) else [stops]) if each is not None}
        own = getattr(tokenizer, "eos_token_id", None)
        return cls(
            {name: stored[name] for name in _FIELDS if stored.get(name) is not None},
            frozenset(ids if own is None else ids | {int(own)}),
        )
