"""The demo's questions: right answers, recomputed here from the prompt alone, and a split that holds."""

from __future__ import annotations

import re
from collections import Counter
from random import Random

import pytest
from demo.held_out import held_out_items
from demo.items import LANGUAGES, Item, Language, accept_split, is_held_out
from demo.lexicon import EN_NAMES, EN_NOUNS, EN_VERBS, ZH_NAMES, ZH_NOUNS, ZH_VERBS
from demo.tasks import LONG_TASKS, TASKS

_NUM_ITEMS = 400


def _items(task: str, language: Language, held_out: bool = False) -> list[Item]:
    rng = Random(f"{task}{language}")
    return [TASKS[task](rng, language, accept_split(held_out), 200) for _ in range(_NUM_ITEMS)]


@pytest.mark.parametrize("language", LANGUAGES)
@pytest.mark.parametrize(("task", "sign"), [("addition", "+"), ("subtraction", "-")])
def test_arithmetic_is_right(task: str, sign: str, language: Language) -> None:
    for item in _items(task, language):
        a, b, result = map(int, re.fullmatch(rf"(\d+) \{sign} (\d+) = (-?\d+)", item.turn.answer).groups())
        assert result == (a + b if sign == "+" else a - b)
        in_prompt = [int(number) for number in re.findall(r"\d+", item.turn.prompt)]
        swapped = re.match(r"(?i)subtract |can you take ", item.turn.prompt) is not None
        assert in_prompt == ([b, a] if swapped else [a, b])
        assert 0 <= a <= 9999 and 0 <= b <= 9999


@pytest.mark.parametrize("language", LANGUAGES)
def test_sorting_is_right(language: Language) -> None:
    orders = Counter()
    for item in _items("sorting", language):
        numbers = [int(number) for number in re.findall(r"\d+", item.turn.prompt)]
        answer = [int(number) for number in re.findall(r"\d+", item.turn.answer)]
        falling = re.search(r"(?i)descending|largest to|high to|从大到小|降序", item.turn.prompt) is not None
        assert answer == sorted(numbers, reverse=falling)
        orders[falling] += 1
    assert min(orders[False], orders[True]) > _NUM_ITEMS / 10


@pytest.mark.parametrize("language", LANGUAGES)
def test_reversing_is_right(language: Language) -> None:
    for item in _items("reversing", language):
        answer = item.turn.answer
        is_list = re.search(r"[,， ]", answer) is not None
        forward = re.split(r"[,， ]+", answer)[::-1] if is_list else [answer[::-1]]
        assert re.search(r"[,，、 ]*".join(map(re.escape, forward)), item.turn.prompt), (item.turn, forward)


@pytest.mark.parametrize("language", LANGUAGES)
def test_counting_is_right(language: Language) -> None:
    step = re.compile(r"([a-z]+) (\d+)" if language == "en" else r"([一-鿿]+)(\d+)")
    for item in _items("counting", language):
        walk, _, conclusion = item.turn.answer.rpartition(". " if language == "en" else "。一")
        steps = step.findall(walk)
        listed = [word for word, _ in steps]
        word = item.key.split(":")[1]
        right = [sum(1 for entry in listed[: i + 1] if not word or entry == word) for i in range(len(listed))]
        assert [int(count) for _, count in steps] == right
        assert int(re.search(r"\d+", conclusion).group()) == right[-1]
        assert word in item.turn.prompt and re.search(r"[,， ]+".join(listed), item.turn.prompt)


@pytest.mark.parametrize("language", LANGUAGES)
@pytest.mark.parametrize("task", LONG_TASKS)
def test_what_is_asked_stands_in_the_context_once(task: str, language: Language) -> None:
    for item in _items(task, language):
        context = item.turn.prompt.rpartition("\n")[0]
        for turn in (item.turn, *item.follow_ups):
            if task == "passkey":
                assert context.count(turn.answer) == 1
                continue
            key, value = re.split(r": |：", turn.answer)
            stated = re.findall(rf"(?:^|[\s\-；]){key}(?:: |：)([^\s；;]+)", context)
            assert stated == [value]
            assert key in turn.prompt.rpartition("\n")[2]


@pytest.mark.parametrize("language", LANGUAGES)
def test_small_talk_has_one_answer_for_each_wording(language: Language) -> None:
    answers: dict[str, str] = {}
    for item in _items("small_talk", language) + _items("small_talk", language, held_out=True):
        assert answers.setdefault(item.turn.prompt.lower(), item.turn.answer) == item.turn.answer
    assert len(set(answers.values())) >= 17


@pytest.mark.parametrize("task", TASKS)
def test_training_never_sees_what_is_held_out(task: str) -> None:
    seen = {item.key for language in LANGUAGES for item in _items(task, language)}
    asked = {item.key for language in LANGUAGES for item in held_out_items(task, language, 50, max_context=300)}
    assert not any(map(is_held_out, seen))
    assert all(map(is_held_out, asked))


def test_follow_ups_keep_the_split() -> None:
    for item in _items("lookup", "en"):
        for turn in item.follow_ups:
            assert not is_held_out("lookup:" + turn.answer.replace(": ", "=", 1))
    for item in _items("passkey", "en"):
        for turn in item.follow_ups:
            assert not is_held_out("passkey:" + re.search(r"\d+", turn.answer).group())


@pytest.mark.parametrize("language", LANGUAGES)
def test_the_split_ignores_wording_language_and_order(language: Language) -> None:
    for item in _items("addition", language):
        low, high = sorted(int(number) for number in re.findall(r"\d+", item.turn.prompt))
        assert item.key == f"addition:{low},{high}"
    for item in _items("sorting", language):
        numbers = sorted(int(number) for number in re.findall(r"\d+", item.turn.prompt))
        assert item.key == "sorting:" + ",".join(map(str, numbers))


def test_about_one_key_in_32_is_held_out() -> None:
    share = sum(is_held_out(f"addition:{a},{b}") for a in range(200) for b in range(a, 200)) / 20100
    assert 0.8 / 32 < share < 1.2 / 32


def test_held_out_items_are_always_the_same() -> None:
    assert held_out_items("lookup", "zh", 5) == held_out_items("lookup", "zh", 5)
    assert held_out_items("lookup", "zh", 5) != held_out_items("lookup", "zh", 5, seed=2)


def test_word_lists() -> None:
    for words in (EN_NOUNS, EN_NAMES, EN_VERBS):
        assert all(re.fullmatch(r"[a-z]+", word) for word in words)
    for words in (ZH_NOUNS, ZH_NAMES, ZH_VERBS):
        assert all(re.fullmatch(r"[一-鿿]{2}", word) for word in words)
    for words in (EN_NOUNS, ZH_NOUNS):
        assert len(set(words)) == len(words) > 280
