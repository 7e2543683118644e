"""Counting: how often a word or letter occurs in a list, or how long the list is.

The answer walks through the list with a running count. Attention averages, it does not add: without the walk a model
this small was right in half of the cases, with 16-bit activations too coarse to tell 12/13 from 13/14.
"""

from __future__ import annotations

from random import Random

from demo.items import Accept, Item, Language, Turn, draw_until, pick, vary
from demo.lexicon import EN_NOUNS, ZH_NOUNS
from demo.tasks.ordering import ANSWER_SEPARATOR

__all__ = ["MAX_COUNT", "counting"]

MAX_COUNT = 12
_MAX_LENGTH = 14

_OCCURRENCES: dict[Language, tuple[str, ...]] = {
    "en": (
        "How many times does {w} appear in: {x}", "Count {w} in this list: {x}", "How often does {w} occur? {x}",
        "Count how many times {w} appears: {x}", "How many {w} are there: {x}", "How many {w} in {x}?",
        "Count {w}: {x}",
    ),
    "zh": (
        "“{w}”出现了几次：{x}", "数一数{w}有几个：{x}", "下面有多少个{w}？{x}", "请数出{w}的个数：{x}",
        "{w}出现多少次？{x}", "{x}里有几个{w}？",
    ),
}  # fmt: skip
_LENGTH: dict[Language, tuple[str, ...]] = {
    "en": ("How many words are in this list: {x}", "Count the words: {x}", "How many items are there? {x}"),
    "zh": ("这里有几个词：{x}", "数一数一共有几个词：{x}", "列表里有多少项？{x}"),
}
_STEP: dict[Language, str] = {"en": "{w} {n}", "zh": "{w}{n}"}
_ANSWER: dict[Language, str] = {"en": "{steps}. The count is {n}.", "zh": "{steps}。一共是 {n} 个。"}


def _occurrences(rng: Random, words: tuple[str, ...]) -> tuple[str, list[str]]:
    """A word, and a list in which it occurs 0 to `MAX_COUNT` times among few other words."""
    word = pick(rng, words)
    count = int(rng.random() * ((MAX_COUNT if rng.random() < 0.5 else 6) + 1))
    kinds = [pick(rng, words) for _ in range(1 + int(rng.random() * 4))]
    kinds = [kind for kind in kinds if kind != word] or [next(w for w in words if w != word)]
    num_others = 1 + int(rng.random() * (_MAX_LENGTH - count))
    listed = [word] * count + [kinds[int(rng.random() * len(kinds))] for _ in range(num_others)]
    rng.shuffle(listed)
    return word, listed


def _answer(language: Language, word: str, listed: list[str]) -> str:
    count = 0
    steps = []
    for entry in listed:
        count += not word or entry == word
        steps.append(_STEP[language].format(w=entry, n=count))
    return _ANSWER[language].format(steps=ANSWER_SEPARATOR[language].join(steps), n=count)


def counting(rng: Random, language: Language, accept: Accept, size: int) -> Item:
    """Occurrences of a word (or, in English, a letter), or the length of a list of words."""
    words = EN_NOUNS if language == "en" else ZH_NOUNS
    kind = rng.random()

    def draw() -> tuple[str, tuple[str, list[str]]]:
        if kind < 0.25:
            word, listed = "", [pick(rng, words) for _ in range(1 + int(rng.random() * MAX_COUNT))]
        elif kind < 0.45 and language == "en":
            word, listed = _occurrences(rng, tuple("abcdefghijklmnopqrstuvwxyz"))
        else:
            word, listed = _occurrences(rng, words)
        return f"counting:{word}:{' '.join(listed)}", (word, listed)

    key, (word, listed) = draw_until(draw, accept)
    template = vary(rng, pick(rng, (_OCCURRENCES if word else _LENGTH)[language]))
    separator = " " if len(word) == 1 or rng.random() < 0.3 else ANSWER_SEPARATOR[language]
    prompt = template.format(w=word, x=separator.join(listed))
    return Item("counting", language, key, Turn(prompt, _answer(language, word, listed)))
