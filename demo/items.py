"""What one question of the demo is, and which questions training never sees.

An item belongs to the held-out split by a hash of what makes it that question (operands, list, secret), never by its
wording: 7 + 5 asked in Chinese is held out exactly when it is held out in English.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from random import Random
from typing import Literal, TypeVar

__all__ = [
    "LANGUAGES",
    "Accept",
    "Item",
    "Language",
    "Turn",
    "accept_split",
    "draw_until",
    "is_held_out",
    "pick",
    "vary",
]

Language = Literal["en", "zh"]
LANGUAGES: tuple[Language, ...] = ("en", "zh")
Accept = Callable[[str], bool]

_HELD_OUT_SHARE = 32  # one key in 32

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Turn:
    """One question and its only right answer."""

    prompt: str
    answer: str


@dataclass(frozen=True, slots=True)
class Item:
    """A question that can be verified.

    Attributes:
        task: name of the task, a key of `demo.tasks.TASKS`.
        language: language of the prompt and the answer.
        key: what makes this question itself, whatever its wording; decides the split.
        turn: the question and its answer.
        follow_ups: further questions about the same prompt (long contexts, where one answer would teach too little).
    """

    task: str
    language: Language
    key: str
    turn: Turn
    follow_ups: tuple[Turn, ...] = ()


def is_held_out(key: str) -> bool:
    """Whether the question `key` belongs to the evaluation split."""
    return hashlib.blake2b(key.encode(), digest_size=4).digest()[0] % _HELD_OUT_SHARE == 0


def accept_split(held_out: bool) -> Accept:
    """A predicate that accepts the keys of one split."""
    return lambda key: is_held_out(key) == held_out


def draw_until(draw: Callable[[], tuple[str, T]], accept: Accept) -> tuple[str, T]:
    """Repeat `draw`, which returns (key, value), until its key is accepted."""
    while True:
        key, value = draw()
        if accept(key):
            return key, value


def vary(rng: Random, template: str) -> str:
    """The template as careless people type it: at times with a small first letter or without its last mark."""
    if rng.random() < 0.25:
        template = template[0].lower() + template[1:]
    if rng.random() < 0.15:
        template = template.rstrip(".?。？")
    return template


def pick(rng: Random, choices: tuple[str, ...]) -> str:
    """One of `choices`; several times faster than `Random.choice`."""
    return choices[int(rng.random() * len(choices))]
