"""Sorting numbers, and reversing words, letters, digits or Chinese characters."""

from __future__ import annotations

from random import Random

from demo.items import Accept, Item, Language, Turn, draw_until, pick, vary
from demo.lexicon import EN_NOUNS, ZH_NOUNS

__all__ = ["ANSWER_SEPARATOR", "reversing", "sorting"]

ANSWER_SEPARATOR: dict[Language, str] = {"en": ", ", "zh": "，"}
_PROMPT_SEPARATORS: dict[Language, tuple[str, ...]] = {
    "en": (", ", ", ", " ", ","),
    "zh": ("，", "，", "、", ", ", " "),
}

_ASCENDING: dict[Language, tuple[str, ...]] = {
    "en": (
        "Sort these numbers: {x}", "Sort the numbers {x}.", "sort {x}", "Sort in ascending order: {x}",
        "Please sort from smallest to largest: {x}", "Put these numbers in order: {x}", "Order from low to high: {x}",
        "Sort: {x}", "Can you sort {x}?",
    ),
    "zh": (
        "把这些数从小到大排序：{x}", "请从小到大排列：{x}", "排序：{x}", "把{x}排序。", "请把{x}从小到大排列。",
        "将下列数字按升序排列：{x}", "给这些数字排序：{x}",
    ),
}  # fmt: skip
_DESCENDING: dict[Language, tuple[str, ...]] = {
    "en": (
        "Sort these numbers from largest to smallest: {x}", "Sort in descending order: {x}", "sort descending: {x}",
        "Order from high to low: {x}",
    ),
    "zh": ("把这些数从大到小排序：{x}", "请从大到小排列：{x}", "请把{x}从大到小排列。", "将下列数字按降序排列：{x}"),
}  # fmt: skip
_REVERSE_LIST: dict[Language, tuple[str, ...]] = {
    "en": (
        "Reverse the order of these words: {x}", "Reverse this list: {x}", "Reverse: {x}", "Reverse {x}",
        "Write this list backwards: {x}",
        "Please reverse {x}.",
    ),
    "zh": ("把这些词倒过来：{x}", "请把列表反过来：{x}", "倒序排列：{x}", "反转：{x}", "倒着写：{x}"),
}  # fmt: skip
_REVERSE_LETTERS: dict[Language, tuple[str, ...]] = {
    "en": ("Reverse the letters: {x}", "Write these letters backwards: {x}", "Reverse {x}", "Reverse: {x}"),
    "zh": ("把这些字倒过来写：{x}", "反转这串字：{x}", "倒着写：{x}", "请把“{x}”倒过来。"),
}
_REVERSE_DIGITS: dict[Language, tuple[str, ...]] = {
    "en": (
        "Reverse the digits of {x}.",
        "Reverse {x}",
        "Reverse: {x}",
        "Reverse the number {x}",
        "Write {x} backwards.",
    ),
    "zh": ("把数字{x}倒过来。", "反转{x}", "倒着写{x}", "把{x}的数字反过来写。"),
}


def sorting(rng: Random, language: Language, accept: Accept, size: int) -> Item:
    """Three to eight numbers below 100 or 1000, now and then with equal ones; the key is the set, not its order."""

    def draw() -> tuple[str, list[int]]:
        count = 3 + int(rng.random() * 6)
        limit = 100 if rng.random() < 0.5 else 1000
        numbers = [int(rng.random() * limit) for _ in range(count)]
        return "sorting:" + ",".join(map(str, sorted(numbers))), numbers

    key, numbers = draw_until(draw, accept)
    descending = rng.random() < 0.35
    template = vary(rng, pick(rng, (_DESCENDING if descending else _ASCENDING)[language]))
    prompt = template.format(x=pick(rng, _PROMPT_SEPARATORS[language]).join(map(str, numbers)))
    ordered = sorted(numbers, reverse=descending)
    return Item("sorting", language, key, Turn(prompt, ANSWER_SEPARATOR[language].join(map(str, ordered))))


def _digits(rng: Random) -> str:
    count = 3 + int(rng.random() * 8)
    return "".join(pick(rng, tuple("0123456789")) for _ in range(count))


def _letters(rng: Random, language: Language) -> list[str]:
    if language == "zh":
        words = (pick(rng, ZH_NOUNS) for _ in range(2 + int(rng.random() * 4)))
        return list("".join(words))[: 3 + int(rng.random() * 6)]
    if rng.random() < 0.5:
        return list(pick(rng, EN_NOUNS))
    return [pick(rng, tuple("abcdefghijklmnopqrstuvwxyz")) for _ in range(3 + int(rng.random() * 7))]


def reversing(rng: Random, language: Language, accept: Accept, size: int) -> Item:
    """Words of a list, the letters of a spelled word (English) or the characters of a string (Chinese), or digits."""
    words = EN_NOUNS if language == "en" else ZH_NOUNS
    kind = rng.random()

    def draw() -> tuple[str, list[str]]:
        if kind < 0.4:
            parts = [pick(rng, words) for _ in range(3 + int(rng.random() * 6))]
        elif kind < 0.7:
            parts = _letters(rng, language)
        else:
            parts = list(_digits(rng))
        return "reversing:" + " ".join(parts), parts

    key, parts = draw_until(draw, accept)
    if kind < 0.4:
        template = vary(rng, pick(rng, _REVERSE_LIST[language]))
        separator, answer_separator = pick(rng, _PROMPT_SEPARATORS[language]), ANSWER_SEPARATOR[language]
    elif kind < 0.7:
        template = vary(rng, pick(rng, _REVERSE_LETTERS[language]))
        separator = answer_separator = " " if language == "en" else ""
    else:
        template, separator, answer_separator = vary(rng, pick(rng, _REVERSE_DIGITS[language])), "", ""
    prompt = template.format(x=separator.join(parts))
    return Item("reversing", language, key, Turn(prompt, answer_separator.join(parts[::-1])))
