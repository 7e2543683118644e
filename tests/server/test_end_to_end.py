"""The official clients against `moesaic serve demo`: every API, whole answers and streams, many at a time.

The demo model adds numbers, so each answer shows whose question it is.
"""

from __future__ import annotations

import asyncio
import json
import random
import re
import signal
import time
from collections.abc import Iterator
from typing import Any

import anthropic
import httpx
import ollama
import openai
import pytest
from tests.server.served import Served, served

KEY = "a-key-for-the-tests"
QUESTION: Any = [{"role": "user", "content": "What is 12 + 30?"}]
GREEDY: Any = {"temperature": 0}
ANSWER = "12 + 30 = 42"


@pytest.fixture(scope="module")
def server() -> Iterator[Served]:
    with served("demo", "--alias", "gpt-alias", MOESAIC_API_KEY=KEY) as running:
        running.wait_ready()
        yield running


@pytest.fixture
def gpt(server: Served) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key=KEY, max_retries=0, timeout=60) as client:
        yield client


@pytest.fixture
def claude(server: Served) -> Iterator[anthropic.Anthropic]:
    with anthropic.Anthropic(base_url=server.url, api_key=KEY, max_retries=0, timeout=60) as client:
        yield client


@pytest.fixture
def llama(server: Served) -> ollama.Client:
    return ollama.Client(server.url, headers={"authorization": f"Bearer {KEY}"}, timeout=60)


@pytest.fixture
def http(server: Served) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=server.url, headers={"x-api-key": KEY}, timeout=60) as client:
        yield client


def test_it_listened_while_it_loaded(server: Served) -> None:
    assert server.statuses[0] == "loading" and server.statuses[-1] == "ok"
    log = "".join(server.log)
    assert "Keys: from MOESAIC_API_KEY" in log and KEY not in log
    assert f"curl {server.url}/v1/chat/completions" in log


def test_openai_models(gpt: openai.OpenAI) -> None:
    assert [model.id for model in gpt.models.list()] == ["demo", "gpt-alias"]
    assert gpt.models.retrieve("gpt-alias").id == "gpt-alias"


def test_openai_chat(gpt: openai.OpenAI) -> None:
    answer = gpt.chat.completions.create(model="demo", messages=QUESTION, temperature=0)
    assert answer.choices[0].message.content == ANSWER
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage is not None and answer.usage.completion_tokens == 11
    assert answer._request_id is not None and answer._request_id.startswith("req_")


def test_openai_chat_streamed(gpt: openai.OpenAI) -> None:
    stream = gpt.chat.completions.create(
        model="gpt-alias", messages=QUESTION, temperature=0, stream=True, stream_options={"include_usage": True}
    )
    chunks = list(stream)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == ANSWER
    assert sum(bool(chunk.choices and chunk.choices[0].delta.content) for chunk in chunks) > 5
    assert chunks[-1].usage is not None and chunks[-1].usage.completion_tokens == 11


def test_openai_several_answers_logprobs_and_seeds(gpt: openai.OpenAI) -> None:
    def ask(n: int, seed: int) -> Any:
        return gpt.chat.completions.create(
            model="demo",
            messages=[{"role": "user", "content": "Tell me a story"}],
            n=n,
            seed=seed,
            temperature=3.0,
            logprobs=True,
            top_logprobs=3,
            max_tokens=12,
        )

    answer = ask(3, 7)
    texts = [choice.message.content for choice in answer.choices]
    assert len(set(texts)) == 3
    assert [choice.message.content for choice in ask(3, 7).choices] == texts
    assert ask(1, 8).choices[0].message.content == texts[1]  # answer i is that of seed + i
    for choice in answer.choices:
        told = b"".join(bytes(token.bytes) for token in choice.logprobs.content)
        assert told.decode("utf-8", "replace").startswith(choice.message.content.rstrip("�"))
        assert all(len(token.top_logprobs) == 3 for token in choice.logprobs.content)


def test_openai_completions(gpt: openai.OpenAI, http: httpx.Client) -> None:
    answer = gpt.completions.create(model="demo", prompt="12 + 30 =", max_tokens=4, temperature=0)
    streamed = gpt.completions.create(model="demo", prompt="12 + 30 =", max_tokens=4, temperature=0, stream=True)
    assert "".join(chunk.choices[0].text for chunk in streamed if chunk.choices) == answer.choices[0].text
    ids = http.post("/tokenize", json={"prompt": "12 + 30 ="}).json()["tokens"]
    by_tokens = gpt.completions.create(model="demo", prompt=ids, max_tokens=4, temperature=0)
    assert by_tokens.choices[0].text == answer.choices[0].text


