"""The questions that the demo is judged by; training never sees their keys."""

from __future__ import annotations

from random import Random

from demo.items import Item, Language, accept_split
from demo.tasks import TASKS

__all__ = ["MAX_CONTEXT", "held_out_items"]

MAX_CONTEXT = 7600
_MIN_CONTEXT = 100


def held_out_items(
    task: str, language: Language, num_items: int, seed: int = 1, max_context: int = MAX_CONTEXT
) -> list[Item]:
    """Held-out questions of one task, always the same for the same arguments.

    Args:
        task: a key of `demo.tasks.TASKS`.
        language: language of the questions.
        num_items: how many.
        seed: which.
        max_context: the contexts of retrieval tasks grow evenly from 100 to about this many tokens.
    """
    rng = Random(f"{seed}-{task}-{language}")
    accept = accept_split(held_out=True)
    step = (max_context - _MIN_CONTEXT) / max(1, num_items - 1)
    return [TASKS[task](rng, language, accept, int(_MIN_CONTEXT + step * i)) for i in range(num_items)]
