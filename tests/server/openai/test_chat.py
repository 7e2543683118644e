"""/v1/chat/completions by the official client: what it parsed, and what the engine was asked for."""

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
    ToolCallDelta,
    ToolChoice,
)

ASK: dict[str, Any] = {"model": "tiny/moe", "messages": [{"role": "user", "content": "Hi"}]}
WEATHER: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "of a town",
        "parameters": {"type": "object", "properties": {"town": {"type": "string"}}},
        "strict": True,
    },
}
EVERYTHING: list[Event] = [
    ReasoningDelta(0, "Let me "),
    ReasoningDelta(0, "see"),
    TextDelta(0, "Looking."),
    *CALLS,
]


def ask(served: Served, **fields: Any) -> Any:
    """The client's completion."""
    return asyncio.run(served.client.chat.completions.create(**{**ASK, **fields}))


def stream(served: Served, **fields: Any) -> list[Any]:
    """The client's chunks."""

    async def run() -> list[Any]:
        chunks = await served.client.chat.completions.create(**{**ASK, **fields}, stream=True)
        return [chunk async for chunk in chunks]

    return asyncio.run(run())


def test_a_whole_answer() -> None:
    answer = ask(Served())
    choice = answer.choices[0]
    assert choice.message.content == "Hello, world!" and choice.message.role == "assistant"
    assert choice.message.refusal is None and choice.message.tool_calls is None and choice.logprobs is None
    assert choice.finish_reason == "stop" and answer.object == "chat.completion" and answer.model == "tiny/moe"
    assert answer.id.startswith("chatcmpl-") and answer.system_fingerprint == "fp_0123456789abcdef"
    assert answer.usage.prompt_tokens == len("<user>Hi") + 1 and answer.usage.completion_tokens == 4
    assert answer.usage.total_tokens == 13
    assert answer.usage.prompt_tokens_details.cached_tokens == 1
    assert answer.usage.completion_tokens_details.reasoning_tokens == 0


def test_timings_beside_the_usage() -> None:
    served = Served()
    served.chat.script = [TextDelta(0, "x"), Finished(0, "length", STATS, None)]
    answer = ask(served)
    assert answer.choices[0].finish_reason == "length"
    assert answer.timings == {
        "queue_ms": 1.0,
        "cache_n": 5,
        "prompt_n": 15,
        "prompt_ms": 300.0,
        "prompt_per_second": 50.0,
        "predicted_n": 11,
        "predicted_ms": 500.0,
        "predicted_per_second": 20.0,
        "expert_hits": 3,
        "expert_lookups": 4,
    }


def test_pieces_are_the_whole() -> None:
    chunks = stream(Served())
    assert [chunk.choices[0].delta.content for chunk in chunks] == ["", "Hello", ", ", "world", "!", None]
    assert chunks[0].choices[0].delta.role == "assistant" and chunks[1].choices[0].delta.role is None
    assert [chunk.choices[0].finish_reason for chunk in chunks] == [None] * 5 + ["stop"]
    assert len({chunk.id for chunk in chunks}) == 1 and chunks[0].object == "chat.completion.chunk"
    assert all(chunk.usage is None for chunk in chunks)
    assert chunks[-1].timings["predicted_n"] == 4 and "timings" not in chunks[-2].model_dump()


def test_usage_in_a_stream() -> None:
    chunks = stream(Served(), stream_options={"include_usage": True})
    assert chunks[-1].choices == [] and chunks[-1].usage.total_tokens == 13
    assert all(chunk.usage is None and "usage" in chunk.model_fields_set for chunk in chunks[:-1])


def test_several_answers() -> None:
    served = Served()
    answer = ask(served, n=3)
    assert [(choice.index, choice.message.content) for choice in answer.choices] == [
        (index, "Hello, world!") for index in range(3)
    ]
    assert answer.usage.prompt_tokens == 9 and answer.usage.completion_tokens == 12
    told = {0: "", 1: ""}
    for chunk in stream(served, n=2):
        for choice in chunk.choices:
            told[choice.index] += choice.delta.content or ""
    assert told == {0: "Hello, world!", 1: "Hello, world!"}


def test_parameters_reach_the_engine() -> None:
    served = Served()
    extra = {"top_k": -1, "min_p": 0.1, "repetition_penalty": 1.2, "min_tokens": 2, "ignore_eos": True}
    extra |= {"stop_token_ids": [5], "skip_special_tokens": False}
    ask(
        served,
        temperature=0.5,
        top_p=0.9,
        presence_penalty=0.25,
        frequency_penalty=-0.5,
        logit_bias={"17": -100},
        seed=11,
        stop=["END", "\n"],
        max_completion_tokens=30,
        max_tokens=7,
        extra_body=extra,
    )
    params = served.engine.asked[0][1]
    assert (params.temperature, params.top_p, params.presence_penalty, params.frequency_penalty) == (
        0.5,
        0.9,
        0.25,
        -0.5,
    )
    assert (params.logit_bias, params.seed, params.stop, params.max_tokens) == ({17: -100.0}, 11, ("END", "\n"), 30)
    assert (params.top_k, params.min_p, params.repetition_penalty, params.min_tokens) == (0, 0.1, 1.2, 2)
    assert (params.ignore_eos, params.stop_token_ids, params.skip_special_tokens) == (True, (5,), False)
    ask(served, stop="one", max_tokens=2)
    params = served.engine.asked[1][1]
    assert params.stop == ("one",) and params.max_tokens == 2
    assert params.temperature is None and params.top_k is None and params.seed is None and params.logprobs is None