def test_openai_responses(gpt: openai.OpenAI) -> None:
    answer = gpt.responses.create(model="demo", input="What is 12 + 30?", temperature=0)
    assert (answer.output_text, answer.status) == (ANSWER, "completed")
    events = list(gpt.responses.create(model="demo", input="What is 12 + 30?", temperature=0, stream=True))
    assert "".join(each.delta for each in events if each.type == "response.output_text.delta") == ANSWER
    assert events[-1].type == "response.completed" and events[-1].response.output_text == ANSWER


def test_openai_errors(gpt: openai.OpenAI, server: Served) -> None:
    with pytest.raises(openai.NotFoundError, match="this server has 'demo'"):
        gpt.chat.completions.create(model="gpt-4o", messages=QUESTION)
    with pytest.raises(openai.BadRequestError, match="at most 16"):
        gpt.chat.completions.create(model="demo", messages=QUESTION, n=17)
    with pytest.raises(openai.BadRequestError, match="maximum context length is 8192 tokens") as refused:
        gpt.chat.completions.create(model="demo", messages=[{"role": "user", "content": "many words " * 10_000}])
    assert (refused.value.code, refused.value.param) == ("context_length_exceeded", "messages")  # agents look for it
    began = time.perf_counter()
    with pytest.raises(openai.BadRequestError, match="it has more than 16384 tokens"):
        gpt.chat.completions.create(model="demo", messages=[{"role": "user", "content": "x" * (15 << 20)}])
    with pytest.raises(openai.BadRequestError, match="it has more than 16384 tokens"):
        gpt.completions.create(model="demo", prompt="x" * (15 << 20))
    assert time.perf_counter() - began < 20  # encoding all of it takes a minute each
    stranger = openai.OpenAI(base_url=f"{server.url}/v1", api_key="wrong-key", max_retries=0)
    with pytest.raises(openai.AuthenticationError):
        stranger.models.list()


def test_answers_of_a_given_form(gpt: openai.OpenAI, llama: ollama.Client, http: httpx.Client) -> None:
    number: Any = {"type": "integer", "minimum": 100, "maximum": 999}  # an object would leave room for endless spaces
    by_schema: Any = {"type": "json_schema", "json_schema": {"name": "number", "schema": number}}
    answer = gpt.chat.completions.create(model="demo", messages=QUESTION, response_format=by_schema, max_tokens=20)
    texts = [answer.choices[0].message.content, llama.chat("demo", QUESTION, format=number).message.content]
    assert all(100 <= int(text or "") <= 999 for text in texts)
    colours: Any = {"structured_outputs": {"regex": "(red|green) [a-f]{3}"}}
    answer = gpt.chat.completions.create(model="demo", messages=QUESTION, extra_body=colours, max_tokens=20)
    assert re.fullmatch("(red|green) [a-f]{3}", answer.choices[0].message.content or "")
    by_schema["json_schema"]["schema"] = {"type": "no type"}
    refused = http.post(
        "/v1/chat/completions", json={"model": "demo", "messages": QUESTION, "response_format": by_schema}
    )
    assert refused.status_code == 400


def test_anthropic_messages(claude: anthropic.Anthropic) -> None:
    answer = claude.messages.create(model="demo", max_tokens=50, extra_body=GREEDY, messages=QUESTION)
    assert answer.content[0].to_dict()["text"] == ANSWER
    assert (answer.stop_reason, answer.usage.output_tokens) == ("end_turn", 11)
    assert answer._request_id is not None and answer._request_id.startswith("req_")
    with claude.messages.stream(model="demo", max_tokens=50, extra_body=GREEDY, messages=QUESTION) as stream:
        assert "".join(stream.text_stream) == ANSWER
    counted = claude.messages.count_tokens(model="demo", messages=QUESTION).input_tokens
    assert counted == answer.usage.input_tokens + (answer.usage.cache_read_input_tokens or 0)


def test_anthropic_stop_sequence(claude: anthropic.Anthropic) -> None:
    answer = claude.messages.create(
        model="demo", max_tokens=50, extra_body=GREEDY, messages=QUESTION, stop_sequences=[" ="]
    )
    assert answer.content[0].to_dict()["text"] == "12 + 30"
    assert (answer.stop_reason, answer.stop_sequence) == ("stop_sequence", " =")


def test_anthropic_errors(claude: anthropic.Anthropic, server: Served) -> None:
    with pytest.raises(anthropic.NotFoundError):
        claude.messages.create(model="claude-none", max_tokens=5, messages=QUESTION)
    stranger = anthropic.Anthropic(base_url=server.url, api_key="wrong-key", max_retries=0)
    with stranger, pytest.raises(anthropic.AuthenticationError):
        stranger.messages.create(model="demo", max_tokens=5, messages=QUESTION)


