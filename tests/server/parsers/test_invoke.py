from __future__ import annotations

import pytest
from tests.server.parsers.cutting import accepted, check, forced, scanner

from moesaic.server.parsers.dsml import Dsml, DsmlV4
from moesaic.server.parsers.invoke import Invoke
from moesaic.server.parsers.minimax import MiniMax
from moesaic.server.parsers.think import THINK

MINIMAX = (
    '<minimax:tool_call>\n<invoke name="get_weather">\n<parameter name="city">Rome</parameter>\n'
    '<parameter name="days">3</parameter>\n</invoke>\n<invoke name="get_time">\n</invoke>\n</minimax:tool_call>'
)
DSML = (
    '<｜DSML｜function_calls>\n<｜DSML｜invoke name="get_weather">\n'
    '<｜DSML｜parameter name="city" string="true">Rome</｜DSML｜parameter>\n'
    '<｜DSML｜parameter name="days" string="false">3</｜DSML｜parameter>\n</｜DSML｜invoke>\n'
    '<｜DSML｜invoke name="get_time">\n</｜DSML｜invoke>\n</｜DSML｜function_calls>'
)
V4 = DSML.replace("function_calls", "tool_calls")
CASES = [(MiniMax(), MINIMAX), (Dsml(), DSML), (DsmlV4(), V4)]
IDS = ["minimax", "v3.2", "v4"]
CALLS = [("call", "get_weather", '{"city": "Rome", "days": 3}', ""), ("call", "get_time", "{}", "")]


@pytest.mark.parametrize(("style", "block"), CASES, ids=IDS)
def test_thoughts_text_and_calls(style: Invoke, block: str) -> None:
    text = f"I look.\n</think>\n\nOne moment.\n\n{block}[e~["
    check(
        scanner(style, THINK, opened=True, drop=("[e~[",)),
        text,
        [("reasoning", "I look."), ("text", "One moment."), *CALLS],
    )


@pytest.mark.parametrize(("style", "block"), CASES, ids=IDS)
def test_the_block_need_not_be_closed(style: Invoke, block: str) -> None:
    check(scanner(style), block.rpartition("\n")[0], CALLS)
    opener = block.partition("\n")[0]
    cut = block[: block.index("Rome")]
    check(scanner(style), cut, [("text", cut)])
    check(scanner(style), f"a {opener}\nb", [("text", f"a {opener}\nb")])


def test_the_closing_tag_in_a_value() -> None:
    text = MINIMAX.replace("Rome", "a\n</minimax:tool_call></invoke>b")
    call = ("call", "get_weather", '{"city": "a\\n</minimax:tool_call></invoke>b", "days": 3}', "")
    check(scanner(MiniMax()), text, [call, CALLS[1]])


def test_attributes_say_what_is_text() -> None:
    text = DSML.replace("Rome", "12").replace('days" string="false">3', 'days" string="true">3')
    check(scanner(Dsml()), text, [("call", "get_weather", '{"city": "12", "days": "3"}', ""), CALLS[1]])
    broken = DSML.replace(">3<", ">three<")
    check(scanner(Dsml()), broken, [("call", "get_weather", '{"city": "Rome", "days": "three"}', ""), CALLS[1]])


def test_schemas_say_what_is_text() -> None:
    text = MINIMAX.replace("Rome", "12").replace(">3<", ">three<")
    check(scanner(MiniMax()), text, [("call", "get_weather", '{"city": "12", "days": "three"}', ""), CALLS[1]])


@pytest.mark.parametrize(("style", "block"), CASES, ids=IDS)
@pytest.mark.parametrize(
    "special", [(), ("｜DSML｜", "<minimax:tool_call>", "</minimax:tool_call>")], ids=["text", "special"]
)
def test_the_grammar_forces_calls(style: Invoke, block: str, special: tuple[str, ...]) -> None:
    grammar = forced(style, special=special)
    assert accepted(grammar, block, special) is None
    assert accepted(grammar, block.replace("Rome", "a\nb <c>"), special) is None
    assert accepted(grammar, "Hello", special) == ""
    assert accepted(grammar, block.replace(">3<", ">x<"), special) is not None
    assert accepted(grammar, block.replace('"get_time"', '"other"'), special) is not None
    assert accepted(forced(style, parallel=False, special=special), block, special) is not None
