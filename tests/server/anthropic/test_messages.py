"""The official client reads answers, whole and as streams, counts and errors."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import anthropic
import httpx
import pytest
from tests.server.scripted import STATS, ScriptedChat, eventually, scripted_state, serving

from moesaic.server.anthropic.messages import OPERATIONS
from moesaic.server.conversation import Event, Finished, ReasoningDelta, TextDelta, ToolCallDelta

HELLO: Any = [{"role": "user", "content": "Hi"}]
TOOL: Any = {"name": "weather", "description": "of a place", "input_schema": {"type": "object", "properties": {}}}
TIMINGS = {  # of STATS: 7 of 12 tokens in 0.1 s, 6 after the first in 0.2 s
    "queue_ms": 10.0,
    "cache_n": 5,
    "prompt_n": 7,
    "prompt_ms": 100.0,
    "prompt_per_second": 70.0,
    "predicted_n": 7,
    "predicted_ms": 200.0,
    "predicted_per_second": 30.0,
    "expert_hits": 0,
    "expert_lookups": 0,
}
THOUGHTFUL: Sequence[Event] = (
    ReasoningDelta(0, "Let me "),
    ReasoningDelta(0, "see."),
    TextDelta(0, "I will "),
    TextDelta(0, ""),
    TextDelta(0, "look."),
    ToolCallDelta(0, 0, id="call_1", name="weather"),
    ToolCallDelta(0, 0, '{"place": '),
    ToolCallDelta(0, 0, '"Köln"}'),
    ToolCallDelta(0, 1, id="call_2", name="weather"),
    Finished(0, "tool_calls", STATS),
)


@contextmanager
def served(*events: Event) -> Iterator[tuple[anthropic.Anthropic, ScriptedChat]]:
    state, chat = scripted_state(*events)
    with (
        serving(state, OPERATIONS) as address,
        anthropic.Anthropic(base_url=address, api_key="-", max_retries=0) as client,
    ):
        yield client, chat


def test_whole_answer() -> None:
    with served() as (client, chat):
        answer = client.messages.create(model="demo", max_tokens=50, messages=HELLO)
    assert [block.to_dict() for block in answer.content] == [{"type": "text", "text": "Hello, world!"}]
    assert (answer.role, answer.type, answer.model) == ("assistant", "message", "demo")
    assert (answer.stop_reason, answer.stop_sequence) == ("end_turn", None)
    assert answer.id.startswith("msg_")
    # "user:Hi\n" are 8 code points, of which the engine says that one was cached
    assert (answer.usage.input_tokens, answer.usage.cache_read_input_tokens, answer.usage.output_tokens) == (7, 1, 4)
    assert chat.asked[0].params.max_tokens == 50


def test_streamed_text() -> None:
    with served() as (client, _), client.messages.stream(model="demo", max_tokens=50, messages=HELLO) as stream:
        pieces = list(stream.text_stream)
        answer = stream.get_final_message()
    assert pieces == ["Hello", ", ", "world", "!"]
    assert (answer.stop_reason, answer.content[0].to_dict()["text"]) == ("end_turn", "Hello, world!")
    assert (answer.usage.input_tokens, answer.usage.cache_read_input_tokens, answer.usage.output_tokens) == (7, 1, 4)


def test_events_of_thoughts_text_and_calls() -> None:
    with served(*THOUGHTFUL) as (client, _):
        events = [
            each.to_dict()
            for each in client.messages.create(model="demo", max_tokens=50, messages=HELLO, tools=[TOOL], stream=True)
        ]
    signature = events[4]["delta"]["signature"]
    assert events[0]["message"]["usage"]["input_tokens"] == 8
    assert events[0]["message"]["content"] == []
    assert len(signature) > 20
    assert events[1:] == [
        _start(0, {"type": "thinking", "thinking": "", "signature": ""}),
        _delta(0, {"type": "thinking_delta", "thinking": "Let me "}),
        _delta(0, {"type": "thinking_delta", "thinking": "see."}),
        _delta(0, {"type": "signature_delta", "signature": signature}),
        {"type": "content_block_stop", "index": 0},
        _start(1, {"type": "text", "text": ""}),
        _delta(1, {"type": "text_delta", "text": "I will "}),
        _delta(1, {"type": "text_delta", "text": "look."}),
        {"type": "content_block_stop", "index": 1},
        _start(2, {"type": "tool_use", "id": "call_1", "name": "weather", "input": {}}),
        _delta(2, {"type": "input_json_delta", "partial_json": '{"place": '}),
        _delta(2, {"type": "input_json_delta", "partial_json": '"Köln"}'}),
        {"type": "content_block_stop", "index": 2},
        _start(3, {"type": "tool_use", "id": "call_2", "name": "weather", "input": {}}),
        {"type": "content_block_stop", "index": 3},
        {
            "type": "message_delta",
            "delta": {"stop_reason": "tool_use", "stop_sequence": None},
            "usage": {
                "input_tokens": 7,
                "output_tokens": 7,
                "cache_creation_input_tokens": 0,
                "cache_read_input_tokens": 5,
            },
            "timings": TIMINGS,
        },
        {"type": "message_stop"},
    ]


def _start(index: int, block: dict[str, Any]) -> dict[str, Any]:
    return {"type": "content_block_start", "index": index, "content_block": block}


def _delta(index: int, delta: dict[str, Any]) -> dict[str, Any]:
    return {"type": "content_block_delta", "index": index, "delta": delta}


def test_whole_and_streamed_answers_are_the_same() -> None:
    with served(*THOUGHTFUL) as (client, _):
        asked: Any = {"model": "demo", "max_tokens": 50, "messages": HELLO, "tools": [TOOL]}
        whole = client.messages.create(**asked)
        with client.messages.stream(**asked) as stream:
            streamed = stream.get_final_message()
    assert whole.to_dict()["content"] == [block.to_dict() for block in streamed.content]
    assert [block.type for block in whole.content] == ["thinking", "text", "tool_use", "tool_use"]
    assert [block.input for block in whole.content if block.type == "tool_use"] == [{"place": "Köln"}, {}]
    assert whole.to_dict()["timings"] == TIMINGS
    assert whole.usage.to_dict() == streamed.usage.to_dict()
    assert whole.stop_reason == streamed.stop_reason == "tool_use"


def test_an_answer_is_accepted_back_with_its_results() -> None:
    with served(*THOUGHTFUL) as (client, chat):
        first = client.messages.create(model="demo", max_tokens=50, messages=HELLO, tools=[TOOL])
        results: Any = [
            {"type": "tool_result", "tool_use_id": "call_1", "content": "rain"},
            {
                "type": "tool_result",
                "tool_use_id": "call_2",
                "content": [{"type": "text", "text": "?"}],
                "is_error": True,
            },
            {"type": "text", "text": "So?"},
        ]
        history: Any = [*HELLO, {"role": "assistant", "content": first.content}, {"role": "user", "content": results}]
        client.messages.create(model="demo", max_tokens=50, messages=history, tools=[TOOL])
    _, assistant, one, two, user = chat.asked[1].messages
    assert (assistant.reasoning, assistant.content) == ("Let me see.", "I will look.")
    assert [(each.id, each.name, each.arguments) for each in assistant.tool_calls] == [
        ("call_1", "weather", '{"place":"Köln"}'),
        ("call_2", "weather", "{}"),
    ]
    assert (one.role, one.content, one.tool_call_id, one.name) == ("tool", "rain", "call_1", "weather")
    assert (two.content, two.tool_call_id) == ("Error: ?", "call_2")
    assert (user.role, user.content) == ("user", "So?")


@pytest.mark.parametrize(
    ("finished", "max_tokens", "reason", "sequence"),
    [
        (Finished(0, "stop", STATS), 50, "end_turn", None),
        (Finished(0, "stop", STATS, "###"), 50, "stop_sequence", "###"),
        (Finished(0, "length", STATS), 7, "max_tokens", None),
        (Finished(0, "length", STATS), 8, "model_context_window_exceeded", None),
        (Finished(0, "tool_calls", STATS), 50, "tool_use", None),
    ],
)
def test_reasons(finished: Finished, max_tokens: int, reason: str, sequence: str | None) -> None:
    with served(TextDelta(0, "x"), finished) as (client, _):
        asked: Any = {"model": "demo", "max_tokens": max_tokens, "messages": HELLO, "stop_sequences": ["###"]}
        whole = client.messages.create(**asked)
        with client.messages.stream(**asked) as stream:
            streamed = stream.get_final_message()
    assert (whole.stop_reason, whole.stop_sequence) == (reason, sequence)
    assert (streamed.stop_reason, streamed.stop_sequence) == (reason, sequence)


def test_arguments_that_are_no_json_are_kept_as_text() -> None:
    call = ToolCallDelta(0, 0, '{"place": "K', "call_1", "weather")
    with served(call, Finished(0, "length", STATS)) as (client, _):
        answer = client.messages.create(model="demo", max_tokens=7, messages=HELLO, tools=[TOOL])
    assert answer.content[0].to_dict()["input"] == {"INVALID_JSON": '{"place": "K'}
    assert answer.stop_reason == "max_tokens"


def test_thoughts_that_are_not_shown_leave_their_signature() -> None:
    with served(*THOUGHTFUL) as (client, _):
        thinking: Any = {"type": "adaptive", "display": "omitted"}
        with client.messages.stream(model="demo", max_tokens=50, messages=HELLO, thinking=thinking) as stream:
            block = stream.get_final_message().content[0]
        shown = client.messages.create(model="demo", max_tokens=50, messages=HELLO).content[0]
    assert block.type == shown.type == "thinking"
    assert (block.thinking, shown.thinking) == ("", "Let me see.")
    assert block.signature == shown.signature != ""


def test_count_tokens() -> None:
    with served() as (client, chat):
        count = client.messages.count_tokens(model="demo", system="Be brief", messages=HELLO, tools=[TOOL])
    assert count.input_tokens == len("system:Be brief\nuser:Hi\n")
    assert chat.asked == []


def test_aliases_are_served_and_other_names_are_not() -> None:
    with served() as (client, _):
        assert client.messages.create(model="claude-anything", max_tokens=5, messages=HELLO).model == "demo"
        with pytest.raises(anthropic.NotFoundError) as caught:
            client.messages.create(model="claude-other", max_tokens=5, messages=HELLO)
        with pytest.raises(anthropic.NotFoundError):
            client.messages.count_tokens(model="claude-other", messages=HELLO)
    assert caught.value.body == {
        "type": "error",
        "error": {
            "type": "not_found_error",
            "message": "model 'claude-other' not found: this server has 'demo'.",
        },
    }


@pytest.mark.parametrize("stream", [False, True])
def test_overload_before_the_answer(stream: bool) -> None:
    with served() as (client, chat):
        chat.engine.overloaded = True
        with pytest.raises(anthropic.RateLimitError) as caught:
            client.messages.create(model="demo", max_tokens=5, messages=HELLO, stream=stream)
    assert caught.value.response.headers["retry-after"] == "2.0"
    assert caught.value.type == "rate_limit_error"


@pytest.mark.parametrize("stream", [False, True])
def test_a_template_that_refuses(stream: bool) -> None:
    with served() as (client, chat):
        chat.refuse = "no system here"
        with pytest.raises(anthropic.BadRequestError, match="no system here"):
            client.messages.create(model="demo", max_tokens=5, messages=HELLO, stream=stream)
        with pytest.raises(anthropic.BadRequestError, match="no system here"):
            client.messages.count_tokens(model="demo", messages=HELLO)


def test_engine_that_dies_in_the_middle() -> None:
    with served() as (client, chat):
        chat.engine.fail_after = 2
        texts = []
        with (
            pytest.raises(anthropic.APIStatusError) as caught,
            client.messages.stream(model="demo", max_tokens=50, messages=HELLO) as stream,
        ):
            for text in stream.text_stream:
                texts.append(text)
        chat.engine.status = "ready"
        with pytest.raises(anthropic.APIStatusError) as whole:
            client.messages.create(model="demo", max_tokens=50, messages=HELLO)
    assert texts == ["Hello", ", "]
    assert caught.value.body == {
        "type": "error",
        "error": {"type": "overloaded_error", "message": "the model is not available at the moment."},
    }
    assert whole.value.status_code == 503


@pytest.mark.parametrize("reason", ["error", "cancelled"])
def test_answers_that_were_not_completed(reason: Any) -> None:
    with served(TextDelta(0, "x"), Finished(0, reason, STATS)) as (client, _):
        with (
            pytest.raises(anthropic.APIStatusError) as caught,
            client.messages.stream(model="demo", max_tokens=50, messages=HELLO) as stream,
        ):
            stream.get_final_message()
        with pytest.raises(anthropic.InternalServerError):
            client.messages.create(model="demo", max_tokens=50, messages=HELLO)
    assert "answer" in caught.value.message


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_cancels(stream: bool) -> None:
    with served() as (client, chat):
        chat.engine.words = ["x"] * 10_000
        chat.engine.delay = 0.02
        if stream:
            with client.messages.stream(model="demo", max_tokens=9_999, messages=HELLO) as answer:
                assert next(iter(answer.text_stream)) == "x"
        else:
            with pytest.raises(anthropic.APITimeoutError):
                client.with_options(timeout=0.3).messages.create(model="demo", max_tokens=9_999, messages=HELLO)
        assert eventually(lambda: chat.engine.cancelled == 1)


def test_a_client_that_leaves_before_the_first_event_cancels() -> None:
    with served() as (client, chat):
        chat.engine.delay = 30.0
        with pytest.raises(anthropic.APITimeoutError):
            client.with_options(timeout=0.3).messages.create(model="demo", max_tokens=9, messages=HELLO, stream=True)
        assert eventually(lambda: chat.engine.cancelled == 1)


def test_silence_is_broken_by_pings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("moesaic.server.anthropic.messages.PING_SECONDS", 0.05)
    monkeypatch.setattr("moesaic.server.anthropic.stream.PING_SECONDS", 0.05)
    with served() as (client, chat):
        chat.wait = 0.4
        body = {"model": "demo", "max_tokens": 9, "messages": HELLO, "stream": True}
        answer = httpx.post(
            f"{str(client.base_url).rstrip('/')}/v1/messages", json=body, headers={"anthropic-version": "2023-06-01"}
        )
    names = [line.removeprefix("event: ") for line in answer.text.splitlines() if line.startswith("event: ")]
    assert answer.headers["content-type"].startswith("text/event-stream")
    assert names[:2] == ["message_start", "ping"]
    before = names.index("content_block_start")
    assert names[2:before] == ["ping"] * (before - 2) and before >= 4
    assert names[before:] == [
        "content_block_start",
        *["content_block_delta"] * 4,
        "content_block_stop",
        "message_delta",
        "message_stop",
    ]
