from __future__ import annotations

import pytest
from tests.server.parsers.cutting import accepted, check, forced, scanner

from moesaic.server.parsers.llama import Llama

ROME = '{"name": "get_weather", "parameters": {"city": "Rome"}}'
CALL = ("call", "get_weather", '{"city": "Rome"}', "")


@pytest.mark.parametrize(
    "text", [ROME, f"\n{ROME} ", f"<|python_tag|>{ROME}<|eom_id|>", ROME.replace("parameters", "arguments")]
)
def test_a_call(text: str) -> None:
    check(scanner(Llama(), drop=("<|eom_id|>",)), text, [CALL])


def test_several_calls() -> None:
    check(scanner(Llama()), f"{ROME}; {ROME}", [CALL, CALL])


@pytest.mark.parametrize(
    "text",
    [
        f"Here: {ROME}",
        '{"name": "Anna", "parameters": {}}',
        '{"name": "get_weather"}',
        '{"a": 1}',
        "{",
        "<|python",
        f"{ROME} is it",
        " \n",
    ],
)
def test_what_is_no_call_is_text(text: str) -> None:
    check(scanner(Llama()), text, [("text", text)])


def test_the_grammar_forces_a_call() -> None:
    grammar = forced(Llama())
    assert accepted(grammar, ROME) is None
    assert accepted(grammar, "Hello") == ""
    assert accepted(grammar, ROME.replace("get_weather", "rm")) == '{"name": "get_'[:10]
