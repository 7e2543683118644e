"""/v1/responses by the official client: what it parsed, and the conversation that the chat was asked for."""

from __future__ import annotations

import asyncio
from typing import Any

import pydantic
import pytest
from tests.server.openai.fakes import CALLS, STATS, Served

from moesaic.engine.serving.outputs import TokenLogprob
from moesaic.engine.serving.params import Grammar
from moesaic.server.conversation import (
    Event,
    Finished,
    Message,
    ReasoningDelta,
    TextDelta,
    Tool,
    ToolCall,
    ToolChoice,
)

ASK: dict[str, Any] = {"model": "tiny/moe", "input": "Hi"}
WEATHER: dict[str, Any] = {
    "type": "function",
    "name": "weather",
    "description": "of a town",
    "parameters": {"type": "object", "properties": {"town": {"type": "string"}}},
    "strict": True,
}
EVERYTHING: list[Event] = [
    ReasoningDelta(0, "Let me "),
    ReasoningDelta(0, "see"),
    TextDelta(0, "Look"),
    TextDelta(0, ""),
    TextDelta(0, "ing."),
    *CALLS,
]


def ask(served: Served, **fields: Any) -> Any:
    """The client's response."""
    return asyncio.run(served.client.responses.create(**{**ASK, **fields}))


def stream(served: Served, **fields: Any) -> list[Any]:
    """The client's events."""

    async def run() -> list[Any]:
        return [event async for event in await served.client.responses.create(**{**ASK, **fields}, stream=True)]

    return asyncio.run(run())


def test_a_whole_response() -> None:
    served = Served()
    response = ask(served, instructions="Be brief.", metadata={"a": "b"}, user="someone", store=True, temperature=0.5)
    assert response.output_text == "Hello, world!" and response.status == "completed"
    assert [item.type for item in response.output] == ["message"] and response.output[0].status == "completed"
    assert response.id.startswith("resp_") and response.output[0].id.startswith("msg_")
    assert response.object == "response" and response.error is None and response.incomplete_details is None
    assert response.store is False and response.metadata == {"a": "b"} and response.user == "someone"
    assert response.instructions == "Be brief." and response.temperature == 0.5 and response.text.format.type == "text"
    assert response.previous_response_id is None and response.completed_at >= response.created_at
    usage = response.usage
    prompt = len("<system>Be brief.<user>Hi") + 1
    assert (usage.input_tokens, usage.output_tokens, usage.total_tokens) == (prompt, 4, prompt + 4)
    assert usage.input_tokens_details.cached_tokens == 1 and usage.output_tokens_details.reasoning_tokens == 0
    assert response.timings["predicted_ms"] == 200.0
    request = served.chat.asked[0]
    assert request.messages == (Message("system", "Be brief."), Message("user", "Hi"))
    assert request.params.temperature == 0.5 and request.params.n == 1 and request.params.logprobs is None


def test_thoughts_text_and_calls() -> None:
    served = Served()
    served.chat.script = EVERYTHING
    response = ask(served, tools=[WEATHER], reasoning={"effort": "high", "summary": "auto"}, parallel_tool_calls=False)
    thoughts, message, first, second = response.output
    assert thoughts.type == "reasoning" and thoughts.content[0].text == "Let me see" and thoughts.summary == []
    assert message.content[0].text == "Looking." and message.role == "assistant"
    assert (first.type, first.call_id, first.name, first.arguments) == (
        "function_call",
        "call_a",
        "weather",
        '{"town":"Ulm"}',
    )
    assert (second.call_id, second.name, second.arguments) == ("call_b", "time", "{}")
    assert len({item.id for item in response.output}) == 4
    assert {item.status for item in response.output} == {"completed"} and response.status == "completed"
    assert response.usage.output_tokens_details.reasoning_tokens == len("Let me see")
    assert response.tools[0].name == "weather" and response.tools[0].strict and response.tool_choice == "auto"
    assert response.reasoning.effort == "high" and not response.parallel_tool_calls
    request = served.chat.asked[0]
    assert request.tools == (Tool("weather", "of a town", WEATHER["parameters"], True),)
    assert request.template_arguments["reasoning_effort"] == "high" and not request.parallel_tool_calls


