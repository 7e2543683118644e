"""Counting: how often a word or letter occurs in a list, or how long the list is."""

from __future__ import annotations

from random import Random

from demo.items import Accept, Item, Language, Turn, draw_until, pick
from demo.lexicon import EN_NOUNS, ZH_NOUNS
from demo.tasks.ordering import ANSWER_SEPARATOR

__all__ = ["MAX_COUNT", "counting"]

MAX_COUNT = 16

_OCCURRENCES: dict[Language, tuple[str, ...]] = {
    "en": (
        "How many times does {w} appear in: {x}", "Count {w} in this list: {x}", "How often does {w} occur? {x}",
        "Count how many times {w} appears: {x}", "how many {w} are there: {x}",
    ),
    "zh": (
        "“{w}”出现了几次：{x}", "数一数{w}有几个：{x}", "下面有多少个{w}？{x}", "请数出{w}的个数：{x}", "{w}出现多少次？{x}",
    ),
}  # fmt: skip
_LENGTH: dict[Language, tuple[str, ...]] = {
    "en": ("How many words are in this list: {x}", "Count the words: {x}", "How many items are there? {x}"),
    "zh": ("这里有几个词：{x}", "数一数一共有几个词：{x}", "列表里有多少项？{x}"),
}
_ANSWER: dict[Language, str] = {"en": "The count is {n}.", "zh": "一共是 {n} 个。"}


def _occurrences(rng: Random, words: tuple[str, ...]) -> tuple[str, list[str], int]:
    """A word, a list in which it occurs 0 to `MAX_COUNT` times among few other words, and that number."""
    count = int(rng.random() * (MAX_COUNT + 1)) if rng.random() < 0.5 else int(rng.random() * 7)
    others = [pick(rng, words) for _ in range(1 + int(rng.random() * 4))]
    word = pick(rng, words)
    num_others = int(rng.random() * 11)
    rest = [w for w in (others[int(rng.random() * len(others))] for _ in range(num_others)) if w != word]
    listed = [word] * count + (rest or [next(w for w in words if w != word)])
    rng.shuffle(listed)
    return word, listed, count


def counting(rng: Random, language: Language, accept: Accept, size: int) -> Item:
    """Occurrences of a word (or, in English, a letter), or the length of a list of words."""
    words = EN_NOUNS if language == "en" else ZH_NOUNS
    kind = rng.random()

    def draw() -> tuple[str, tuple[str, list[str], int]]:
        if kind < 0.25:
            word, listed = "", [pick(rng, words) for _ in range(1 + int(rng.random() * MAX_COUNT))]
            count = len(listed)
        elif kind < 0.45 and language == "en":
            word, listed, count = _occurrences(rng, tuple("abcdefghijklmnopqrstuvwxyz"))
        else:
            word, listed, count = _occurrences(rng, words)
        return f"counting:{word}:{' '.join(listed)}", (word, listed, count)

    key, (word, listed, count) = draw_until(draw, accept)
    template = pick(rng, (_OCCURRENCES if word else _LENGTH)[language])
    separator = " " if len(word) == 1 or rng.random() < 0.3 else ANSWER_SEPARATOR[language]
    prompt = template.format(w=word, x=separator.join(listed))
    return Item("counting", language, key, Turn(prompt, _ANSWER[language].format(n=count)))
