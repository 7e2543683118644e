from __future__ import annotations

import pytest
from tests.server.parsers.cutting import TOOLS, accepted, check, forced, scanner

from moesaic.server.parsers.deepseek import DeepSeek, DeepSeekFenced
from moesaic.server.parsers.think import THINK

BEGIN, END = "<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>"
ROME = '<｜tool▁call▁begin｜>get_weather<｜tool▁sep｜>{"city": "Rome"}<｜tool▁call▁end｜>'
FENCED = '<｜tool▁call▁begin｜>function<｜tool▁sep｜>get_weather\n```json\n{"city": "Rome"}\n```<｜tool▁call▁end｜>'
CALL = ("call", "get_weather", '{"city": "Rome"}', "")
SPECIAL = (BEGIN, END, "<｜tool▁call▁begin｜>", "<｜tool▁sep｜>", "<｜tool▁call▁end｜>")


def test_v31() -> None:
    text = f"Let me see.{BEGIN}{ROME}{ROME.replace('Rome', 'Bonn')}{END}<｜end▁of▁sentence｜>"
    second = ("call", "get_weather", '{"city": "Bonn"}', "")
    check(scanner(DeepSeek(), THINK, drop=("<｜end▁of▁sentence｜>",)), text, [("text", "Let me see."), CALL, second])


def test_r1() -> None:
    text = f"Hm.\n</think>\n\nA moment.{BEGIN}{FENCED}\n{FENCED}{END}"
    check(
        scanner(DeepSeekFenced(), THINK, opened=True), text, [("reasoning", "Hm."), ("text", "A moment."), CALL, CALL]
    )


def test_calls_end_thoughts_that_were_not_ended() -> None:
    text = f"So I call it.{BEGIN}{ROME}{END}"
    make = scanner(DeepSeek(), THINK, opened=True, interrupts=(BEGIN, "<｜tool▁call▁begin｜>"))
    check(make, text, [("reasoning", "So I call it."), CALL])


def test_cut_off_calls() -> None:
    check(
        scanner(DeepSeek()),
        f"{BEGIN}{ROME}<｜tool▁call▁begin｜>get_wea",
        [CALL, ("text", "<｜tool▁call▁begin｜>get_wea")],
    )
    check(scanner(DeepSeek()), f"{BEGIN}{ROME.removesuffix('<｜tool▁call▁end｜>')}", [CALL])


@pytest.mark.parametrize(
    "body", ["get_weather", "<｜tool▁sep｜>{}", "get_weather<｜tool▁sep｜>Rome", "get_weather<｜tool▁sep｜>[]"]
)
def test_what_is_no_call_is_text(body: str) -> None:
    text = f"<｜tool▁call▁begin｜>{body}<｜tool▁call▁end｜>"
    check(scanner(DeepSeek()), text, [("text", text)])


@pytest.mark.parametrize(("style", "call"), [(DeepSeek(), ROME), (DeepSeekFenced(), FENCED)], ids=["v31", "r1"])
@pytest.mark.parametrize("special", [(), SPECIAL], ids=["text", "special"])
def test_the_grammar_forces_calls(style: DeepSeek, call: str, special: tuple[str, ...]) -> None:
    grammar = forced(style, special=special)
    assert accepted(grammar, f"{BEGIN}{call}{call}{END}", special) is None
    assert accepted(grammar, "Hello", special) == ""
    assert accepted(grammar, f"{BEGIN}{END}", special) is not None
    alone = forced(style, parallel=False, special=special)
    assert accepted(alone, f"{BEGIN}{call}{END}", special) is None
    assert str(accepted(alone, f"{BEGIN}{call}{call}{END}", special)).startswith(f"{BEGIN}{call}")


def test_calls_of_r1_may_stand_on_lines_of_their_own() -> None:
    assert accepted(forced(DeepSeekFenced()), f"{BEGIN}{FENCED}\n{FENCED}{END}") is None


@pytest.mark.parametrize(("style", "call"), [(DeepSeek(), ROME), (DeepSeekFenced(), FENCED)], ids=["v31", "r1"])
def test_instructions_show_the_form(style: DeepSeek, call: str) -> None:
    text = style.instructions(tuple(TOOLS.values()), lambda part: part.upper())
    shown = call.replace("get_weather", "tool_name").replace('{"city": "Rome"}', "tool_arguments")
    assert f"{BEGIN}{shown}{END}" in text
    assert "### GET_WEATHER" in text
    assert "WEATHER OF A PLACE." in text
    assert '"CITY"' in text
