"""What becomes of the fields of a request: a conversation, or a refusal that names the field."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import anthropic
import pytest
from tests.server.scripted import ScriptedChat, scripted_state, serving

from moesaic.engine.serving.params import Grammar, SamplingParams
from moesaic.server.anthropic.messages import OPERATIONS
from moesaic.server.conversation import ChatRequest, Message, Tool, ToolCall, ToolChoice

HELLO: Any = [{"role": "user", "content": "Hi"}]
SCHEMA: Any = {"type": "object", "properties": {"place": {"type": "string"}}, "required": ["place"]}
TOOL: Any = {"name": "weather", "description": "of a place", "input_schema": SCHEMA}


class Server:
    """A client and what arrives in the conversation."""

    def __init__(self, client: anthropic.Anthropic, chat: ScriptedChat) -> None:
        self.client, self.chat = client, chat

    def asked(self, **fields: Any) -> ChatRequest:
        """The conversation that a request becomes."""
        self.client.messages.create(**{"model": "demo", "max_tokens": 9, "messages": HELLO, **fields})
        return self.chat.asked[-1]

    def refused(self, **fields: Any) -> str:
        """The message of a refusal."""
        with pytest.raises(anthropic.BadRequestError) as caught:
            self.asked(**fields)
        body: Any = caught.value.body
        assert body["type"] == "error" and body["error"]["type"] == "invalid_request_error"
        assert self.chat.asked == []
        message: str = body["error"]["message"]
        return message


@pytest.fixture(scope="module")
def address_and_chat() -> Iterator[tuple[str, ScriptedChat]]:
    state, chat = scripted_state()
    with serving(state, OPERATIONS) as address:
        yield address, chat


@pytest.fixture
def server(address_and_chat: tuple[str, ScriptedChat]) -> Iterator[Server]:
    address, chat = address_and_chat
    chat.asked.clear()
    chat.has_tools = True
    with anthropic.Anthropic(base_url=address, api_key="-", max_retries=0) as client:
        yield Server(client, chat)


def test_the_least_that_can_be_asked(server: Server) -> None:
    asked = server.asked()
    assert asked == ChatRequest((Message("user", "Hi"),), SamplingParams(max_tokens=9))


def test_sampling(server: Server) -> None:
    schema = {"type": "object", "properties": {}}
    asked = server.asked(
        extra_body={"temperature": 0.25, "top_p": 0.5, "top_k": 7},  # newer clients have no names for them
        stop_sequences=["a", "b"],
        output_config={"format": {"type": "json_schema", "schema": schema}},
    )
    grammar = asked.params.grammar
    assert grammar is not None and json.loads(grammar.text) == schema
    assert asked.params == SamplingParams(
        max_tokens=9,
        temperature=0.25,
        top_p=0.5,
        top_k=7,
        stop=("a", "b"),
        grammar=Grammar("json_schema", grammar.text),
    )
    assert server.asked(extra_body={"temperature": 2}).params.temperature == 2
    assert server.asked(max_tokens=0).params.max_tokens == 0


def test_turns(server: Server) -> None:
    asked = server.asked(
        system=[{"type": "text", "text": "One."}, {"type": "text", "text": "Two."}],
        messages=[
            {"role": "user", "content": "a"},
            {"role": "user", "content": [{"type": "text", "text": "b"}, {"type": "text", "text": "c"}]},
            {"role": "assistant", "content": "d"},
            {
                "role": "assistant",
                "content": [
                    {"type": "thinking", "thinking": "hm", "signature": "x"},
                    {"type": "redacted_thinking", "data": "secret"},
                    {"type": "text", "text": "e"},
                    {"type": "tool_use", "id": "t1", "name": "weather", "input": {"place": "Köln"}},
                ],
            },
            {
                "role": "user",
                "content": [
                    {"type": "tool_result", "tool_use_id": "t1", "content": [{"type": "text", "text": "rain"}]},
                    {"type": "text", "text": "f", "cache_control": {"type": "ephemeral"}},
                ],
            },
        ],
    )
    assert asked.messages == (
        Message("system", "One.\nTwo."),
        Message("user", "a\nb\nc"),
        Message("assistant", "de", "hm", (ToolCall("t1", "weather", '{"place":"Köln"}'),)),
        Message("tool", "rain", tool_call_id="t1", name="weather"),
        Message("user", "f"),
    )
    assert not asked.continue_last


def test_the_last_turn_of_an_assistant_is_gone_on_with(server: Server) -> None:
    asked = server.asked(system="S", messages=[*HELLO, {"role": "assistant", "content": "The answer is ("}])
    assert asked.continue_last
    assert asked.messages[-1] == Message("assistant", "The answer is (")


def test_tools(server: Server) -> None:
    asked = server.asked(tools=[TOOL, {"type": "custom", "name": "b", "input_schema": SCHEMA, "strict": True}])
    assert asked.tools == (Tool("weather", "of a place", SCHEMA), Tool("b", "", SCHEMA, True))
    assert (asked.tool_choice, asked.parallel_tool_calls) == (ToolChoice("auto"), True)


@pytest.mark.parametrize(
    ("choice", "expected", "parallel"),
    [
        ({"type": "auto"}, ToolChoice("auto"), True),
        ({"type": "auto", "disable_parallel_tool_use": True}, ToolChoice("auto"), False),
        ({"type": "any"}, ToolChoice("required"), True),
        ({"type": "any", "disable_parallel_tool_use": True}, ToolChoice("required"), False),
        ({"type": "tool", "name": "weather"}, ToolChoice("named", "weather"), True),
        ({"type": "none"}, ToolChoice("none"), True),
    ],
)
def test_tool_choice(server: Server, choice: Any, expected: ToolChoice, parallel: bool) -> None:
    asked = server.asked(tools=[TOOL], tool_choice=choice)
    assert (asked.tool_choice, asked.parallel_tool_calls) == (expected, parallel)


@pytest.mark.parametrize(
    ("fields", "arguments"),
    [
        ({}, {}),
        ({"thinking": {"type": "enabled", "budget_tokens": 1024}}, {"enable_thinking": True, "thinking": True}),
        ({"thinking": {"type": "adaptive"}}, {"enable_thinking": True, "thinking": True}),
        ({"thinking": {"type": "disabled"}}, {"enable_thinking": False, "thinking": False}),
        ({"output_config": {"effort": "low"}}, {"reasoning_effort": "low"}),
        (
            {"thinking": {"type": "adaptive"}, "output_config": {"effort": "max"}},
            {"enable_thinking": True, "thinking": True, "reasoning_effort": "high"},
        ),
    ],
)
def test_thinking(server: Server, fields: Any, arguments: Any) -> None:
    assert dict(server.asked(**fields).template_arguments) == arguments


@pytest.mark.parametrize(
    "fields",
    [
        {"metadata": {"user_id": "u"}},
        {"service_tier": "auto"},
        {"cache_control": {"type": "ephemeral"}},
        {"extra_body": {"no_such_field": [1]}},
        {"extra_body": {"container": None, "mcp_servers": []}},
        {"extra_body": {"context_management": {"edits": [{"type": "clear_thinking_20251015", "keep": "all"}]}}},
        {"extra_headers": {"anthropic-version": "2023-06-01", "anthropic-beta": "x"}},
    ],
)
def test_harmless_fields(server: Server, fields: Any) -> None:
    assert server.asked(**fields) == ChatRequest((Message("user", "Hi"),), SamplingParams(max_tokens=9))


IMAGE: Any = {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": "AA=="}}
TEXT: Any = {"type": "text", "text": "x"}
DOCUMENT: Any = {"type": "document", "source": {"type": "text", "media_type": "text/plain", "data": "x"}}
CALL: Any = {"role": "assistant", "content": [{"type": "tool_use", "id": "t1", "name": "weather", "input": {}}]}


def user(*blocks: Any) -> list[Any]:
    """A history of one turn."""
    return [{"role": "user", "content": list(blocks)}]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"max_tokens": -1}, "max_tokens: Expected `int` >= 0"),
        ({"extra_body": {"max_tokens": "9"}}, "max_tokens: Expected `int`, got `str`"),
        ({"extra_body": {"temperature": 2.5}}, "temperature: Expected `float` <= 2"),
        ({"extra_body": {"top_p": 1.5}}, "top_p: Expected `float` <= 1"),
        ({"extra_body": {"top_k": -1}}, "top_k: Expected `int` >= 0"),
        ({"stop_sequences": [""]}, "stop_sequences[0]: Expected `str` of length >= 1"),
        ({"messages": []}, "messages: Expected `array` of length >= 1"),
        ({"messages": [{"role": "system", "content": "x"}]}, "messages: expected at least one of a user"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages[0].role: Invalid enum value 'tool'"),
        ({"messages": user(IMAGE)}, "messages[0].content[0]: blocks of type 'image' are not supported"),
        (
            {"messages": user(TEXT, DOCUMENT)},
            "messages[0].content[1]: blocks of type 'document'",
        ),
        ({"messages": user({"type": "no_such"})}, "messages[0].content[0].type: Invalid value 'no_such'"),
        ({"messages": user({"type": "thinking", "thinking": "x"})}, "'thinking' does not belong to 'user'"),
        ({"messages": [{"role": "assistant", "content": [IMAGE]}]}, "messages[0].content[0]: blocks of type 'image'"),
        ({"messages": [*HELLO, CALL]}, "messages: the last one calls tools, but has no results"),
        (
            {"messages": [*HELLO, CALL, *user({"type": "tool_result", "tool_use_id": "t2"})]},
            "messages[2].content[0].tool_use_id: no call before it has the id 't2'",
        ),
        (
            {"messages": [*HELLO, CALL, *user({"type": "tool_result", "tool_use_id": "t1", "content": [IMAGE]})]},
            "messages[2].content[0].content[0]: blocks of type 'image' are not supported",
        ),
        ({"messages": [*HELLO, CALL, CALL]}, "messages[2].content[0].id: there are two calls with this id"),
        (
            {"tools": [{"type": "web_search_20250305", "name": "web_search"}]},
            "tools[0].type: 'web_search_20250305' (only tools of type 'custom' are) is not supported",
        ),
        ({"tools": [TOOL, {"type": "bash_20250124", "name": "bash"}]}, "tools[1].type: 'bash_20250124'"),
        ({"tools": [TOOL, TOOL]}, "tools[1].name: there are two tools 'weather'"),
        ({"tools": [{**TOOL, "name": "a b"}]}, "tools[0].name: Expected `str` matching regex"),
        ({"tools": [{**TOOL, "name": "a\n"}]}, "tools[0].name: expected 1 to 128 letters"),
        ({"tools": [{"name": "a"}]}, "tools[0].input_schema: expected a JSON schema"),
        ({"tools": [{**TOOL, "input_schema": {"type": "string"}}]}, "tools[0].input_schema: expected a JSON schema"),
        ({"tools": [{**TOOL, "defer_loading": True}]}, "tools[0].defer_loading: loading a tool later is not supported"),
        ({"tools": [{**TOOL, "input_examples": [{}]}]}, "tools[0].input_examples: examples of inputs is not supported"),
        ({"tools": [{**TOOL, "allowed_callers": ["code_execution_20250825"]}]}, "tools[0].allowed_callers"),
        ({"tool_choice": {"type": "any"}}, "tool_choice: 'any' needs tools"),
        ({"tools": [TOOL], "tool_choice": {"type": "tool", "name": "x"}}, "tool_choice.name: expected the name of one"),
        ({"thinking": {"type": "between_tools"}}, "thinking.type: Invalid enum value 'between_tools'"),
        ({"thinking": {"type": "enabled", "budget_tokens": 0}}, "thinking.budget_tokens: Expected `int` >= 1"),
        ({"extra_body": {"container": "c1"}}, "container is not supported by this server"),
        ({"extra_body": {"mcp_servers": [{"name": "x"}]}}, "mcp_servers is not supported by this server"),
        (
            {"extra_body": {"context_management": {"edits": [{"type": "clear_tool_uses_20250919"}]}}},
            "context_management.edits: the edit 'clear_tool_uses_20250919' is not supported",
        ),
    ],
    ids=lambda value: value[:60] if isinstance(value, str) else "",
)
def test_refusals_name_the_field(server: Server, fields: Any, message: str) -> None:
    assert message in server.refused(**fields)


def test_tools_of_a_model_that_has_none(server: Server) -> None:
    server.chat.has_tools = False
    assert server.refused(tools=[TOOL]).startswith("tools: the model 'demo' calls no tools")
    assert server.asked(tools=[TOOL], tool_choice={"type": "none"}).tool_choice == ToolChoice("none")


def test_max_tokens_is_required_except_to_count(server: Server) -> None:
    with pytest.raises(anthropic.BadRequestError, match="Object missing required field `max_tokens`"):
        server.client.post("/v1/messages", cast_to=object, body={"model": "demo", "messages": HELLO})
    count = server.client.messages.count_tokens(model="demo", messages=HELLO)
    assert count.input_tokens == len("user:Hi\n")
