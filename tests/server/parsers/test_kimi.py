from __future__ import annotations

import pytest
from tests.server.parsers.cutting import accepted, check, forced, scanner

from moesaic.server.parsers.kimi import Kimi
from moesaic.server.parsers.think import THINK

BEGIN, END = "<|tool_calls_section_begin|>", "<|tool_calls_section_end|>"
ROME = '<|tool_call_begin|>functions.get_weather:0<|tool_call_argument_begin|>{"city": "Rome"}<|tool_call_end|>'
TIME = "<|tool_call_begin|>functions.get_time:1<|tool_call_argument_begin|>{}<|tool_call_end|>"
CALLS = [
    ("call", "get_weather", '{"city": "Rome"}', "functions.get_weather:0"),
    ("call", "get_time", "{}", "functions.get_time:1"),
]
SPECIAL = (BEGIN, END, "<|tool_call_begin|>", "<|tool_call_argument_begin|>", "<|tool_call_end|>")


def test_thoughts_text_and_calls() -> None:
    text = f"<think>I look.</think>One moment. {BEGIN}{ROME}{TIME}{END}<|im_end|>"
    expected = [("reasoning", "I look."), ("text", "One moment."), *CALLS]
    check(scanner(Kimi(), THINK, drop=("<|im_end|>",), interrupts=SPECIAL[:1]), text, expected)


def test_calls_within_thoughts() -> None:
    text = f"<think>I look.{BEGIN}{ROME}{TIME}{END}"
    check(scanner(Kimi(), THINK, interrupts=SPECIAL[:1]), text, [("reasoning", "I look."), *CALLS])


def test_ids_of_other_forms() -> None:
    text = f"{ROME.replace('functions.', '')}{TIME.replace(':1', '')}"
    expected = [("call", "get_weather", '{"city": "Rome"}', "get_weather:0"), ("call", "get_time", "{}", "")]
    check(scanner(Kimi()), text, expected)
    assert Kimi().new_id("get_time", 4) == "functions.get_time:4"


@pytest.mark.parametrize(
    "body", ["functions.f:0", "a b<|tool_call_argument_begin|>{}", "f:0<|tool_call_argument_begin|>1"]
)
def test_what_is_no_call_is_text(body: str) -> None:
    text = f"<|tool_call_begin|>{body}<|tool_call_end|>"
    check(scanner(Kimi()), text, [("text", text)])


@pytest.mark.parametrize("special", [(), SPECIAL], ids=["text", "special"])
def test_the_grammar_forces_calls(special: tuple[str, ...]) -> None:
    grammar = forced(Kimi(), special=special)
    assert accepted(grammar, f"{BEGIN}{ROME}{TIME}{END}", special) is None
    assert accepted(grammar, "Hello", special) == ""
    assert accepted(grammar, f"{BEGIN}{ROME.replace('get_weather', 'rm')}{END}", special) is not None
    assert accepted(grammar, f"{BEGIN}{ROME.replace('city', 'town')}{END}", special) is not None
    assert accepted(forced(Kimi(), parallel=False, special=special), f"{BEGIN}{ROME}{TIME}{END}", special) is not None
