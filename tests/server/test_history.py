from __future__ import annotations

import json
from typing import Any

import pytest

from moesaic.engine.serving.params import SamplingParams
from moesaic.errors import RequestError
from moesaic.server.conversation import ChatRequest, Message, Tool, ToolCall, ToolChoice
from moesaic.server.history import Turns, texts_of
from moesaic.server.parsers.detect import TOOL_STYLES
from moesaic.server.parsers.think import THINK
from moesaic.server.template import ChatTemplate

HERMES, MISTRAL, LLAMA = TOOL_STYLES["hermes"], TOOL_STYLES["mistral"], TOOL_STYLES["llama"]
PLAIN = Turns(HERMES, THINK, developer=False, takes_tools=True)
CALL = ToolCall("call_1", "f", '{"a": "b"}')
TOOL = Tool("f", "does", {"type": "object", "properties": {"a": {"type": "string"}}})


def request(*messages: Message, **options: Any) -> ChatRequest:
    return ChatRequest(messages, SamplingParams(), **options)


def same(text: str) -> str:
    return text


def test_messages_as_templates_take_them() -> None:
    conversation = request(
        Message("system", "s"),
        Message("user", "u", name="Ann"),
        Message("assistant", "t", "thought", (CALL,)),
        Message("tool", "r", tool_call_id="call_1"),
    )
    function = {"name": "f", "arguments": {"a": "b"}}
    assert PLAIN.messages(conversation, same) == [
        {"role": "system", "content": "s"},
        {"role": "user", "content": "u", "name": "Ann"},
        {
            "role": "assistant",
            "content": "t",
            "reasoning_content": "thought",
            "thinking": "thought",
            "tool_calls": [{"type": "function", "id": "call_1", "function": function}],
        },
        {"role": "tool", "content": "r", "name": "f", "tool_call_id": "call_1"},
    ]


def test_tools_as_templates_take_them() -> None:
    conversation = request(Message("user", "u"), tools=(TOOL, Tool("g")))
    empty = {"type": "object", "properties": {}}
    assert PLAIN.tools(conversation, str.upper) == [
        {
            "type": "function",
            "function": {
                "name": "F",
                "description": "DOES",
                "parameters": {"type": "object", "properties": {"A": {"type": "string"}}},
            },
        },
        {"type": "function", "function": {"name": "G", "description": "", "parameters": empty}},
    ]
    assert PLAIN.tools(request(Message("user", "u")), same) is None
    none = request(Message("user", "u"), tools=(TOOL,), tool_choice=ToolChoice("none"))
    assert PLAIN.tools(none, same) is None


def test_every_text_is_renamed() -> None:
    conversation = request(
        Message("developer", "d"),
        Message("user", "u", name="n"),
        Message("assistant", "t", "thought", (CALL,)),
        Message("tool", "r", tool_call_id="call_1", name="f"),
        tools=(TOOL,),
        template_arguments={"x": ["y"]},
    )
    seen: list[str] = []

    def note(text: str) -> str:
        seen.append(text)
        return text.upper()

    messages = PLAIN.messages(conversation, note)
    tools = PLAIN.tools(conversation, note)
    shown = json.dumps([messages, tools])
    for text in ('"u"', '"n"', '"thought"', '"call_1"', '"b"', '"r"', '"does"', '"d"'):
        assert text not in shown
        assert text.upper() in shown
    assert set(seen) <= set(texts_of(conversation))


def test_instructions_are_one_message() -> None:
    conversation = request(
        Message("system", "a"), Message("developer", "b"), Message("user", "u"), Message("system", "c")
    )
    assert [turn["content"] for turn in PLAIN.messages(conversation, same)] == ["a\n\nb", "u", "c"]
    knowing = Turns(None, None, developer=True, takes_tools=False)
    roles = [turn["role"] for turn in knowing.messages(request(Message("developer", "b"), Message("user", "u")), same)]
    assert roles == ["developer", "user"]
    assert PLAIN.messages(request(Message("developer", "b")), same)[0]["role"] == "system"


def test_thoughts_in_the_text_are_parted_from_it() -> None:
    turn = PLAIN.messages(request(Message("assistant", "<think>\nhm\n</think>\n\nyes")), same)[0]
    assert (turn["content"], turn["thinking"]) == ("yes", "hm")
    for text in ("a <think>b</think>", "<think>a"):
        assert PLAIN.messages(request(Message("assistant", text)), same)[0]["content"] == text
    assert PLAIN.messages(request(Message("user", "<think>a</think>b")), same)[0]["content"] == "<think>a</think>b"


