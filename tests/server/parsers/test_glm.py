from __future__ import annotations

import pytest
from tests.server.parsers.cutting import accepted, check, forced, scanner

from moesaic.server.parsers.glm import Glm
from moesaic.server.parsers.think import THINK

ROME = (
    "<tool_call>get_weather\n<arg_key>city</arg_key>\n<arg_value>Rome</arg_value>\n"
    "<arg_key>days</arg_key>\n<arg_value>3</arg_value>\n</tool_call>"
)
TIGHT = ROME.replace("\n", "")
CALL = ("call", "get_weather", '{"city": "Rome", "days": 3}', "")
SPECIAL = ("<tool_call>", "</tool_call>", "<arg_key>", "</arg_key>", "<arg_value>", "</arg_value>")


@pytest.mark.parametrize("call", [ROME, TIGHT], ids=["4.5", "4.7"])
def test_thoughts_text_and_calls(call: str) -> None:
    text = f"\n<think>I look.</think>\nOne moment.\n{call}\n<tool_call>get_time\n</tool_call><|observation|>"
    expected = [("reasoning", "I look."), ("text", "One moment."), CALL, ("call", "get_time", "{}", "")]
    check(scanner(Glm(), THINK, drop=("<|observation|>",)), text, expected)


def test_values_follow_the_schema() -> None:
    text = TIGHT.replace("Rome", "a</tool_call>\n1").replace(">3<", ">[1]<")
    check(scanner(Glm()), text, [("call", "get_weather", '{"city": "a</tool_call>\\n1", "days": "[1]"}', "")])


@pytest.mark.parametrize(
    "text",
    [
        "<tool_call></tool_call>",
        "<tool_call>get weather now</tool_call>",
        "<tool_call>f<arg_key>a</arg_key>b</tool_call>",
        "<tool_call>f<arg_key>a</arg_key><arg_value>b",
    ],
)
def test_what_is_no_call_is_text(text: str) -> None:
    check(scanner(Glm()), text, [("text", text)])


@pytest.mark.parametrize("special", [(), SPECIAL], ids=["text", "special"])
def test_the_grammar_forces_calls(special: tuple[str, ...]) -> None:
    grammar = forced(Glm(), special=special)
    for call in (ROME, TIGHT):
        assert accepted(grammar, call, special) is None
        assert accepted(grammar, f"{call}\n{call}", special) is None
        assert str(accepted(grammar, call.replace(">3<", ">x<"), special)).endswith("<arg_value>")
    assert accepted(grammar, "<tool_call>get_time</tool_call>", special) is None
    assert accepted(grammar, "Hello", special) == ""
    assert accepted(grammar, "<tool_call>get_weather</tool_call>", special) is not None
