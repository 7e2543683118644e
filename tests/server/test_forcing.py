from __future__ import annotations

import json
from typing import Any

import pytest
from tests.server.parsers.cutting import TIME, WEATHER, accepted, tokens

from moesaic.engine.serving.params import Grammar, SamplingParams
from moesaic.errors import RequestError
from moesaic.server.conversation import ChatRequest, Message, Tool, ToolChoice
from moesaic.server.forcing import Thinking, answer_grammar
from moesaic.server.parsers.base import ReasoningStyle, ToolStyle
from moesaic.server.parsers.detect import TOOL_STYLES
from moesaic.server.parsers.harmony import CHANNELS
from moesaic.server.parsers.think import THINK

SCHEMA = json.dumps(
    {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"], "additionalProperties": False}
)
WANTED = Grammar("json_schema", SCHEMA)
CALL = '<tool_call>\n{"name": "get_time", "arguments": {}}\n</tool_call>'
SPECIALS = {"text": (), "special": ("<think>", "</think>", "<tool_call>", "</tool_call>")}
HARMONY = ("<|start|>", "<|channel|>", "<|message|>", "<|constrain|>", "<|end|>")


def grammar_of(
    thinking: Thinking,
    special: tuple[str, ...] = (),
    grammar: Grammar | None = None,
    choice: ToolChoice | None = None,
    *,
    style: ToolStyle = TOOL_STYLES["hermes"],
    reasoning: ReasoningStyle = THINK,
    strict: bool = False,
    **options: Any,
) -> Grammar | None:
    time = TIME if not strict else type(TIME)(TIME.name, TIME.description, TIME.parameters, strict=True)
    request = ChatRequest(
        (Message("user", "a"),),
        SamplingParams(grammar=grammar),
        tools=(WEATHER, time) if choice is not None else (),
        tool_choice=choice or ToolChoice(),
        **options,
    )
    return answer_grammar(request, style, reasoning, thinking, tokens(special)[1])


def test_nothing_is_forced_without_need() -> None:
    assert grammar_of("maybe") is None
    assert grammar_of("maybe", choice=ToolChoice("auto")) is None
    assert grammar_of("maybe", choice=ToolChoice("none")) is None
    assert grammar_of("closed", (), WANTED) is WANTED
    assert grammar_of("never", (), WANTED, ToolChoice("none")) is WANTED


@pytest.mark.parametrize("special", SPECIALS.values(), ids=SPECIALS)
@pytest.mark.parametrize(
    "grammar",
    [
        WANTED,
        Grammar("json_object"),
        Grammar("regex", r"\{\"a\": [1/]+\}"),
        Grammar("lark", 'start: "{" rest\nrest: "\\"a\\": 1}"\n'),
    ],
    ids=lambda grammar: grammar.kind,
)
def test_the_form_of_an_answer_begins_behind_the_thoughts(special: tuple[str, ...], grammar: Grammar) -> None:
    answer = '{"a": 1}'
    opened = grammar_of("open", special, grammar)
    assert opened is not None
    assert opened.kind == "lark"
    assert accepted(opened.text, f'I {{ "x" think\n</think>\n\n{answer}', special) is None
    assert accepted(opened.text, "I think</think>\n\nHello", special) == "I think</think>\n\n"
    maybe = grammar_of("maybe", special, grammar)
    assert maybe is not None
    assert accepted(maybe.text, f"<think>\nI think\n</think>\n\n{answer}", special) is None
    assert accepted(maybe.text, f"\n{answer}", special) is None
    assert accepted(maybe.text, "Hello", special) == ""
    assert accepted(maybe.text, "<think>I think</think>Hello", special) == "<think>I think</think>"


@pytest.mark.parametrize("special", SPECIALS.values(), ids=SPECIALS)
def test_calls_are_forced_behind_the_thoughts(special: tuple[str, ...]) -> None:
    for choice, other in ((ToolChoice("required"), None), (ToolChoice("named", "get_time"), '{"name": "get_')):
        grammar = grammar_of("maybe", special, WANTED, choice)
        assert grammar is not None
        assert accepted(grammar.text, f"<think>\nHm.\n</think>\n\n{CALL}", special) is None
        assert accepted(grammar.text, f"{CALL}\n{CALL}", special) is None
        assert accepted(grammar.text, '{"a": 1}', special) == ""
        weather = CALL.replace("get_time", "get_weather").replace("{}", '{"city": ""}')
        stuck = accepted(grammar.text, weather, special)
        assert stuck is None if other is None else str(stuck).endswith(other)
        alone = grammar_of("closed", special, None, choice, parallel_tool_calls=False)
        assert alone is not None
        assert accepted(alone.text, CALL, special) is None
        assert accepted(alone.text, f"{CALL}\n{CALL}", special) == CALL


@pytest.mark.parametrize("special", SPECIALS.values(), ids=SPECIALS)
def test_a_form_and_calls(special: tuple[str, ...]) -> None:
    grammar = grammar_of("open", special, WANTED, ToolChoice("auto"))
    assert grammar is not None
    for answer in ('{"a": 1}', CALL):
        assert accepted(grammar.text, f"Hm.</think>{answer}", special) is None
    assert accepted(grammar.text, "Hm.</think>Hello", special) == "Hm.</think>"


@pytest.mark.parametrize("special", SPECIALS.values(), ids=SPECIALS)
def test_strict_tools_allow_text(special: tuple[str, ...]) -> None:
    grammar = grammar_of("open", special, None, ToolChoice("auto"), strict=True)
    assert grammar is not None
    for answer in ("Hello < you", CALL, f"One moment.\n{CALL}"):
        assert accepted(grammar.text, f"Hm.</think>{answer}", special) is None
    stuck = accepted(grammar.text, f"Hm.</think>One moment.\n{CALL.replace('get_time', 'rm')}", special)
    assert str(stuck).endswith('{"name": "')


@pytest.mark.parametrize("mode", ["required", "auto"])
@pytest.mark.parametrize("name", TOOL_STYLES)
def test_every_style_compiles(name: str, mode: Any) -> None:
    style, reasoning = TOOL_STYLES[name], CHANNELS if name == "harmony" else THINK
    markers = {marker for marker in (*style.markers, *THINK.markers) if marker.startswith(("<", "["))}
    thinkings: tuple[Thinking, ...] = ("open", "maybe", "closed")
    for special in ((), HARMONY, tuple(sorted(markers))):
        for thinking in thinkings:
            for wanted in (None, WANTED):
                options: dict[str, Any] = {"style": style, "reasoning": reasoning, "strict": True}
                grammar = grammar_of(thinking, special, wanted, ToolChoice(mode), **options)
                assert grammar is not None
                accepted(grammar.text, "", special)  # which looks for errors in the grammar


def test_an_answer_that_is_a_json_object_or_text() -> None:
    style = TOOL_STYLES["llama"]
    free = grammar_of("closed", (), None, ToolChoice("auto"), style=style, strict=True)
    assert free is not None
    assert accepted(free.text, "Hello") is None
    assert accepted(free.text, '{"name": "get_time", "parameters": {}}') is None
    assert accepted(free.text, '{"name": "rm"') is not None


@pytest.mark.parametrize("special", [(), HARMONY], ids=["text", "special"])
def test_channels(special: tuple[str, ...]) -> None:
    style = TOOL_STYLES["harmony"]
    thoughts = "<|channel|>analysis<|message|>Hm.<|end|><|start|>assistant"
    final, call = (
        "<|channel|>final<|message|>",
        "<|channel|>commentary to=functions.get_time <|constrain|>json<|message|>{}",
    )
    form = grammar_of("maybe", special, WANTED, style=style, reasoning=CHANNELS)
    assert form is not None
    for before in ("", thoughts):
        assert accepted(form.text, before + final + '{"a": 1}', special) is None
        assert accepted(form.text, before + final + "Hello", special) == before + final
    forced = grammar_of("maybe", special, None, ToolChoice("required"), style=style, reasoning=CHANNELS)
    assert forced is not None
    assert accepted(forced.text, thoughts + call, special) is None
    assert accepted(forced.text, thoughts + final, special) is not None
    free = grammar_of("maybe", special, None, ToolChoice("auto"), style=style, reasoning=CHANNELS, strict=True)
    assert free is not None
    assert accepted(free.text, thoughts + call, special) is None
    assert accepted(free.text, thoughts + final + "Hello", special) is None


@pytest.mark.parametrize(
    ("regex", "text"),
    [(r"a/b", "a/b"), (r"a\/b", "a/b"), (r"a\\", "a\\"), ("a\nb", "a\nb"), (r"[/\]]+", "/]/"), (r"\\/x", r"\/x")],
)
def test_regular_expressions_end_where_they_should(regex: str, text: str) -> None:
    grammar = grammar_of("open", (), Grammar("regex", regex))
    assert grammar is not None
    assert accepted(grammar.text, f"</think>{text}") is None
    assert accepted(grammar.text, f"</think>{text}x") == f"</think>{text}"


@pytest.mark.parametrize(
    "grammar",
    [
        Grammar("json_schema", "{} \nstart: /.*/"),
        Grammar("json_schema", '{"$ref": "http://other/"}'),
        Grammar("json_schema", "[" * 100_000),
        Grammar("regex", "a\\"),
    ],
)
def test_grammars_that_cannot_be_a_part_of_one(grammar: Grammar) -> None:
    with pytest.raises(RequestError) as caught:
        grammar_of("open", (), grammar)
    assert caught.value.param == "response_format"


def test_any_json() -> None:
    for schema, wrong in (("true", None), ("{}", None)):
        grammar = grammar_of("open", (), Grammar("json_schema", schema))
        assert grammar is not None
        assert accepted(grammar.text, "</think>[1]") is wrong


def test_schemas_of_tools() -> None:
    odd = {"type": "object", "properties": {"a": {"$ref": "http://other/"}}}
    for strict in (False, True):
        tool = Tool("f", "", odd, strict)
        conversation = ChatRequest((Message("user", "a"),), SamplingParams(), (tool,), ToolChoice("required"))
        if strict:
            with pytest.raises(RequestError, match="tool 'f': the schema refers to 'http://other/'") as caught:
                answer_grammar(conversation, TOOL_STYLES["hermes"], None, "never", {})
            assert caught.value.param == "tools"
        else:
            grammar = answer_grammar(conversation, TOOL_STYLES["hermes"], None, "never", {})
            assert grammar is not None
            assert accepted(grammar.text, '<tool_call>\n{"name": "f", "arguments": {"b": 1}}\n</tool_call>') is None


def test_a_style_without_a_grammar() -> None:
    class Other(type(TOOL_STYLES["hermes"])):
        name = "other"

        def grammar(self, *_: Any) -> None:
            return None

    with pytest.raises(RequestError, match="cannot be forced"):
        grammar_of("maybe", (), None, ToolChoice("required"), style=Other())
