"""What /v1/responses refuses, and how a response fails on its way."""

from __future__ import annotations

import asyncio
from typing import Any

import openai
import pytest
from tests.server.openai.fakes import Served
from tests.server.openai.test_responses import ASK, WEATHER, ask, stream

from moesaic.engine.serving.outputs import RequestStats
from moesaic.server import sse
from moesaic.server.conversation import Finished, TextDelta

IMAGE: dict[str, Any] = {"type": "input_image", "image_url": "data:"}
SEARCH: dict[str, Any] = {"type": "web_search"}
WRONG: list[tuple[dict[str, Any], str]] = [
    ({"previous_response_id": "resp_1"}, "previous_response_id"),
    ({"conversation": "conv_1"}, "conversation"),
    ({"background": True}, "background"),
    ({"prompt": {"id": "p"}}, "prompt"),
    ({"moderation": {"model": "m"}}, "moderation"),
    ({"context_management": [{"type": "compaction"}]}, "context_management"),
    ({"truncation": "auto"}, "truncation"),
    ({"n": 2}, "n"),
    ({"max_tokens": 5}, "max_tokens"),
    ({"response_format": {"type": "json_object"}}, "response_format"),
    ({"mirostat": 2}, "mirostat"),
    ({"text": {"verbosity": "low"}}, "text.verbosity"),
    ({"reasoning": {"mode": "pro"}}, "reasoning.mode"),
    ({"reasoning": {"context": "all_turns"}}, "reasoning.context"),
    ({"reasoning": {"effort": "much"}}, "reasoning.effort"),
    ({"text": {"format": {"type": "json_schema", "name": "x"}}}, "text.format.schema"),
    ({"text": {"format": {"type": "json_object"}}, "guided_regex": "a"}, "guided_regex"),
    ({"tools": [SEARCH]}, "tools[0].type"),
    ({"tools": [WEATHER, WEATHER]}, "tools"),
    ({"tool_choice": "required"}, "tool_choice"),
    ({"tools": [WEATHER], "tool_choice": {"type": "function", "name": "other"}}, "tool_choice"),
    ({"tools": [WEATHER], "tool_choice": {"type": "web_search"}}, "tool_choice.type"),
    ({"max_output_tokens": -1}, "max_output_tokens"),
    ({"top_logprobs": 21}, "top_logprobs"),
    ({"temperature": -1}, "temperature"),
    ({"input": []}, "input"),
    ({"input": None}, "input"),
    ({"input": [{"content": "x"}]}, "input[0].role"),
    ({"input": [{"role": "user"}]}, "input[0].content"),
    ({"input": [{"role": "assistant"}]}, "input[0].content"),
    ({"input": [{"role": "tool", "content": "x"}]}, "input[0].role"),
    ({"input": [{"role": "user", "content": [IMAGE]}]}, "input[0].content[0]"),
    ({"input": [{"type": "item_reference", "id": "msg_1"}]}, "input[0]"),
    ({"input": [{"type": "web_search_call", "id": "w"}]}, "input[0].type"),
    ({"input": [{"type": "function_call", "name": "f", "arguments": "{}"}]}, "input[0].call_id"),
    ({"input": [{"type": "function_call", "call_id": "a", "arguments": "{}"}]}, "input[0].name"),
    ({"input": [{"type": "function_call", "call_id": "a", "name": "f"}]}, "input[0].arguments"),
    ({"input": [{"type": "function_call_output", "output": "x"}]}, "input[0].call_id"),
    ({"input": [{"type": "function_call_output", "call_id": "a"}]}, "input[0].output"),
]


@pytest.mark.parametrize(("fields", "param"), WRONG, ids=[str(fields)[:60] for fields, _ in WRONG])
def test_wrong_fields_are_named(fields: dict[str, Any], param: str) -> None:
    served = Served()
    with pytest.raises(openai.BadRequestError) as error:
        ask(served, extra_body=fields)
    assert error.value.param == param and served.chat.asked == []


def test_state_is_refused_with_what_to_do_instead() -> None:
    with pytest.raises(openai.BadRequestError, match="send the conversation as input"):
        ask(Served(), previous_response_id="resp_1")


def test_errors_before_the_first_event_are_errors_of_http() -> None:
    with pytest.raises(openai.NotFoundError):
        ask(Served(), model="other")
    served = Served()
    served.engine.overloaded = True
    for call in (ask, stream):
        with pytest.raises(openai.RateLimitError):
            call(served)
    served = Served()
    served.chat.has_reasoning = False
    with pytest.raises(openai.BadRequestError) as error:
        ask(served, reasoning={"effort": "low"})
    assert error.value.param == "reasoning.effort"


def test_a_response_that_fails_on_its_way() -> None:
    served = Served()
    served.engine.fail_after = 2
    events = stream(served)
    kinds = [event.type.removeprefix("response.") for event in events]
    assert kinds[-4:] == ["output_text.done", "content_part.done", "output_item.done", "failed"]
    failed = events[-1].response
    assert failed.status == "failed" and failed.error.code == "server_error"
    assert failed.error.message == "the model is not available at the moment."
    assert failed.output_text == "Hello, " and failed.output[0].status == "incomplete"
    assert [event.sequence_number for event in events] == [*range(len(events))]
    served = Served()
    served.engine.fail_after = 2
    with pytest.raises(openai.InternalServerError):
        ask(served)


def test_a_response_that_fails_late_but_before_its_first_event(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sse, "GRACE", 0.01)
    served = Served()
    served.engine.delay, served.engine.fail_after = 0.1, 0
    assert [event.type for event in stream(served)] == ["response.created", "response.in_progress", "response.failed"]


@pytest.mark.parametrize("reason", ["error", "cancelled"])
def test_responses_that_were_given_up(reason: Any) -> None:
    served = Served()
    served.chat.script = [TextDelta(0, "x"), Finished(0, reason, RequestStats())]
    assert stream(served)[-1].type == "response.failed"
    with pytest.raises(openai.InternalServerError):
        ask(served)
    served.chat.script = [TextDelta(0, "x")]
    assert stream(served)[-1].type == "response.failed"
    with pytest.raises(openai.InternalServerError):
        ask(served)


def test_the_clients_stream_sees_the_failure() -> None:
    served = Served()
    served.engine.fail_after = 1

    async def run() -> list[str]:
        async with served.client.responses.stream(**ASK) as events:
            return [event.type async for event in events]

    assert asyncio.run(run())[-1] == "response.failed"