def test_the_sequence_of_events() -> None:
    served = Served()
    served.chat.script = EVERYTHING
    events = stream(served, tools=[WEATHER])
    assert [event.type.removeprefix("response.") for event in events] == [
        "created",
        "in_progress",
        "output_item.added",
        "content_part.added",
        "reasoning_text.delta",
        "reasoning_text.delta",
        "reasoning_text.done",
        "content_part.done",
        "output_item.done",
        "output_item.added",
        "content_part.added",
        "output_text.delta",
        "output_text.delta",
        "output_text.done",
        "content_part.done",
        "output_item.done",
        "output_item.added",
        "function_call_arguments.delta",
        "function_call_arguments.delta",
        "function_call_arguments.done",
        "output_item.done",
        "output_item.added",
        "function_call_arguments.delta",
        "function_call_arguments.done",
        "output_item.done",
        "completed",
    ]
    assert [event.sequence_number for event in events] == [*range(len(events))]
    assert all(type(event).__name__.startswith("Response") for event in events)
    added = [event for event in events if event.type == "response.output_item.added"]
    assert [event.output_index for event in added] == [0, 1, 2, 3]
    assert [event.item.status for event in added] == ["in_progress"] * 4
    assert added[0].item.content == [] and added[2].item.arguments == ""
    final = events[-1].response
    assert [item.id for item in final.output] == [event.item.id for event in added]
    assert events[0].response.status == "in_progress" and events[0].response.output == []
    assert events[0].response.id == final.id and final.usage.total_tokens == 31
    for event in events:
        if hasattr(event, "item_id"):
            assert event.item_id == final.output[event.output_index].id


def test_the_clients_own_accumulation() -> None:
    served = Served()
    served.chat.script = EVERYTHING

    async def run() -> Any:
        async with served.client.responses.stream(**ASK, tools=[WEATHER]) as events:
            snapshots = [event.snapshot async for event in events if event.type == "response.output_text.delta"]
            return snapshots, await events.get_final_response()

    snapshots, final = asyncio.run(run())
    assert snapshots == ["Look", "Looking."] and final.output_text == "Looking."
    assert final.output[2].parsed_arguments == {"town": "Ulm"} and final.output[0].content[0].text == "Let me see"


def test_a_response_that_is_cut_off() -> None:
    served = Served()
    response = ask(served, max_output_tokens=2)
    assert response.status == "incomplete" and response.incomplete_details.reason == "max_output_tokens"
    assert response.output_text == "Hello, " and response.output[0].status == "incomplete"
    assert response.max_output_tokens == 2 and response.completed_at is None
    last = stream(served, max_output_tokens=2)[-1]
    assert last.type == "response.incomplete" and last.response.output_text == "Hello, "


def test_nothing_said_is_an_empty_message() -> None:
    served = Served()
    served.chat.script = [Finished(0, "stop", STATS)]
    response = ask(served)
    assert response.output_text == "" and [item.type for item in response.output] == ["message"]


def test_logprobs() -> None:
    served = Served()
    response = ask(served, top_logprobs=1, include=["message.output_text.logprobs"])
    logprobs = response.output[0].content[0].logprobs
    assert [each.token for each in logprobs] == [*served.engine.words]
    assert (logprobs[0].logprob, logprobs[0].bytes) == (-0.5, list(b"Hello"))
    assert logprobs[0].top_logprobs[0].token == "w0" and response.top_logprobs == 1
    ask(served, include=["message.output_text.logprobs"])
    ask(served, include=["reasoning.encrypted_content"])
    assert [request.params.logprobs for request in served.chat.asked] == [1, 0, None]
    served.chat.script = [TextDelta(0, "a", (TokenLogprob(1, b"a", -1.5),)), Finished(0, "stop", STATS)]
    deltas = [event for event in stream(served, top_logprobs=1) if event.type == "response.output_text.delta"]
    assert deltas[0].logprobs[0].token == "a" and deltas[0].logprobs[0].logprob == -1.5


