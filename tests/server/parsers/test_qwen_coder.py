from __future__ import annotations

import json

import pytest
from tests.server.parsers.cutting import accepted, check, forced, scanner

from moesaic.server.parsers.qwen_coder import QwenCoder
from moesaic.server.parsers.think import THINK

ROME = (
    "<tool_call>\n<function=get_weather>\n<parameter=city>\nRome\n</parameter>\n<parameter=days>\n3\n</parameter>\n"
    "</function>\n</tool_call>"
)
TIME = "<tool_call>\n<function=get_time>\n</function>\n</tool_call>"
CALL = ("call", "get_weather", '{"city": "Rome", "days": 3}', "")


def test_thoughts_text_and_calls() -> None:
    text = f"I look.\n</think>\n\nOne moment.\n\n{ROME}\n{TIME}<|im_end|>"
    expected = [("reasoning", "I look."), ("text", "One moment."), CALL, ("call", "get_time", "{}", "")]
    check(scanner(QwenCoder(), THINK, opened=True, drop=("<|im_end|>",)), text, expected)


def test_the_outer_tag_may_be_missing() -> None:
    check(scanner(QwenCoder()), ROME.removeprefix("<tool_call>\n"), [CALL])


def test_values_follow_the_schema() -> None:
    text = ROME.replace("Rome", "12").replace("\n3\n", "\nmany\n")
    check(scanner(QwenCoder()), text, [("call", "get_weather", '{"city": "12", "days": "many"}', "")])
    several = ROME.replace("days", "hours").replace("\n3\n", '\n[1,\n "x"]\n')
    check(scanner(QwenCoder()), several, [("call", "get_weather", '{"city": "Rome", "hours": [1, "x"]}', "")])


def test_values_keep_lines_and_tags() -> None:
    code = 'if a < b:\n    print("</parameter>")\n\n<function=f></function>'
    text = f"<function=get_weather>\n<parameter=city>\n{code}\n</parameter>\n</function>"
    check(scanner(QwenCoder()), text, [("call", "get_weather", json.dumps({"city": code}), "")])


@pytest.mark.parametrize(
    "text",
    [
        "<tool_call>\nHello\n</function>",
        "<tool_call>\n<function=f>\nHello\n</function>",
        "<function=f>\n<parameter=a>\n1\n",
        "a <function=b",
    ],
)
def test_what_is_no_call_is_text(text: str) -> None:
    check(scanner(QwenCoder()), text, [("text", text)])


@pytest.mark.parametrize("special", [(), ("<tool_call>", "</tool_call>")], ids=["text", "special"])
def test_the_grammar_forces_calls(special: tuple[str, ...]) -> None:
    grammar = forced(QwenCoder(), special=special)
    assert accepted(grammar, f"{ROME}\n{TIME}", special) is None
    assert accepted(grammar, ROME.replace("Rome", "a\nb <c>"), special) is None
    assert accepted(grammar, "Hello", special) == ""
    assert str(accepted(grammar, ROME.replace("\n3\n", "\nmany\n"), special)).endswith("<parameter=days>\n")
    without_city = ROME.replace("<parameter=city>\nRome\n</parameter>\n", "")
    assert str(accepted(grammar, without_city, special)).endswith("<parameter=")
    assert accepted(forced(QwenCoder(), parallel=False, special=special), f"{ROME}\n", special) == ROME
