from __future__ import annotations

import pytest
from tests.server.parsers.cutting import accepted, check, forced, parse, scanner

from moesaic.server.parsers.hermes import Hermes
from moesaic.server.parsers.think import THINK

ONE = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Rome", "days": 3}}\n</tool_call>'
CALL = ("call", "get_weather", '{"city": "Rome", "days": 3}', "")


def test_thoughts_text_and_calls() -> None:
    text = f"<think>\nRome, 3 < 4 days.\n</think>\n\nI shall look.\n\n{ONE}\n{ONE.replace('Rome', 'Bonn')}<|im_end|>"
    second = ("call", "get_weather", '{"city": "Bonn", "days": 3}', "")
    expected = [("reasoning", "Rome, 3 < 4 days."), ("text", "I shall look."), CALL, second]
    check(scanner(Hermes(), THINK, drop=("<|im_end|>",)), text, expected)


def test_the_closing_tag_in_an_argument() -> None:
    text = '<tool_call>{"name": "get_weather", "arguments": {"city": "a</tool_call>b"}}</tool_call>'
    check(scanner(Hermes()), text, [("call", "get_weather", '{"city": "a</tool_call>b"}', "")])


def test_a_call_without_the_closing_tag() -> None:
    check(scanner(Hermes()), ONE.removesuffix("\n</tool_call>"), [CALL])


def test_arguments_as_text_or_missing() -> None:
    text = (
        '<tool_call>{"name": "get_time"}</tool_call><tool_call>{"name": "f", "arguments": "{\\"a\\": 1}"}</tool_call>'
    )
    check(scanner(Hermes()), text, [("call", "get_time", "{}", ""), ("call", "f", '{"a": 1}', "")])


@pytest.mark.parametrize(
    "text",
    [
        "<tool_call>not JSON</tool_call> and more",
        "such as \n<tool_call> tags",
        '<tool_call>{"name": 1, "arguments": {}}</tool_call>',
        '<tool_call>{"name": "f", "arguments": [1]}</tool_call>',
        '<tool_call>{"name": "f", "arguments": {"a": NaN}}</tool_call>',
        '<tool_call>{"name": "f", "argum',
        "<tool_call>",
        "a <tool_call",
        '<tool_call>{"name": "f"} {"name": "g"}</tool_call>',
    ],
)
def test_what_is_no_call_is_text(text: str) -> None:
    check(scanner(Hermes()), text, [("text", text)])


def test_json_that_is_too_deep_is_text() -> None:
    text = "<tool_call>" + "[" * 100_000 + "</tool_call>"
    assert parse(scanner(Hermes())(), text) == [("text", text)]


def test_a_call_behind_a_broken_one() -> None:
    check(scanner(Hermes()), f"<tool_call>oh {ONE}", [("text", "<tool_call>oh"), CALL])


def test_text_behind_a_call() -> None:
    check(scanner(Hermes()), f"{ONE}\nDone. \n", [CALL, ("text", "\nDone.")])


def test_the_grammar_forces_calls() -> None:
    for special in ((), ("<tool_call>", "</tool_call>")):
        grammar = forced(Hermes(), special=special)
        assert accepted(grammar, ONE, special) is None
        assert accepted(grammar, f"{ONE}\n{ONE}", special) is None
        assert accepted(grammar, "Hello", special) == ""
        other = accepted(grammar, ONE.replace("get_weather", "rm"), special)
        assert other is not None and other.endswith('{"name": "')
        number = accepted(grammar, ONE.replace('"Rome"', "1"), special)
        assert number is not None and number.endswith('"city": ')
        alone = forced(Hermes(), parallel=False, special=special)
        assert accepted(alone, ONE, special) is None
        assert accepted(alone, f"{ONE}\n{ONE}", special) == ONE
