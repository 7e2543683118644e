"""Moesaic runs mixture-of-experts language models on the hardware that people own.

The public names are loaded on first use, so that `import moesaic` stays fast. This module knows nothing but where
each name lives.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from moesaic.engine.auto import AutoModelForCausalLM, AutoTokenizer
    from moesaic.engine.serving.llm import LLM
    from moesaic.engine.serving.params import SamplingParams
    from moesaic.errors import MoesaicError
    from moesaic.placement import load_plan, make_plan

__all__ = [
    "LLM",
    "AutoModelForCausalLM",
    "AutoTokenizer",
    "MoesaicError",
    "SamplingParams",
    "__version__",
    "load_plan",
    "make_plan",
]

__version__ = "0.1.0"

_HOMES = {
    "LLM": "moesaic.engine.serving.llm",
    "AutoModelForCausalLM": "moesaic.engine.auto",
    "AutoTokenizer": "moesaic.engine.auto",
    "MoesaicError": "moesaic.errors",
    "SamplingParams": "moesaic.engine.serving.params",
    "load_plan": "moesaic.placement",
    "make_plan": "moesaic.placement",
}


if not TYPE_CHECKING:  # a type checker would take every submodule for a result of this function

    def __getattr__(name: str) -> Any:
        if name not in _HOMES:
            raise AttributeError(f"module 'moesaic' has no attribute '{name}'")
        return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