def test_logprobs() -> None:
    served = Served()
    answer = ask(served, logprobs=True, top_logprobs=2)
    content = answer.choices[0].logprobs.content
    assert [(each.token, each.logprob) for each in content] == [(word, -0.5) for word in served.engine.words]
    assert content[0].bytes == list(b"Hello")
    assert [(each.token, each.logprob, each.bytes) for each in content[0].top_logprobs] == [
        ("w0", -1.0, list(b"w0")),
        ("w1", -2.0, list(b"w1")),
    ]
    assert ask(served, logprobs=True).choices[0].logprobs.content[0].top_logprobs == []
    chunks = stream(served, logprobs=True)
    assert [
        each.token
        for chunk in chunks
        for choice in chunk.choices
        if choice.logprobs
        for each in choice.logprobs.content
    ] == [*served.engine.words]


def test_logprobs_of_half_a_character_and_of_thoughts() -> None:
    served = Served()
    served.chat.script = [
        ReasoningDelta(0, "hm", (TokenLogprob(1, b"hm", -1.0),)),
        TextDelta(0, "", (TokenLogprob(2, b"\xc3", -2.0),)),
        TextDelta(0, "ü", (TokenLogprob(3, b"\xbc", float("-inf")),)),
        Finished(0, "stop", STATS),
    ]
    chunks = stream(served, logprobs=True)
    found = [choice.logprobs for chunk in chunks for choice in chunk.choices if choice.logprobs]
    assert found[0].content is None and found[0].reasoning_content[0]["token"] == "hm"
    assert (found[1].content[0].token, found[1].content[0].bytes) == ("\ufffd", [0xC3])
    assert found[2].content[0].logprob == -9999.0
    logprobs = ask(served, logprobs=True).choices[0].logprobs
    assert len(logprobs.content) == 2 and len(logprobs.reasoning_content) == 1


def test_thoughts_and_calls() -> None:
    served = Served()
    served.chat.script = EVERYTHING
    answer = ask(served, tools=[WEATHER], reasoning_effort="low", parallel_tool_calls=False)
    message = answer.choices[0].message
    assert message.reasoning_content == "Let me see" and message.content == "Looking."
    assert answer.choices[0].finish_reason == "tool_calls"
    assert [(call.id, call.function.name, call.function.arguments) for call in message.tool_calls] == [
        ("call_a", "weather", '{"town":"Ulm"}'),
        ("call_b", "time", "{}"),
    ]
    assert answer.usage.completion_tokens_details.reasoning_tokens == len("Let me see")
    request = served.chat.asked[0]
    parameters = WEATHER["function"]["parameters"]
    assert request.tools == (Tool("weather", "of a town", parameters, True),) and not request.parallel_tool_calls
    assert request.tool_choice == ToolChoice("auto")
    assert request.template_arguments == {"enable_thinking": True, "thinking": True, "reasoning_effort": "low"}


def test_calls_without_text_have_null_content() -> None:
    served = Served()
    served.chat.script = [ToolCallDelta(0, 0, "{}", "call_a", "weather"), Finished(0, "tool_calls", STATS)]
    assert ask(served, tools=[WEATHER]).choices[0].message.content is None


def test_thoughts_and_calls_in_pieces() -> None:
    served = Served()
    served.chat.script = EVERYTHING
    deltas = [chunk.choices[0].delta for chunk in stream(served, tools=[WEATHER])]
    assert [delta.reasoning_content for delta in deltas if hasattr(delta, "reasoning_content")] == ["Let me ", "see"]
    calls = [call for delta in deltas for call in delta.tool_calls or ()]
    assert [(call.index, call.id, call.type) for call in calls] == [
        (0, "call_a", "function"),
        (0, None, None),
        (0, None, None),
        (1, "call_b", "function"),
    ]
    assert [call.function.name for call in calls] == ["weather", None, None, "time"]
    assert "".join(call.function.arguments for call in calls if call.index == 0) == '{"town":"Ulm"}'


def test_the_clients_own_accumulation() -> None:
    served = Served()
    served.chat.script = EVERYTHING

    async def run() -> Any:
        async with served.client.chat.completions.stream(**ASK, tools=[WEATHER]) as events:
            kinds = [event.type async for event in events]
        return kinds, await events.get_final_completion()

    kinds, final = asyncio.run(run())
    assert kinds.count("tool_calls.function.arguments.done") == 2
    call = final.choices[0].message.tool_calls[0]
    assert call.function.parsed_arguments == {"town": "Ulm"} and final.choices[0].message.content == "Looking."