def test_ollama(llama: ollama.Client) -> None:
    assert llama.chat("demo", QUESTION, options=GREEDY).message.content == ANSWER
    pieces = [each.message.content for each in llama.chat("demo", QUESTION, options=GREEDY, stream=True)]
    assert "".join(piece or "" for piece in pieces) == ANSWER and len(pieces) > 5
    assert llama.generate("demo", "What is 12 + 30?", options=GREEDY).response == ANSWER
    streamed = llama.generate("demo", "What is 12 + 30?", options=GREEDY, stream=True)
    assert "".join(each.response for each in streamed) == ANSWER
    assert "demo" in {str(model.model).split(":")[0] for model in llama.list().models}
    details = llama.show("demo").details
    assert details is not None
    assert (details.family, details.format) == ("deepseek_v3", "gguf")
    with pytest.raises(ollama.ResponseError, match="not found"):
        llama.chat("llama3", QUESTION)


def test_tokens_there_and_back(http: httpx.Client) -> None:
    text = "Größe: 12 <|user|> + 30"
    tokens = http.post("/tokenize", json={"prompt": text, "add_special_tokens": False}).json()["tokens"]
    assert http.post("/detokenize", json={"tokens": tokens}).json()["prompt"] == text


def test_metrics_and_description(http: httpx.Client) -> None:
    before = http.get("/metrics").text
    http.post("/v1/messages", json={"model": "demo", "max_tokens": 5, "messages": QUESTION}).raise_for_status()
    after = http.get("/metrics").text
    line = 'moesaic_requests_total{method="POST",route="/v1/messages",status="200"}'

    def value(text: str) -> float:
        return next((float(each.rpartition(" ")[2]) for each in text.splitlines() if each.startswith(line)), 0.0)

    assert value(after) == value(before) + 1
    assert "moesaic_engine_ready 1.0" in after
    assert http.get("/openapi.json").json()["openapi"] == "3.1.0"


def test_many_at_a_time_get_their_own_answers(server: Served) -> None:
    rng = random.Random(3)
    pairs = [(rng.randrange(10, 90), rng.randrange(10, 90)) for _ in range(64)]

    async def ask(client: openai.AsyncOpenAI, pair: tuple[int, int]) -> str:
        question: Any = [{"role": "user", "content": f"What is {pair[0]} + {pair[1]}?"}]
        stream = await client.chat.completions.create(model="demo", messages=question, temperature=0, stream=True)
        return "".join([chunk.choices[0].delta.content or "" async for chunk in stream if chunk.choices])

    async def ask_all() -> tuple[list[str], list[str]]:
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key=KEY, max_retries=0, timeout=120) as client:
            together = await asyncio.gather(*(ask(client, pair) for pair in pairs))
            return list(together), [await ask(client, pair) for pair in pairs]

    together, alone = asyncio.run(ask_all())
    assert together == alone
    assert all(text.startswith(f"{a} + {b} = ") for text, (a, b) in zip(together, pairs, strict=True))


def test_clients_that_leave_free_what_they_had(server: Served, http: httpx.Client) -> None:
    def running() -> float:
        lines = http.get("/metrics").text.splitlines()
        return sum(
            float(each.split()[1]) for each in lines if each.startswith(("moesaic_requests_r", "moesaic_requests_w"))
        )

    body = {"model": "demo", "prompt": "a", "max_tokens": 3000, "ignore_eos": True, "stream": True}
    with http.stream("POST", "/v1/completions", json=body) as answer:
        for _, _ in zip(range(5), answer.iter_lines(), strict=False):
            pass
    with pytest.raises(httpx.ReadTimeout):
        http.post("/v1/completions", json=body | {"stream": False}, timeout=0.5)
    deadline = time.monotonic() + 5
    while running():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_a_signal_lets_streams_end() -> None:
    with served("demo", "--served-name", "other") as server:
        server.wait_ready()
        body = {"model": "other", "prompt": "a", "max_tokens": 60, "ignore_eos": True, "stream": True}
        with httpx.stream("POST", f"{server.url}/v1/completions", json=body, timeout=60) as answer:
            lines = answer.iter_lines()
            first = next(lines)
            server.send(signal.SIGTERM)
            time.sleep(0.1)
            rest = [line.removeprefix("data: ") for line in lines if line]
        assert first.startswith("data: {")
        assert rest[-1] == "[DONE]"
        assert any(json.loads(each)["choices"][0].get("finish_reason") == "length" for each in rest[-3:-1])
        assert server.end() == 0


def test_a_signal_while_it_loads() -> None:
    with served("demo") as server:
        assert server.health() == "loading"
        server.send(signal.SIGINT)
        assert server.end() == 0


def test_a_model_that_is_not_there() -> None:
    with served("/no/such/model.gguf") as server:
        assert server.end() == 1
    assert "/no/such/model.gguf" in "".join(server.log) and "Traceback" not in "".join(server.log)


def test_a_port_that_is_taken(server: Served) -> None:
    port = server.url.rpartition(":")[2]
    with pytest.raises(AssertionError, match="Choose another with --port"), served("demo", "--port", port):
        pass
