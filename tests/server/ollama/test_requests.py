"""What becomes of the fields of a request: a conversation, or a refusal that names the field."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import ollama
import pytest
from tests.server.scripted import ScriptedChat, scripted_state, serving

from moesaic.engine.serving.params import SamplingParams
from moesaic.server.conversation import ChatRequest, Message, Tool, ToolCall
from moesaic.server.ollama import chat, generate

HELLO: Any = [{"role": "user", "content": "Hi"}]
SCHEMA: Any = {"type": "object", "required": ["place"], "properties": {"place": {"type": "string"}}}
TOOL: Any = {"type": "function", "function": {"name": "weather", "description": "of a place", "parameters": SCHEMA}}


class Server:
    """A client and what arrives in the conversation."""

    def __init__(self, client: ollama.Client, scripted: ScriptedChat) -> None:
        self.client, self.scripted = client, scripted

    def post(self, path: str, fields: dict[str, Any]) -> tuple[int, Any]:
        """Status and JSON of an answer to fields that the client would not send."""
        answer = self.client._client.post(path, json={"model": "demo", "stream": False, **fields})
        return answer.status_code, answer.json()

    def asked(self, **fields: Any) -> ChatRequest:
        """The conversation that a chat becomes."""
        assert self.post("/api/chat", {"messages": HELLO, **fields})[0] == 200
        return self.scripted.asked[-1]

    def refused(self, path: str = "/api/chat", **fields: Any) -> str:
        """The message of a refusal."""
        status, body = self.post(path, {"messages": HELLO, "prompt": "Hi", **fields})
        assert status == 400 and body.keys() == {"error"}
        assert self.scripted.asked == [] and self.scripted.completed == []
        message: str = body["error"]
        return message


@pytest.fixture(scope="module")
def address_and_chat() -> Iterator[tuple[str, ScriptedChat]]:
    state, scripted = scripted_state()
    with serving(state, (*chat.OPERATIONS, *generate.OPERATIONS)) as address:
        yield address, scripted


@pytest.fixture
def server(address_and_chat: tuple[str, ScriptedChat]) -> Iterator[Server]:
    address, scripted = address_and_chat
    scripted.asked.clear()
    scripted.completed.clear()
    scripted.has_tools = scripted.has_reasoning = True
    with ollama.Client(address) as client:
        yield Server(client, scripted)


def test_the_least_that_can_be_asked(server: Server) -> None:
    assert server.asked() == ChatRequest((Message("user", "Hi"),), SamplingParams())


def test_options(server: Server) -> None:
    asked = server.asked(
        options={
            "temperature": 0.25,
            "top_k": 7,
            "top_p": 0.5,
            "min_p": 0.125,
            "seed": 11,
            "num_predict": 3,
            "stop": ["a", "b"],
            "repeat_penalty": 1.25,
            "presence_penalty": 0.5,
            "frequency_penalty": -0.5,
            "num_ctx": 4096,
        }
    )
    assert asked.params == SamplingParams(
        max_tokens=3,
        temperature=0.25,
        top_k=7,
        top_p=0.5,
        min_p=0.125,
        repetition_penalty=1.25,
        presence_penalty=0.5,
        frequency_penalty=-0.5,
        seed=11,
        stop=("a", "b"),
    )


@pytest.mark.parametrize(
    ("options", "params"),
    [
        ({"num_predict": -1}, SamplingParams()),
        ({"num_predict": -2}, SamplingParams()),
        ({"num_predict": 0}, SamplingParams(max_tokens=0)),
        ({"seed": -1}, SamplingParams()),
        ({"seed": 0}, SamplingParams(seed=0)),
        ({"stop": "x"}, SamplingParams(stop=("x",))),
        ({"repeat_penalty": 1.5, "repeat_last_n": -1}, SamplingParams(repetition_penalty=1.5)),
        ({"repeat_penalty": 1.5, "repeat_last_n": 0}, SamplingParams(repetition_penalty=1.0)),
        ({"repeat_penalty": 1.0, "repeat_last_n": 64}, SamplingParams(repetition_penalty=1.0)),
        ({"mirostat": 0, "mirostat_tau": 5.0, "mirostat_eta": 0.1}, SamplingParams()),
        ({"tfs_z": 1, "typical_p": 1.0, "num_keep": 4, "penalize_newline": True}, SamplingParams()),
        ({"num_gpu": 99, "main_gpu": 0, "num_thread": 8, "num_batch": 512, "numa": False}, SamplingParams()),
        ({"use_mmap": True, "use_mlock": False, "low_vram": False, "f16_kv": True}, SamplingParams()),
        (None, SamplingParams()),
    ],
)
def test_values_that_mean_something_else_or_nothing(server: Server, options: Any, params: SamplingParams) -> None:
    assert server.asked(options=options).params == params


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mirostat": 2}, "options.mirostat is not supported"),
        ({"tfs_z": 0.5}, "options.tfs_z is not supported"),
        ({"typical_p": 0.5}, "options.typical_p is not supported"),
        ({"num_keep": 24}, "options.num_keep is not supported"),
        ({"penalize_newline": False}, "options.penalize_newline is not supported"),
        ({"embedding_only": True}, "options.embedding_only is not supported"),
        ({"dry_multiplier": 0.8}, "options: Object contains unknown field `dry_multiplier`"),
        ({"num_ctx": 4097}, "options.num_ctx: expected at most 4096"),
        ({"num_ctx": 0}, "options.num_ctx: Expected `int` >= 1"),
        ({"num_predict": -3}, "options.num_predict: Expected `int` >= -2"),
        ({"seed": -2}, "options.seed: Expected `int` >= -1"),
        ({"temperature": -1}, "options.temperature: Expected `float` >= 0"),
        ({"temperature": "hot"}, "options.temperature: Expected `float"),
        ({"stop": [""]}, "stop holds an empty string"),
        ({"repeat_penalty": 1.5, "repeat_last_n": 64}, "options.repeat_last_n: penalties of this server"),
        ({"presence_penalty": 1.5, "repeat_last_n": 0}, "options.repeat_last_n: penalties of this server"),
    ],
    ids=lambda value: value[:60] if isinstance(value, str) else "",
)
@pytest.mark.parametrize("path", ["/api/chat", "/api/generate"])
def test_refused_options(server: Server, path: str, options: Any, message: str) -> None:
    assert server.refused(path, options=options).startswith(message)
    assert server.refused("/api/generate", options=options, raw=True).startswith(message)


@pytest.mark.parametrize(
    ("think", "arguments"),
    [
        (None, {}),
        (True, {"enable_thinking": True, "thinking": True}),
        (False, {"enable_thinking": False, "thinking": False}),
        ("low", {"enable_thinking": True, "thinking": True, "reasoning_effort": "low"}),
        ("max", {"enable_thinking": True, "thinking": True, "reasoning_effort": "high"}),
    ],
)
def test_thinking(server: Server, think: Any, arguments: Any) -> None:
    assert dict(server.asked(think=think).template_arguments) == arguments
    server.client.generate("demo", "Hi", think=think)
    assert dict(server.scripted.asked[-1].template_arguments) == arguments


def test_a_model_that_does_not_think_and_calls_nothing(server: Server) -> None:
    server.scripted.has_reasoning = server.scripted.has_tools = False
    assert server.refused(think=True) == "'demo' does not support thinking."
    assert server.refused(think="low") == "'demo' does not support thinking."
    assert server.refused(tools=[TOOL]) == "'demo' does not support tools."
    assert dict(server.asked(think=False).template_arguments) == {"enable_thinking": False, "thinking": False}


def test_turns_and_tools(server: Server) -> None:
    def call(place: str, **more: Any) -> dict[str, Any]:
        return {"function": {"name": "weather", "arguments": {"place": place}}, **more}

    server.client.chat(
        "demo",
        [
            {"role": "system", "content": "S"},
            {"role": "user", "content": "a"},
            {"role": "assistant", "content": "", "thinking": "hm", "tool_calls": [call("Köln"), call("Bonn")]},
            {"role": "tool", "content": "rain", "tool_name": "weather"},
            {"role": "tool", "content": "sun", "tool_name": "weather"},
            {"role": "user", "content": "b"},
        ],
        tools=[TOOL],
    )
    asked = server.scripted.asked[-1]
    calls = (ToolCall("call_0", "weather", '{"place":"Köln"}'), ToolCall("call_1", "weather", '{"place":"Bonn"}'))
    assert asked.messages == (
        Message("system", "S"),
        Message("user", "a"),
        Message("assistant", "", "hm", calls),
        Message("tool", "rain", tool_call_id="call_0", name="weather"),
        Message("tool", "sun", tool_call_id="call_1", name="weather"),
        Message("user", "b"),
    )
    assert [(each.name, each.description) for each in asked.tools] == [("weather", "of a place")]
    assert asked.tools[0].parameters["properties"] == {"place": {"type": "string"}}
    assert not asked.continue_last


def test_results_with_the_ids_of_their_calls(server: Server) -> None:
    calls = [{"id": each, "function": {"name": "weather", "arguments": {}}} for each in ("x", "y")]
    asked = server.asked(
        messages=[
            *HELLO,
            {"role": "assistant", "tool_calls": calls},
            {"role": "tool", "content": "2", "tool_call_id": "y"},
            {"role": "tool", "content": "1", "tool_call_id": "x"},
        ]
    )
    assert [(each.tool_call_id, each.name) for each in asked.messages[2:]] == [("y", "weather"), ("x", "weather")]


def test_the_last_turn_of_an_assistant_is_gone_on_with(server: Server) -> None:
    asked = server.asked(messages=[*HELLO, {"role": "assistant", "content": "The answer is ("}])
    assert asked.continue_last


def test_tool_made_of_a_python_function(server: Server) -> None:
    def add(a: int, b: int) -> int:
        """Add two numbers.

        Args:
            a: first
            b: second
        """
        return a + b

    server.client.chat("demo", HELLO, tools=[add])
    (tool,) = server.scripted.asked[-1].tools
    assert isinstance(tool, Tool) and (tool.name, tool.description) == ("add", "Add two numbers.")
    assert tool.parameters["properties"]["a"] == {"type": "integer", "description": "first"}


@pytest.mark.parametrize(
    ("path", "fields", "message"),
    [
        ("/api/chat", {"format": "xml"}, "format: expected 'json' or a JSON schema"),
        ("/api/chat", {"think": "hard"}, "think: Invalid enum value 'hard'"),
        ("/api/chat", {"truncate": True}, "truncate is not supported"),
        ("/api/chat", {"shift": True}, "shift is not supported"),
        ("/api/chat", {"top_logprobs": 21}, "top_logprobs: Expected `int` <= 20"),
        (
            "/api/chat",
            {"messages": [{"role": "user", "content": "x", "images": ["AA=="]}]},
            "messages[0].images: images",
        ),
        ("/api/chat", {"messages": [{"role": "owner", "content": "x"}]}, "messages[0].role: Invalid enum value"),
        ("/api/chat", {"tools": [TOOL, TOOL]}, "tools[1].function.name: expected a name of its own"),
        ("/api/chat", {"tools": [{"function": {"name": "a b"}}]}, "tools[0].function.name: Expected `str` matching"),
        ("/api/chat", {"tools": [{"function": {"name": "a\n"}}]}, "tools[0].function.name: expected a name of its own"),
        ("/api/generate", {"suffix": "x"}, "suffix is not supported"),
        ("/api/generate", {"template": "x"}, "template is not supported"),
        ("/api/generate", {"images": ["AA=="]}, "images is not supported"),
        ("/api/generate", {"context": [1, 2]}, "context is not supported"),
        ("/api/generate", {"raw": True, "system": "x"}, "system: a raw prompt goes through no template"),
        ("/api/generate", {"raw": True, "think": True}, "think: a raw prompt goes through no template"),
        ("/api/generate", {"prompt": ["x"]}, "prompt: Expected `str | null`"),
    ],
    ids=lambda value: value[:60] if isinstance(value, str) else "",
)
def test_refusals_name_the_field(server: Server, path: str, fields: Any, message: str) -> None:
    assert server.refused(path, **fields).startswith(message)


@pytest.mark.parametrize(
    "fields",
    [
        {"keep_alive": "5m"},
        {"keep_alive": -1},
        {"suffix": "", "template": "", "images": [], "context": []},
        {"truncate": False, "format": None, "no_such_field": 1},
    ],
)
def test_harmless_fields(server: Server, fields: Any) -> None:
    status, body = server.post("/api/generate", {"prompt": "Hi", **fields})
    assert (status, body["response"]) == (200, "Hello, world!")
    assert server.scripted.asked == [ChatRequest((Message("user", "Hi"),), SamplingParams())]
