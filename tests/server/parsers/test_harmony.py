from __future__ import annotations

from collections.abc import Callable

import pytest
from tests.server.parsers.cutting import accepted, check, forced

from moesaic.server.parsers.base import Parser
from moesaic.server.parsers.harmony import Harmony, HarmonyParser

SPECIAL = ("<|start|>", "<|channel|>", "<|message|>", "<|constrain|>", "<|end|>", "<|return|>", "<|call|>")
THOUGHTS = "<|channel|>analysis<|message|>I look.<|end|><|start|>assistant"
ANSWER = "<|channel|>final<|message|>It rains."
CALL = '<|channel|>commentary to=functions.get_weather <|constrain|>json<|message|>{"city": "Rome"}'
CALLED = ("call", "get_weather", '{"city": "Rome"}', "")


def harmony(offered: bool = True, **options: object) -> Callable[[], Parser]:
    return lambda: HarmonyParser(offered, **options)


@pytest.mark.parametrize("end", ["", "<|return|>", "<|end|>"])
def test_thoughts_and_answer(end: str) -> None:
    check(harmony(), f"{THOUGHTS}{ANSWER}{end}", [("reasoning", "I look."), ("text", "It rains.")])


@pytest.mark.parametrize("end", ["", "<|call|>"])
@pytest.mark.parametrize(
    "call", [CALL, '<|start|>assistant to=functions.get_weather<|channel|>commentary json<|message|>{"city": "Rome"}']
)
def test_a_call(call: str, end: str) -> None:
    check(harmony(), f"{THOUGHTS}{call}{end}", [("reasoning", "I look."), CALLED])


def test_text_before_a_call() -> None:
    text = f"{THOUGHTS}<|channel|>commentary<|message|>One moment.<|end|><|start|>assistant{CALL}<|call|>"
    check(harmony(), text, [("reasoning", "I look."), ("text", "One moment."), CALLED])


def test_several_messages_of_a_kind_are_parted() -> None:
    text = f"{THOUGHTS}{THOUGHTS}<|channel|>commentary<|message|>Wait.<|end|><|start|>assistant{ANSWER}"
    check(harmony(), text, [("reasoning", "I look.\n\nI look."), ("text", "Wait.\n\nIt rains.")])


def test_what_is_no_call_is_text() -> None:
    check(harmony(), CALL.replace('{"city": "Rome"}', "[1"), [("text", "[1")])
    check(harmony(offered=False), f"{CALL}<|call|>", [("text", '{"city": "Rome"}')])
    check(harmony(), "<|channel|>analysis to=python<|message|>1 + 1<|call|>", [("reasoning", "1 + 1")])


def test_the_prompt_has_begun_a_message() -> None:
    check(harmony(inside="final"), " rains.<|return|>", [("text", " rains.")])
    check(
        harmony(inside="analysis"),
        f" look.<|end|><|start|>assistant{ANSWER}",
        [("reasoning", " look."), ("text", "It rains.")],
    )


def test_other_special_tokens_are_taken_out() -> None:
    text = f"<|pad|>{THOUGHTS.replace(' ', '<|pad|> ')}{CALL.replace(' ', '<|pad|> ')}<|pad|><|call|>"
    check(harmony(drop=("<|pad|>",)), text, [("reasoning", "I look."), CALLED])


def test_without_any_header() -> None:
    check(harmony(), "Just text.", [("text", "Just text.")])
    check(harmony(), "x" * 600, [("text", "x" * 600)])
    check(harmony(), "<|channel|>final", [])
    check(harmony(), "", [])


@pytest.mark.parametrize("special", [(), SPECIAL], ids=["text", "special"])
def test_the_grammar_forces_a_call(special: tuple[str, ...]) -> None:
    grammar = forced(Harmony(), special=special)
    assert accepted(grammar, CALL, special) is None
    assert accepted(grammar, "Hello", special) == ""
    assert accepted(grammar, CALL.replace("get_weather", "rm"), special) is not None
    assert accepted(grammar, CALL.replace('"Rome"', "1"), special) is not None


def test_a_turn_has_thoughts_or_text() -> None:
    turn = {"content": "b", "thinking": "a", "reasoning_content": "a"}
    Harmony().adapt(turn)
    assert turn == {"content": "", "thinking": "a\n\nb", "reasoning_content": "a\n\nb"}
