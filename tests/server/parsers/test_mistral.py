from __future__ import annotations

import re

import pytest
from tests.server.parsers.cutting import accepted, check, forced, scanner

from moesaic.server.parsers.mistral import Mistral, MistralList
from moesaic.server.parsers.think import BRACKETS

LIST = '[TOOL_CALLS][{"name": "get_weather", "arguments": {"city": "Rome"}, "id": "a1B2c3D4e"}, {"name": "get_time"}]'
ROME = '[TOOL_CALLS]get_weather[ARGS]{"city": "Rome"}'
WITH_ID = '[TOOL_CALLS]get_weather[CALL_ID]a1B2c3D4e[ARGS]{"city": "Rome"}'
TIME = "[TOOL_CALLS]get_time[ARGS]{}"
SPECIAL = ("[TOOL_CALLS]", "[ARGS]", "[CALL_ID]")


def test_version_3() -> None:
    expected = [("call", "get_weather", '{"city": "Rome"}', "a1B2c3D4e"), ("call", "get_time", "{}", "")]
    check(scanner(MistralList(), drop=("</s>",)), f"{LIST}</s>", expected)


def test_version_11() -> None:
    time = ("call", "get_time", "{}", "")
    check(scanner(Mistral()), ROME + TIME, [("call", "get_weather", '{"city": "Rome"}', ""), time])
    check(scanner(Mistral()), WITH_ID + TIME, [("call", "get_weather", '{"city": "Rome"}', "a1B2c3D4e"), time])
    bare = ROME.replace("[ARGS]", "")
    check(scanner(Mistral()), bare + TIME, [("call", "get_weather", '{"city": "Rome"}', ""), time])


def test_thoughts_and_text() -> None:
    text = f"[THINK]I look.[/THINK]One moment.{ROME}</s>"
    call = ("call", "get_weather", '{"city": "Rome"}', "")
    check(scanner(Mistral(), BRACKETS, drop=("</s>",)), text, [("reasoning", "I look."), ("text", "One moment."), call])


@pytest.mark.parametrize(
    "text",
    ["[TOOL_CALLS]", "[TOOL_CALLS][1]", "[TOOL_CALLS]a b[ARGS]{}", "[TOOL_CALLS]f[ARGS]{", "[TOOL_CALLS]f[ARGS]{} x"],
)
def test_what_is_no_call_is_text(text: str) -> None:
    check(scanner(Mistral()), text, [("text", text)])


def test_ids_have_nine_letters_or_digits() -> None:
    style = Mistral()
    assert re.fullmatch(r"[A-Za-z0-9]{9}", style.new_id("f", 0))
    assert style.new_id("f", 0) != style.new_id("f", 0)
    assert style.history_id("a1B2c3D4e") == "a1B2c3D4e"
    other = style.history_id("call_123")
    assert re.fullmatch(r"[A-Za-z0-9]{9}", other)
    assert other == style.history_id("call_123") != style.history_id("call_124")


@pytest.mark.parametrize("special", [(), SPECIAL], ids=["text", "special"])
def test_the_grammars_force_calls(special: tuple[str, ...]) -> None:
    grammar = forced(Mistral(), special=special)
    for call in (ROME, ROME + TIME, WITH_ID + TIME):
        assert accepted(grammar, call, special) is None
    assert accepted(grammar, "Hello", special) == ""
    assert accepted(grammar, ROME.replace("city", "town"), special) is not None
    listed = forced(MistralList(), special=special)
    whole = LIST.replace('{"name": "get_time"}', '{"name": "get_time", "arguments": {}}')
    assert accepted(listed, whole, special) is None
    assert accepted(listed, ROME, special) is not None
    assert accepted(forced(MistralList(), parallel=False, special=special), whole, special) is not None
