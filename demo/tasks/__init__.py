"""The tasks of the demo: each module draws questions of one kind, in English and Chinese.

A generator takes (random generator, language, accept(key), size) and returns an `Item`; `size` is the number of tokens
that the context may take, which only the retrieval tasks need.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from random import Random

from demo.items import Accept, Item, Language
from demo.tasks.arithmetic import addition, subtraction
from demo.tasks.counting import counting
from demo.tasks.ordering import reversing, sorting
from demo.tasks.retrieval import lookup, passkey
from demo.tasks.small_talk import small_talk

__all__ = ["LONG_TASKS", "TASKS", "Generator"]

Generator = Callable[[Random, Language, Accept, int], Item]

TASKS: Mapping[str, Generator] = {
    "addition": addition,
    "subtraction": subtraction,
    "sorting": sorting,
    "reversing": reversing,
    "counting": counting,
    "lookup": lookup,
    "passkey": passkey,
    "small_talk": small_talk,
}
LONG_TASKS = ("lookup", "passkey")
