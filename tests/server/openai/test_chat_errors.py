"""What /v1/chat/completions refuses, and how: status, code and name of the field, as the official client has them."""

from __future__ import annotations

import asyncio
from typing import Any

import openai
import pytest
from tests.server.openai.fakes import Served
from tests.server.openai.test_chat import ASK, EVERYTHING, WEATHER, ask, stream

from moesaic.engine.serving.outputs import RequestStats
from moesaic.errors import RequestError
from moesaic.server.conversation import Finished, TextDelta

NAMED: dict[str, Any] = {"type": "function", "function": {"name": "other"}}
IMAGE: dict[str, Any] = {"type": "image_url", "image_url": {"url": "data:"}}
CALL: dict[str, Any] = {"id": "a", "type": "function", "function": {"name": "f", "arguments": "{}"}}


def user(content: Any) -> list[dict[str, Any]]:
    return [{"role": "user", "content": content}]


UNSUPPORTED: dict[str, Any] = {
    "audio": {"voice": "alloy", "format": "wav"},
    "modalities": ["text", "audio"],
    "web_search_options": {},
    "moderation": {"model": "m"},
    "functions": [{"name": "f"}],
    "function_call": "auto",
    "verbosity": "low",
    "echo": True,
    "add_special_tokens": True,
    "chat_template": "{{ messages }}",
    "documents": [{"text": "x"}],
    "mm_processor_kwargs": {"a": 1},
    "thinking_budget": 5,
    "logits_processors": ["x"],
    "bad_words": ["x"],
    "allowed_token_ids": [1],
    "use_beam_search": True,
    "length_penalty": 2.0,
    "prompt_logprobs": 1,
    "truncate_prompt_tokens": 5,
    "include_stop_str_in_output": True,
    "typical_p": 0.5,
    "tfs_z": 0.5,
    "top_a": 0.5,
    "top_n_sigma": 1.0,
    "mirostat": 2,
    "dynatemp_range": 0.5,
    "xtc_probability": 0.5,
    "dry_multiplier": 0.5,
    "repeat_penalty": 1.1,
    "grammar": "root ::= x",
    "json_schema": {"type": "object"},
    "lora": [{"id": 0}],
}


@pytest.mark.parametrize("name", UNSUPPORTED)
def test_fields_that_would_change_the_answer(name: str) -> None:
    served = Served()
    with pytest.raises(openai.BadRequestError) as error:
        ask(served, extra_body={name: UNSUPPORTED[name]})
    assert error.value.param == name and error.value.code == "unsupported" and name in error.value.message
    assert served.chat.asked == []


WRONG: list[tuple[dict[str, Any], str]] = [
    ({"messages": []}, "messages"),
    ({"messages": [{"role": "function", "content": "x", "name": "f"}]}, "messages[0].role"),
    ({"messages": [{"role": "user"}]}, "messages[0].content"),
    ({"messages": [{"role": "tool", "content": "x"}]}, "messages[0].tool_call_id"),
    ({"messages": [{"role": "user", "content": "x", "tool_calls": [CALL]}]}, "messages[0].tool_calls"),
    ({"messages": [{"role": "assistant", "audio": {"id": "a"}}]}, "messages[0].audio"),
    ({"messages": user([{"type": "text", "text": "a"}, IMAGE])}, "messages[0].content[1]"),
    ({"messages": user([{"type": "input_audio", "input_audio": {}}])}, "messages[0].content[0]"),
    ({"messages": user([{"type": "text"}])}, "messages[0].content[0]"),
    ({"messages": user([{"type": "refusal", "text": "a"}])}, "messages[0].content[0]"),
    ({"temperature": -1}, "temperature"),
    ({"temperature": "warm"}, "temperature"),
    ({"top_p": 1.5}, "top_p"),
    ({"n": 0}, "n"),
    ({"n": True}, "n"),
    ({"max_tokens": -1}, "max_tokens"),
    ({"max_completion_tokens": 1.5}, "max_completion_tokens"),
    ({"seed": 2**64}, "seed"),
    ({"stop": ["a", ""]}, "stop"),
    ({"logit_bias": {"5": 101}}, "logit_bias"),
    ({"logit_bias": {"x": 1}}, "logit_bias"),
    ({"top_logprobs": 21, "logprobs": True}, "top_logprobs"),
    ({"top_logprobs": 2}, "top_logprobs"),
    ({"tools": [{"type": "custom", "custom": {"name": "x"}}]}, "tools[0].type"),
    ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools[0].function.name"),
    ({"tools": [{"type": "function", "function": {"name": "ab\n"}}]}, "tools"),
    ({"tools": [WEATHER, WEATHER]}, "tools"),
    ({"tool_choice": "required"}, "tool_choice"),
    ({"tools": [WEATHER], "tool_choice": NAMED}, "tool_choice"),
    ({"tools": [WEATHER], "tool_choice": {"type": "allowed_tools"}}, "tool_choice.type"),
    ({"response_format": {"type": "json_schema"}}, "response_format.json_schema.schema"),
    ({"response_format": {"type": "xml"}}, "response_format.type"),
    ({"structured_outputs": {"regex": "a", "grammar": "b"}}, "structured_outputs.grammar"),
    ({"guided_choice": []}, "guided_choice"),
    ({"response_format": {"type": "json_object"}, "guided_regex": "a"}, "guided_regex"),
    ({"reasoning_effort": "much"}, "reasoning_effort"),
    ({"continue_final_message": True}, "continue_final_message"),
    ({"add_generation_prompt": False}, "add_generation_prompt"),
]