def test_a_conversation_of_items() -> None:
    served = Served()
    thought = {"type": "reasoning", "id": "rs_1", "summary": []}
    thought["content"] = [{"type": "reasoning_text", "text": "hm"}]
    ask(
        served,
        input=[
            {"role": "developer", "content": "Be brief."},
            {"role": "user", "content": [{"type": "input_text", "text": "one"}, {"type": "input_text", "text": "two"}]},
            thought,
            {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "Looking."}]},
            {"type": "function_call", "call_id": "a", "name": "weather", "arguments": "{}"},
            {"type": "function_call", "call_id": "b", "name": "time", "arguments": "[]", "id": "fc_1"},
            {"type": "function_call_output", "call_id": "a", "output": "rain"},
            {"type": "function_call_output", "call_id": "b", "output": [{"type": "input_text", "text": "noon"}]},
            {"type": "reasoning", "id": "rs_2", "summary": [{"type": "summary_text", "text": "short"}]},
            {"type": "message", "role": "assistant", "content": "Rain."},
            {"type": "message", "role": "assistant", "content": [{"type": "refusal", "refusal": "No."}]},
            {"type": "message", "role": "user", "content": "So?"},
        ],
    )
    assert served.chat.asked[0].messages == (
        Message("developer", "Be brief."),
        Message("user", "one\ntwo"),
        Message("assistant", "Looking.", "hm", (ToolCall("a", "weather", "{}"), ToolCall("b", "time", "[]"))),
        Message("tool", "rain", tool_call_id="a", name="weather"),
        Message("tool", "noon", tool_call_id="b", name="time"),
        Message("assistant", "Rain.", "short"),
        Message("assistant", "No."),
        Message("user", "So?"),
    )


def test_its_own_output_can_be_sent_back() -> None:
    served = Served()
    served.chat.script = EVERYTHING
    output = ask(served, tools=[WEATHER]).output
    result = {"type": "function_call_output", "call_id": "call_a", "output": "rain"}
    ask(served, input=[*output, result])
    calls = (ToolCall("call_a", "weather", '{"town":"Ulm"}'), ToolCall("call_b", "time", "{}"))
    assert served.chat.asked[1].messages == (
        Message("assistant", "Looking.", "Let me see", calls),
        Message("tool", "rain", tool_call_id="call_a", name="weather"),
    )


@pytest.mark.parametrize(
    ("choice", "expected"),
    [("required", ToolChoice("required")), ({"type": "function", "name": "weather"}, ToolChoice("named", "weather"))],
)
def test_tool_choice(choice: Any, expected: ToolChoice) -> None:
    served = Served()
    response = ask(served, tools=[WEATHER], tool_choice=choice)
    assert served.chat.asked[0].tool_choice == expected
    assert response.tool_choice == choice or response.tool_choice.name == "weather"


class Town(pydantic.BaseModel):
    name: str
    people: int


def test_the_parse_helper() -> None:
    served = Served()
    served.chat.script = [TextDelta(0, '{"name":"Ulm","people":129000}'), Finished(0, "stop", STATS)]
    response = asyncio.run(served.client.responses.parse(**ASK, text_format=Town))
    assert response.output_parsed == Town(name="Ulm", people=129000)
    grammar = served.chat.asked[0].params.grammar
    assert grammar is not None and grammar.kind == "json_schema" and '"people":{' in grammar.text
    assert response.text.format.name == "Town"


@pytest.mark.parametrize(
    ("fields", "grammar"),
    [
        ({"text": {"format": {"type": "text"}}}, None),
        ({"text": {"format": {"type": "json_object"}, "verbosity": "medium"}}, Grammar("json_object")),
        ({"guided_regex": "a+"}, Grammar("regex", "a+")),
    ],
)
def test_forms_of_the_text(fields: dict[str, Any], grammar: Grammar | None) -> None:
    served = Served()
    ask(served, extra_body=fields)
    assert served.chat.asked[0].params.grammar == grammar


def test_vendor_parameters_and_harmless_fields() -> None:
    served = Served()
    extra = {"top_k": 3, "seed": 4, "stop": ["x"], "chat_template_kwargs": {"a": 1}, "whatever": [], "n": 1}
    ask(served, extra_body=extra, truncation="disabled", background=False, max_tool_calls=3, service_tier="auto")
    request = served.chat.asked[0]
    assert (request.params.top_k, request.params.seed, request.params.stop) == (3, 4, ("x",))
    assert request.template_arguments == {"a": 1}
