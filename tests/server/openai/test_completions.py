"""/v1/completions by the official client: what it parsed, and what the engine was asked for."""

from __future__ import annotations

import asyncio
from typing import Any

import openai
import pytest
from tests.server.openai.fakes import Served

from moesaic.engine.serving.params import Grammar

WORDS = ("Hello", ", ", "world", "!")
ASK: dict[str, Any] = {"model": "tiny/moe", "prompt": "Once"}


def ask(served: Served, **fields: Any) -> Any:
    """The client's completion."""
    return asyncio.run(served.client.completions.create(**{**ASK, **fields}))


def stream(served: Served, **fields: Any) -> list[Any]:
    """The client's chunks."""

    async def run() -> list[Any]:
        return [chunk async for chunk in await served.client.completions.create(**{**ASK, **fields}, stream=True)]

    return asyncio.run(run())


def test_a_whole_answer() -> None:
    served = Served()
    answer = ask(served)
    assert answer.object == "text_completion" and answer.id.startswith("cmpl-") and answer.model == "tiny/moe"
    assert [(each.index, each.text, each.finish_reason, each.logprobs) for each in answer.choices] == [
        (0, "Hello, world!", "stop", None)
    ]
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens, answer.usage.total_tokens) == (5, 4, 9)
    assert answer.usage.prompt_tokens_details.cached_tokens == 1 and answer.timings["predicted_ms"] == 200.0
    ids, params = served.engine.asked[0]
    assert ids == [0, *map(ord, "Once")] and params.max_tokens == 16 and params.logprobs is None


def test_pieces_are_the_whole() -> None:
    chunks = stream(Served(), stream_options={"include_usage": True})
    assert [chunk.choices[0].text for chunk in chunks[:-1]] == [*WORDS]
    assert [chunk.choices[0].finish_reason for chunk in chunks[:-1]] == [None, None, None, "stop"]
    assert chunks[-1].choices == [] and chunks[-1].usage.total_tokens == 9
    assert chunks[-2].usage is None and chunks[-2].timings["predicted_n"] == 4
    assert all(chunk.usage is None for chunk in stream(Served()))


@pytest.mark.parametrize(
    ("prompt", "asked"),
    [
        (["ab", "c"], [[0, 97, 98], [0, 99]]),
        ([5, 6, 7], [[5, 6, 7]]),
        ([[5, 6], [7]], [[5, 6], [7]]),
    ],
)
def test_kinds_of_prompts(prompt: Any, asked: list[list[int]]) -> None:
    served = Served()
    answer = ask(served, prompt=prompt, n=2)
    assert sorted(ids for ids, _ in served.engine.asked) == sorted(asked)
    assert [each.index for each in answer.choices] == [*range(2 * len(asked))]
    assert {each.text for each in answer.choices} == {"Hello, world!"}
    assert answer.usage.prompt_tokens == sum(map(len, asked)) and answer.usage.completion_tokens == 8 * len(asked)


def test_several_prompts_in_pieces() -> None:
    told = {index: "" for index in range(4)}
    chunks = stream(Served(), prompt=["ab", "c"], n=2, echo=True)
    for chunk in chunks:
        told[chunk.choices[0].index] += chunk.choices[0].text
    assert told == {0: "abHello, world!", 1: "abHello, world!", 2: "cHello, world!", 3: "cHello, world!"}
    assert [bool(getattr(chunk, "timings", None)) for chunk in chunks] == [False] * (len(chunks) - 1) + [True]


def test_echo() -> None:
    served = Served()
    assert ask(served, echo=True).choices[0].text == "OnceHello, world!"
    answer = ask(served, echo=True, max_tokens=0, prompt=[79, 110])
    assert answer.choices[0].text == "On" and answer.choices[0].finish_reason == "length"
    assert stream(served, echo=True)[0].choices[0].text == "OnceHello"


def test_logprobs() -> None:
    served = Served()
    own = ask(served, logprobs=1).choices[0].logprobs
    assert own.tokens == [*WORDS] and own.token_logprobs == [-0.5] * 4
    assert own.text_offset == [0, 5, 7, 12]
    assert own.top_logprobs == [{"w0": -1.0, word: -0.5} for word in WORDS]
    assert ask(served, logprobs=0).choices[0].logprobs.top_logprobs == [{word: -0.5} for word in WORDS]
    chunks = stream(served, logprobs=0)
    assert [chunk.choices[0].logprobs.text_offset for chunk in chunks] == [[0], [5], [7], [12]]


def test_what_stopped_it_and_the_form_of_the_text() -> None:
    served = Served()
    served.engine.finish = "length"
    ask(served, stop=["a"], extra_body={"guided_regex": "a+", "response_format": {"type": "text"}})
    params = served.engine.asked[0][1]
    assert params.stop == ("a",) and params.grammar == Grammar("regex", "a+")
    assert ask(served, best_of=2, n=2).choices[1].finish_reason == "length"


WRONG: list[tuple[dict[str, Any], str]] = [
    ({"suffix": "end"}, "suffix"),
    ({"prompt_embeds": "AAAA"}, "prompt_embeds"),
    ({"add_special_tokens": False}, "add_special_tokens"),
    ({"best_of": 3}, "best_of"),
    ({"best_of": 1, "n": 2}, "best_of"),
    ({"echo": True, "logprobs": 1}, "echo"),
    ({"mirostat": 1}, "mirostat"),
    ({"prompt": []}, "prompt"),
    ({"prompt": ["a", 5]}, "prompt"),
    ({"prompt": ["a", [5]]}, "prompt"),
    ({"prompt": [-1]}, "prompt[0]"),
    ({"prompt": ["a"] * 65, "n": 2}, "prompt"),
    ({"prompt": None}, "prompt"),
    ({"logprobs": 21}, "logprobs"),
    ({"top_p": 2}, "top_p"),
]


@pytest.mark.parametrize(("fields", "param"), WRONG, ids=[str(fields)[:60] for fields, _ in WRONG])
def test_wrong_fields_are_named(fields: dict[str, Any], param: str) -> None:
    served = Served()
    with pytest.raises(openai.BadRequestError) as error:
        ask(served, extra_body=fields)
    assert error.value.param == param and served.engine.asked == []


def test_errors() -> None:
    with pytest.raises(openai.NotFoundError):
        ask(Served(), model="other")
    served = Served()
    served.engine.overloaded = True
    with pytest.raises(openai.RateLimitError):
        ask(served, prompt=["a", "b"])
    with pytest.raises(openai.RateLimitError):
        stream(served)
    served = Served()
    served.engine.fail_after = 2
    with pytest.raises(openai.APIError) as error:
        stream(served, prompt=["a", "b"])
    assert error.value.code == "engine_unavailable"
    served = Served()
    served.engine.finish = "cancelled"
    with pytest.raises(openai.InternalServerError):
        ask(served)