@pytest.mark.parametrize(
    ("choice", "expected"),
    [
        ("none", ToolChoice("none")),
        ("required", ToolChoice("required")),
        ({"type": "function", "function": {"name": "weather"}}, ToolChoice("named", "weather")),
    ],
)
def test_tool_choice(choice: Any, expected: ToolChoice) -> None:
    served = Served()
    ask(served, tools=[WEATHER], tool_choice=choice)
    assert served.chat.asked[0].tool_choice == expected


def test_history() -> None:
    served = Served()
    call = {"id": "call_a", "type": "function", "function": {"name": "weather", "arguments": "{}"}}
    ask(
        served,
        messages=[
            {"role": "developer", "content": "Be brief."},
            {
                "role": "user",
                "content": [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}],
                "name": "Eva",
            },
            {"role": "assistant", "content": None, "reasoning_content": "hm", "tool_calls": [call]},
            {"role": "tool", "content": "rain", "tool_call_id": "call_a"},
            {"role": "assistant", "refusal": "No."},
            {"role": "user", "content": ""},
        ],
    )
    assert served.chat.asked[0].messages == (
        Message("developer", "Be brief."),
        Message("user", "one\ntwo", name="Eva"),
        Message("assistant", "", "hm", (ToolCall("call_a", "weather", "{}"),)),
        Message("tool", "rain", tool_call_id="call_a", name="weather"),
        Message("assistant", "No."),
        Message("user", ""),
    )


def test_going_on_with_the_last_message() -> None:
    served = Served()
    messages = [*ASK["messages"], {"role": "assistant", "content": "I thi"}]
    ask(served, messages=messages, extra_body={"continue_final_message": True, "add_generation_prompt": False})
    assert served.chat.asked[0].continue_last
    ask(served, messages=messages)
    assert not served.chat.asked[1].continue_last


def test_template_arguments() -> None:
    served = Served()
    ask(served, extra_body={"chat_template_kwargs": {"enable_thinking": True, "style": 3}}, reasoning_effort="none")
    assert served.chat.asked[0].template_arguments == {"enable_thinking": True, "thinking": False, "style": 3}


class Town(pydantic.BaseModel):
    name: str
    people: int


def test_the_parse_helper() -> None:
    served = Served()
    served.chat.script = [TextDelta(0, '{"name":"Ulm","people":129000}'), Finished(0, "stop", STATS)]
    parsed = asyncio.run(served.client.chat.completions.parse(**ASK, response_format=Town))
    assert parsed.choices[0].message.parsed == Town(name="Ulm", people=129000)
    grammar = served.chat.asked[0].params.grammar
    assert grammar is not None and grammar.kind == "json_schema"
    assert '"people":{' in grammar.text and '"additionalProperties":false' in grammar.text


@pytest.mark.parametrize(
    ("fields", "grammar"),
    [
        ({"response_format": {"type": "text"}}, None),
        ({"response_format": {"type": "json_object"}}, Grammar("json_object")),
        (
            {"response_format": {"type": "json_object", "schema": {"type": "array"}}},
            Grammar("json_schema", '{"type":"array"}'),
        ),
        ({"structured_outputs": {"json": {"type": "array"}}}, Grammar("json_schema", '{"type":"array"}')),
        ({"structured_outputs": {"json": '{"type": "array"}'}}, Grammar("json_schema", '{"type": "array"}')),
        ({"structured_outputs": {"json_object": True}}, Grammar("json_object")),
        ({"structured_outputs": {"regex": "a+"}}, Grammar("regex", "a+")),
        ({"structured_outputs": {"choice": ["a.b", "c"]}}, Grammar("regex", r"(?:a\.b)|(?:c)")),
        ({"structured_outputs": {"grammar": 'start: "a"'}}, Grammar("lark", 'start: "a"')),
        ({"guided_json": {"type": "array"}}, Grammar("json_schema", '{"type":"array"}')),
        ({"guided_regex": "a+"}, Grammar("regex", "a+")),
        ({"guided_choice": ["x"]}, Grammar("regex", "(?:x)")),
        ({"guided_grammar": 'start: "a"'}, Grammar("lark", 'start: "a"')),
    ],
)
def test_forms_of_the_text(fields: dict[str, Any], grammar: Grammar | None) -> None:
    served = Served()
    ask(served, extra_body=fields)
    assert served.chat.asked[0].params.grammar == grammar


def test_what_stopped_it() -> None:
    served = Served()
    served.chat.script = [TextDelta(0, "x"), Finished(0, "stop", STATS, "END")]
    assert ask(served, stop="END").choices[0].stop_reason == "END"
    assert stream(served, stop="END")[-1].choices[0].stop_reason == "END"


def test_harmless_fields_are_accepted() -> None:
    answer = ask(
        Served(),
        model="tiny",
        user="someone",
        store=True,
        metadata={"a": "b"},
        service_tier="auto",
        modalities=["text"],
        prediction={"type": "content", "content": "x"},
        prompt_cache_key="k",
        safety_identifier="s",
        verbosity="medium",
        extra_body={"whatever": 1, "mirostat": 0, "typical_p": 1.0, "audio": None, "functions": []},
    )
    assert answer.choices[0].message.content == "Hello, world!" and answer.model == "tiny"
