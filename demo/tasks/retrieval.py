"""Finding something in a long context: a key in a list, a passkey in noise.

Answers repeat how the context states the fact, so that finding it is matching and copying, which attention must do
exactly over the whole context.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from random import Random

from demo.items import Accept, Item, Language, Turn, draw_until, pick, vary
from demo.lexicon import EN_NAMES, EN_NOUNS, EN_VERBS, ZH_NAMES, ZH_NOUNS, ZH_VERBS

__all__ = ["lookup", "passkey"]

_MAX_FOLLOW_UPS = 8
_TOKENS_PER_ENTRY = 9.0
_TOKENS_PER_SENTENCE: dict[Language, float] = {"en": 7.6, "zh": 9.3}

_LIST_HEAD: dict[Language, tuple[str, ...]] = {
    "en": ("Here is a list:\n", "Look at this list.\n", "List:\n", "Read these entries:\n", ""),
    "zh": ("下面是一个列表：\n", "请看这个列表。\n", "列表：\n", "请阅读这些条目：\n", ""),
}
_LIST_ENTRY: dict[Language, tuple[str, ...]] = {
    "en": ("- {k}: {v}\n", "- {k}: {v}\n", "{k}: {v}\n", " {k}: {v};"),
    "zh": ("- {k}：{v}\n", "{k}：{v}\n", "{k}：{v}；"),
}
_LIST_QUESTION: dict[Language, tuple[str, ...]] = {
    "en": (
        "What is the value of {k}?", "Look up {k}.", "What does the list say for {k}?", "Find {k} in the list.",
        "Which value belongs to {k}?", "What is {k}?", "{k}?",
    ),
    "zh": ("{k}的值是多少？", "请查找{k}。", "列表中{k}对应什么？", "{k}是多少？", "在列表里找{k}。", "{k}？",
        "查一下{k}。"),
}  # fmt: skip
_LIST_ANSWER: dict[Language, str] = {"en": "{k}: {v}", "zh": "{k}：{v}"}

_FACT: dict[Language, str] = {"en": "The passkey is {v}.", "zh": "密码是{v}。"}
_FACT_TAIL: dict[Language, tuple[str, ...]] = {
    "en": (" Remember it.", " Do not forget it.", "", " {v} is the passkey."),
    "zh": ("请记住。", "不要忘记。", "", "{v}就是密码。"),
}
_FACT_QUESTION: dict[Language, tuple[str, ...]] = {
    "en": (
        "What is the passkey?",
        "What is the passkey mentioned above?",
        "Tell me the passkey.",
        "what was the passkey?",
    ),
    "zh": ("密码是多少？", "上面提到的密码是什么？", "请告诉我密码。", "密码是什么？"),
}
_NAMED_FACT: dict[Language, str] = {"en": "The code of the {k} is {v}.", "zh": "{k}的代码是{v}。"}
_NAMED_QUESTION: dict[Language, tuple[str, ...]] = {
    "en": ("What is the code of the {k}?", "Tell me the code of the {k}."),
    "zh": ("{k}的代码是多少？", "请告诉我{k}的代码。"),
}

_STOCK_NOISE: dict[Language, tuple[str, ...]] = {
    "en": (
        "The grass is green.", "The sky is blue.", "The sun is yellow.", "Here we go.", "There and back again.",
        "It was a quiet day.", "Nothing happened.", "The end is not near.",
    ),
    "zh": ("草是绿的。", "天是蓝的。", "太阳是黄的。", "我们走吧。", "来来回回。", "这是安静的一天。",
        "什么也没有发生。", "还没有结束。"),
}  # fmt: skip


def _english_sentence(rng: Random) -> str:
    roll = rng.random()
    if roll < 0.15:
        return pick(rng, _STOCK_NOISE["en"])
    noun = pick(rng, EN_NOUNS)
    if roll < 0.45:
        return f"The {noun} {pick(rng, EN_VERBS)} the {pick(rng, EN_NOUNS)}."
    if roll < 0.75:
        return f"{pick(rng, EN_NAMES).capitalize()} {pick(rng, EN_VERBS)} a {noun} near the {pick(rng, EN_NOUNS)}."
    if roll < 0.9:
        return f"The {noun} is next to the {pick(rng, EN_NOUNS)}."
    return f"There are {int(rng.random() * 100)} pieces of {noun} in the {pick(rng, EN_NOUNS)}."


def _chinese_sentence(rng: Random) -> str:
    roll = rng.random()
    if roll < 0.15:
        return pick(rng, _STOCK_NOISE["zh"])
    noun = pick(rng, ZH_NOUNS)
    if roll < 0.45:
        return f"{noun}{pick(rng, ZH_VERBS)}{pick(rng, ZH_NOUNS)}。"
    if roll < 0.75:
        return f"{pick(rng, ZH_NAMES)}在{pick(rng, ZH_NOUNS)}旁边{pick(rng, ZH_VERBS)}{noun}。"
    if roll < 0.9:
        return f"{noun}在{pick(rng, ZH_NOUNS)}的旁边。"
    return f"{pick(rng, ZH_NOUNS)}里有{int(rng.random() * 100)}个{noun}。"


_SENTENCE: dict[Language, Callable[[Random], str]] = {"en": _english_sentence, "zh": _chinese_sentence}


def _number(rng: Random, min_digits: int, max_digits: int) -> str:
    digits = min_digits + int(rng.random() * (max_digits - min_digits + 1))
    low = 10 ** (digits - 1)
    return str(low + int(rng.random() * 9 * low))


def lookup(rng: Random, language: Language, accept: Accept, size: int) -> Item:
    """A list of distinct keys with numbers or words as values, then the question for one key."""
    nouns = EN_NOUNS if language == "en" else ZH_NOUNS
    num_entries = max(2, min(len(nouns), int(size / _TOKENS_PER_ENTRY)))
    keys = rng.sample(nouns, num_entries)
    word_values = rng.random() < 0.2

    def value() -> str:
        return pick(rng, nouns) if word_values else _number(rng, 1, 5)

    def asked_entry(key: str) -> tuple[str, tuple[str, str]]:
        drawn = value()
        return f"lookup:{key}={drawn}", (key, drawn)

    asked = [draw_until(partial(asked_entry, key), accept) for key in keys[:_MAX_FOLLOW_UPS]]
    entries = [entry for _, entry in asked] + [(key, value()) for key in keys[_MAX_FOLLOW_UPS:]]
    facts = entries[:_MAX_FOLLOW_UPS]
    rng.shuffle(entries)
    entry = pick(rng, _LIST_ENTRY[language])
    context = (pick(rng, _LIST_HEAD[language]) + "".join(entry.format(k=k, v=v) for k, v in entries)).strip() + "\n"
    turns = [
        Turn(vary(rng, pick(rng, _LIST_QUESTION[language])).format(k=k), _LIST_ANSWER[language].format(k=k, v=v))
        for k, v in facts
    ]
    first = Turn(context + turns[0].prompt, turns[0].answer)
    return Item("lookup", language, asked[0][0], first, tuple(turns[1:]))


def passkey(rng: Random, language: Language, accept: Accept, size: int) -> Item:
    """Noise of about `size` tokens that hides the passkey, and up to seven named codes, at random places."""
    nouns = EN_NOUNS if language == "en" else ZH_NOUNS
    space = " " if language == "en" else ""
    num_sentences = max(2, int(size / _TOKENS_PER_SENTENCE[language]))
    num_named = min(_MAX_FOLLOW_UPS - 1, int(rng.random() * num_sentences / 8))

    def secret() -> tuple[str, str]:
        return f"passkey:{(v := _number(rng, 4, 6))}", v

    key, value = draw_until(secret, accept)
    sentences = [_SENTENCE[language](rng) for _ in range(num_sentences)]
    fact = (_FACT[language] + pick(rng, _FACT_TAIL[language])).format(v=value)
    turns = [Turn(vary(rng, pick(rng, _FACT_QUESTION[language])), _FACT[language].format(v=value))]
    hidden = [fact]
    for name in rng.sample(nouns, num_named):
        code = draw_until(secret, accept)[1]
        hidden.append(_NAMED_FACT[language].format(k=name, v=code))
        turns.append(Turn(pick(rng, _NAMED_QUESTION[language]).format(k=name), hidden[-1]))
    for text in hidden:
        sentences.insert(int(rng.random() * (len(sentences) + 1)), text)
    first = Turn(space.join(sentences) + "\n" + turns[0].prompt, turns[0].answer)
    return Item("passkey", language, key, first, tuple(turns[1:]))
