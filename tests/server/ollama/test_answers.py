"""The official client reads answers of chat and generate, whole and as streams, and errors."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import httpx
import ollama
import pytest
from tests.server.scripted import STATS, ScriptedChat, eventually, scripted_state, serving

from moesaic.engine.serving.params import Grammar
from moesaic.server.conversation import Event, Finished, ReasoningDelta, TextDelta, ToolCallDelta
from moesaic.server.ollama import chat, generate

OPERATIONS = (*chat.OPERATIONS, *generate.OPERATIONS)
HELLO: Any = [{"role": "user", "content": "Hi"}]
TOOL: Any = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object", "properties": {}}}}
THOUGHTFUL: Sequence[Event] = (
    ReasoningDelta(0, "Let me "),
    ReasoningDelta(0, "see."),
    TextDelta(0, "I will "),
    TextDelta(0, "look."),
    ToolCallDelta(0, 0, id="call_1", name="weather"),
    ToolCallDelta(0, 0, '{"place": '),
    ToolCallDelta(0, 0, '"Köln"}'),
    ToolCallDelta(0, 1, id="call_2", name="clock"),
    Finished(0, "tool_calls", STATS),
)


@contextmanager
def served(*events: Event) -> Iterator[tuple[ollama.Client, ScriptedChat]]:
    state, scripted = scripted_state(*events)
    with serving(state, OPERATIONS) as address, ollama.Client(address) as client:
        yield client, scripted


def test_whole_chat() -> None:
    with served() as (client, scripted):
        answer = client.chat("demo:latest", HELLO)
    assert (answer.message.role, answer.message.content, answer.message.thinking) == (
        "assistant",
        "Hello, world!",
        None,
    )
    assert (answer.model, answer.done, answer.done_reason) == ("demo:latest", True, "stop")
    # "user:Hi\n" are 8 code points; times are those of the scripted engine
    assert (answer.prompt_eval_count, answer.eval_count) == (8, 4)
    assert (answer.load_duration, answer.prompt_eval_duration, answer.eval_duration) == (10**7, 10**8, 2 * 10**8)
    assert answer.total_duration is not None and 0 < answer.total_duration < 10**10
    assert answer.created_at is not None and answer.created_at.endswith("Z")
    assert scripted.asked[0].template_arguments == {}


def test_streamed_chat() -> None:
    with served() as (client, _):
        parts = list(client.chat("demo", HELLO, stream=True))
    assert [part.message.content for part in parts] == ["Hello", ", ", "world", "!", ""]
    assert [part.done for part in parts] == [False] * 4 + [True]
    assert all(part.done_reason is None and part.eval_count is None for part in parts[:-1])
    assert (parts[-1].done_reason, parts[-1].eval_count, parts[-1].eval_duration) == ("stop", 4, 2 * 10**8)


def test_stream_is_the_default_and_one_object_per_line() -> None:
    with served() as (client, _):
        answer = httpx.post(f"{client._client.base_url}/api/chat", json={"model": "demo", "messages": HELLO})
    assert answer.headers["content-type"] == "application/x-ndjson"
    objects = [json.loads(line) for line in answer.text.splitlines()]
    assert ["timings" in each for each in objects] == [False] * 4 + [True]
    assert objects[-1]["timings"]["cache_n"] == 1
    assert [each["message"]["content"] for each in objects] == [
        "Hello",
        ", ",
        "world",
        "!",
        "",
    ]


def test_thoughts_and_calls_of_chat() -> None:
    with served(*THOUGHTFUL) as (client, _):
        whole = client.chat("demo", HELLO, tools=[TOOL], think=True)
        parts = list(client.chat("demo", HELLO, tools=[TOOL], stream=True))
    assert (whole.message.thinking, whole.message.content) == ("Let me see.", "I will look.")
    calls = [(each.function.name, each.function.arguments) for each in whole.message.tool_calls or ()]
    assert calls == [("weather", {"place": "Köln"}), ("clock", {})]
    assert (whole.done_reason, whole.eval_count) == ("stop", 7)
    assert [part.message.thinking for part in parts[:2]] == ["Let me ", "see."]
    assert [part.message.content for part in parts[2:4]] == ["I will ", "look."]
    streamed = [
        (each.function.name, each.function.arguments) for part in parts[4:] for each in part.message.tool_calls or ()
    ]
    assert streamed == calls
    assert [len(part.message.tool_calls or ()) for part in parts[4:]] == [1, 1, 0]
    assert parts[-1].done


def test_an_answer_is_accepted_back_with_its_results() -> None:
    with served(*THOUGHTFUL) as (client, scripted):
        first = client.chat("demo", HELLO, tools=[TOOL])
        results = [
            {"role": "tool", "content": "noon", "tool_name": "clock"},
            {"role": "tool", "content": "rain", "tool_name": "weather"},
        ]
        client.chat("demo", [*HELLO, first.message, *results], tools=[TOOL])
    _, assistant, clock, weather = scripted.asked[1].messages
    assert (assistant.reasoning, assistant.content) == ("Let me see.", "I will look.")
    named = {each.name: each for each in assistant.tool_calls}
    assert {name: call.arguments for name, call in named.items()} == {"weather": '{"place":"Köln"}', "clock": "{}"}
    assert (clock.role, clock.content, clock.tool_call_id) == ("tool", "noon", named["clock"].id)
    assert (weather.content, weather.tool_call_id, weather.name) == ("rain", named["weather"].id, "weather")
    assert named["clock"].id != named["weather"].id


def test_whole_and_streamed_generate() -> None:
    with served() as (client, scripted):
        whole = client.generate("demo", "Hi", system="Be brief")
        parts = list(client.generate("demo", "Hi", stream=True))
    assert (whole.response, whole.done, whole.done_reason) == ("Hello, world!", True, "stop")
    assert (whole.prompt_eval_count, whole.eval_count) == (len("system:Be brief\nuser:Hi\n"), 4)
    assert [part.response for part in parts] == ["Hello", ", ", "world", "!", ""]
    assert [part.done for part in parts] == [False] * 4 + [True]
    assert [(each.role, each.content) for each in scripted.asked[0].messages] == [
        ("system", "Be brief"),
        ("user", "Hi"),
    ]


def test_thoughts_of_generate() -> None:
    with served(*THOUGHTFUL[:4], Finished(0, "length", STATS)) as (client, _):
        whole = client.generate("demo", "Hi", think="low")
        parts = list(client.generate("demo", "Hi", stream=True))
    assert (whole.thinking, whole.response, whole.done_reason) == ("Let me see.", "I will look.", "length")
    assert [part.thinking for part in parts] == ["Let me ", "see.", None, None, None]
    assert parts[-1].done_reason == "length"


@pytest.mark.parametrize("stream", [False, True])
def test_raw_prompts_go_through_no_template(stream: Any) -> None:
    with served() as (client, scripted):
        answer = client.generate("demo", "<s>Hi", raw=True, stream=stream, options={"num_predict": 2})
        parts = list(answer) if stream else [answer]
    assert "".join(part.response for part in parts) == "Hello, "
    assert (parts[-1].done_reason, parts[-1].prompt_eval_count) == ("length", 5)
    assert scripted.asked == []
    assert scripted.completed[0][0] == "<s>Hi"


def test_nothing_to_answer_asks_whether_the_model_is_there() -> None:
    with served() as (client, scripted):
        loaded = client.generate("demo")
        streamed = list(client.generate("demo", stream=True, keep_alive=0))
        chatted = client.chat("demo")
        assert (loaded.response, loaded.done, loaded.done_reason) == ("", True, "load")
        assert [(part.response, part.done_reason) for part in streamed] == [("", "load")]
        assert (chatted.message.content, chatted.done_reason) == ("", "load")
        assert scripted.asked == [] and scripted.engine.asked == []
        scripted.engine.status = "dead"
        with pytest.raises(ollama.ResponseError) as caught:
            client.generate("demo")
    assert caught.value.status_code == 503


def test_logprobs() -> None:
    with served() as (client, scripted):
        whole = client.chat("demo", HELLO, logprobs=True, top_logprobs=2)
        parts = list(client.generate("demo", "Hi", stream=True, logprobs=True))
    assert whole.logprobs is not None and [each.token for each in whole.logprobs] == ["Hello", ", ", "world", "!"]
    top = whole.logprobs[0].top_logprobs
    assert whole.logprobs[0].logprob == -0.5
    assert top is not None and [(each.token, each.logprob) for each in top] == [("w0", -1.0), ("w1", -2.0)]
    assert [len(part.logprobs or ()) for part in parts] == [1, 1, 1, 1, 0]
    assert [request.params.logprobs for request in scripted.asked] == [2, 0]


def test_formats() -> None:
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}}
    with served() as (client, scripted):
        client.chat("demo", HELLO, format=schema)
        client.generate("demo", "Hi", format="json")
        client.generate("demo", "Hi", format="")
    grammars = [request.params.grammar for request in scripted.asked]
    assert grammars[0] is not None and json.loads(grammars[0].text) == schema
    assert grammars[0].kind == "json_schema"
    assert grammars[1:] == [Grammar("json_object"), None]


@pytest.mark.parametrize("stream", [False, True])
def test_errors_before_the_answer(stream: Any) -> None:
    def status(*arguments: Any, **more: Any) -> tuple[int, str]:
        with pytest.raises(ollama.ResponseError) as caught:
            list(client.chat(*arguments, stream=stream, **more))
        return caught.value.status_code, caught.value.error

    with served() as (client, scripted):
        assert status("llama3", HELLO) == (404, "model 'llama3' not found: this server has 'demo'.")
        assert status("demo", HELLO, options={"mirostat": 2})[0] == 400
        scripted.refuse = "no system here"
        assert status("demo", HELLO) == (400, "no system here")
        scripted.refuse = ""
        scripted.engine.overloaded = True
        assert status("demo", HELLO) == (429, "too many requests wait")


def test_engine_that_dies_in_the_middle() -> None:
    with served() as (client, scripted):
        scripted.engine.fail_after = 2
        texts = []
        with pytest.raises(ollama.ResponseError, match="not available at the moment"):
            for part in client.chat("demo", HELLO, stream=True):
                texts.append(part.message.content)
        scripted.engine.status = "ready"
        with pytest.raises(ollama.ResponseError) as caught:
            client.generate("demo", "Hi", raw=True)
    assert texts == ["Hello", ", "]
    assert caught.value.status_code == 503


@pytest.mark.parametrize(("reason", "status"), [("error", 500), ("cancelled", 503)])
def test_answers_that_were_not_completed(reason: Any, status: int) -> None:
    with served(TextDelta(0, "x"), Finished(0, reason, STATS)) as (client, _):
        with pytest.raises(ollama.ResponseError, match="answer"):
            list(client.chat("demo", HELLO, stream=True))
        with pytest.raises(ollama.ResponseError) as caught:
            client.generate("demo", "Hi")
    assert caught.value.status_code == status


@pytest.mark.parametrize("route", ["chat", "generate", "raw"])
@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_cancels(route: str, stream: bool) -> None:
    with served() as (client, scripted):
        scripted.engine.words = ["x"] * 10_000
        scripted.engine.delay = 0.02
        body: dict[str, Any] = {"model": "demo", "messages": HELLO, "prompt": "Hi", "stream": stream}
        url = f"{client._client.base_url}/api/{'chat' if route == 'chat' else 'generate'}"
        body["raw"] = route == "raw"
        if stream:
            with httpx.stream("POST", url, json=body) as answer:
                assert "x" in next(answer.iter_lines())
        else:
            with pytest.raises(httpx.ReadTimeout):
                httpx.post(url, json=body, timeout=0.3)
        assert eventually(lambda: scripted.engine.cancelled == 1)