@pytest.mark.parametrize(("fields", "param"), WRONG, ids=[str(fields)[:60] for fields, _ in WRONG])
def test_wrong_fields_are_named(fields: dict[str, Any], param: str) -> None:
    served = Served()
    with pytest.raises(openai.BadRequestError) as error:
        ask(served, extra_body=fields)
    assert error.value.param == param and error.value.type == "invalid_request_error"
    assert served.chat.asked == []


def test_what_this_model_cannot_do() -> None:
    served = Served()
    served.chat.has_tools = served.chat.has_reasoning = False
    with pytest.raises(openai.BadRequestError, match="knows no tools"):
        ask(served, tools=[WEATHER])
    with pytest.raises(openai.BadRequestError, match="does not think"):
        ask(served, reasoning_effort="high")
    ask(served, tools=[WEATHER], tool_choice="none", reasoning_effort="none")


def test_another_model() -> None:
    with pytest.raises(openai.NotFoundError) as error:
        ask(Served(), model="gpt-4o")
    assert error.value.code == "model_not_found" and "tiny/moe" in error.value.message


@pytest.mark.parametrize("streamed", [False, True])
def test_errors_before_the_first_piece_are_errors_of_http(streamed: bool) -> None:
    call = stream if streamed else ask
    served = Served()
    served.engine.overloaded = True
    with pytest.raises(openai.RateLimitError) as busy:
        call(served)
    assert busy.value.code == "overloaded"
    served = Served()
    served.engine.context_length = 5
    with pytest.raises(openai.BadRequestError) as long:
        call(served)
    assert long.value.param == "messages"
    served = Served()
    served.engine.status = "dead"
    with pytest.raises(openai.InternalServerError) as dead:
        call(served)
    assert dead.value.status_code == 503 and dead.value.code == "engine_unavailable"


def test_an_error_in_mid_stream_is_an_event() -> None:
    served = Served()
    served.engine.fail_after = 2
    told = []

    async def run() -> None:
        async for chunk in await served.client.chat.completions.create(**ASK, stream=True):
            told.append(chunk.choices[0].delta.content)

    with pytest.raises(openai.APIError) as error:
        asyncio.run(run())
    assert told == ["", "Hello", ", "] and error.value.code == "engine_unavailable"
    assert error.value.message == "the model is not available at the moment."
    with pytest.raises(openai.InternalServerError):
        ask(served)


def test_an_unknown_error_in_mid_stream_is_a_number(caplog: pytest.LogCaptureFixture) -> None:
    served = Served()
    served.chat.script = [TextDelta(0, "x"), TextDelta(5, "secret"), None]  # type: ignore[list-item]
    with pytest.raises(openai.APIError) as error:
        stream(served)
    number = error.value.message.rstrip(".").split()[-1]
    assert "secret" not in error.value.message and number in caplog.text


@pytest.mark.parametrize(("reason", "status"), [("error", 500), ("cancelled", 503)])
def test_answers_that_were_given_up(reason: Any, status: int) -> None:
    served = Served()
    served.chat.script = [TextDelta(0, "x"), Finished(0, reason, RequestStats())]
    with pytest.raises(openai.APIStatusError) as error:
        ask(served)
    assert error.value.status_code == status
    with pytest.raises(openai.APIError, match=error.value.body["message"]):  # type: ignore[index]
        stream(served)
    served.chat.script = [TextDelta(0, "x")]
    with pytest.raises(openai.InternalServerError):
        ask(served)
    with pytest.raises(openai.APIError, match="could not be completed"):
        stream(served)


@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize(
    ("param", "named"),
    [("template_arguments", "chat_template_kwargs"), ("grammar", "response_format"), ("tools", "tools"), (None, None)],
)
def test_what_the_chat_refuses_has_the_apis_names(
    streamed: bool, param: str | None, named: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    served = Served()

    def refuse(request: Any) -> list[int]:
        raise RequestError("no.", param)

    monkeypatch.setattr(served.chat, "encode_chat", refuse)
    with pytest.raises(openai.BadRequestError) as error:
        (stream if streamed else ask)(served)
    assert error.value.param == named and error.value.body["message"] == "no."  # type: ignore[index]


def test_thoughts_that_are_no_text_are_counted_by_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    served = Served()
    served.chat.script = EVERYTHING

    def refuse(text: str, add_special_tokens: bool = True) -> list[int]:
        raise RequestError("no text.", "prompt")

    monkeypatch.setattr(served.chat, "encode", refuse)
    assert ask(served, tools=[WEATHER]).usage.completion_tokens_details.reasoning_tokens == 2