def test_ids_have_the_form_of_the_style() -> None:
    turns = Turns(MISTRAL, None, developer=False, takes_tools=True)
    called, result = turns.messages(
        request(Message("assistant", "", None, (CALL,)), Message("tool", "r", tool_call_id="call_1")), same
    )
    assert called["tool_calls"][0]["id"] == result["tool_call_id"] == MISTRAL.history_id("call_1")


def test_turns_with_several_calls_are_taken_apart() -> None:
    turns = Turns(LLAMA, None, developer=False, takes_tools=True)
    other = ToolCall("call_2", "g", "{}")
    conversation = request(
        Message("user", "u"),
        Message("assistant", "t", "thought", (CALL, other)),
        Message("tool", "1", tool_call_id="call_1"),
        Message("tool", "2", tool_call_id="call_2"),
        Message("assistant", "done"),
    )
    assert [
        (turn["role"], turn["content"], len(turn.get("tool_calls", ())), turn.get("thinking"))
        for turn in turns.messages(conversation, same)
    ] == [
        ("user", "u", 0, None),
        ("assistant", "t", 1, "thought"),
        ("tool", "1", 0, None),
        ("assistant", "", 1, None),
        ("tool", "2", 0, None),
        ("assistant", "done", 0, None),
    ]


@pytest.mark.parametrize("arguments", ["[1]", "{", "1", "[" * 100_000])
def test_arguments_have_to_be_objects(arguments: str) -> None:
    conversation = request(Message("assistant", "", None, (ToolCall("x", "f", arguments),)))
    with pytest.raises(RequestError, match="arguments of the call 'x' are no JSON object"):
        PLAIN.messages(conversation, same)
    texts_of(conversation)


def test_the_tail() -> None:
    assert PLAIN.messages(request(Message("assistant", "a", "b")), same, "!")[0]["content"] == "a!"
    turn = PLAIN.messages(request(Message("assistant", "", "b")), same, "!")[0]
    assert (turn["content"], turn["thinking"], turn["reasoning_content"]) == ("", "b!", "b!")
    assert PLAIN.messages(request(Message("assistant", "")), same, "!")[0]["content"] == "!"


CALLS = "{% for m in messages %}{% for c in m.tool_calls or [] %}CALL{% endfor %}{{ m.content or '' }}{% endfor %}"


@pytest.mark.parametrize(
    ("call", "as_text"),
    [
        ("{{ c.function.name }}{{ c.function.arguments | tojson }}", False),
        ("{{ c.function.name }}{% for k, v in c.function.arguments.items() %}{{ k }}={{ v }}{% endfor %}", False),
        ("{{ c.function.name + c.function.arguments }}", True),
        ("{{ c.function.name }}{{ c.function.arguments }}", True),
    ],
)
def test_arguments_as_the_template_wants_them(call: str, as_text: bool) -> None:
    turns = Turns.of(ChatTemplate(CALLS.replace("CALL", call)), HERMES, None)
    assert turns.arguments_as_text is as_text
    assert turns.null_content is False
    given = turns.messages(request(Message("assistant", "", None, (CALL,))), same)[0]["tool_calls"][0]["function"]
    assert given["arguments"] == ('{"a": "b"}' if as_text else {"a": "b"})


def test_content_as_the_template_wants_it() -> None:
    source = "{% for m in messages %}{% if m.content is none %}" + CALLS + "{% endif %}{% endfor %}"
    turns = Turns.of(ChatTemplate(source.replace("CALL", "{{ c.function | tojson }}")), HERMES, None)
    assert turns.null_content is True
    assert turns.messages(request(Message("assistant", "", None, (CALL,))), same)[0]["content"] is None


def test_what_a_template_knows() -> None:
    turns = Turns.of(ChatTemplate("{% if m.role == 'developer' %}{% endif %}{{ tools }}"), None, None)
    assert (turns.developer, turns.takes_tools) == (True, True)
    turns = Turns.of(ChatTemplate("developer tool_calls"), None, None)
    assert (turns.developer, turns.takes_tools) == (False, False)


def test_tools_that_the_template_leaves_out_are_described_in_the_instructions() -> None:
    turns = Turns(TOOL_STYLES["deepseek"], None, developer=False, takes_tools=False)
    with_system = turns.messages(request(Message("system", "s"), Message("user", "u"), tools=(TOOL,)), str.upper)
    assert with_system[0]["content"].startswith("S\n\n## Tools")
    assert "<｜tool▁calls▁begin｜>" in with_system[0]["content"]
    without = turns.messages(request(Message("user", "u"), tools=(TOOL,)), str.upper)
    assert [turn["role"] for turn in without] == ["system", "user"]
    assert "### F\nDescription: DOES" in without[0]["content"]
