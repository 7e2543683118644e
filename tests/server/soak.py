"""Random requests of many kinds, some of them given up in the middle, against a server over real sockets."""

from __future__ import annotations

import asyncio
import random
import time
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import httpx

GIVES_UP = 5
"""One request in so many is given up."""
ERRORS = ('"error":{', '"error":"', '"type":"error"', "event: error", "response.failed")
"""In the last line of a stream that failed."""
SENTENCE = "what is the sum of and please tell me a story about 12 30 495 7 Größe 你好 then again why not"
WORDS = SENTENCE.split()
BEGINNINGS = [" ".join(random.Random(number).choices(WORDS, k=150)) for number in range(3)]


@dataclass
class Traffic:
    """Users who ask at random until their time is over.

    Attributes:
        asked: requests.
        outcomes: how many of them ended how.
        wrong: what should not have happened.
    """

    client: httpx.AsyncClient
    seed: int = 0
    asked: int = 0
    outcomes: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)

    async def run(self, users: int, seconds: float) -> None:
        """Ask for so long."""
        end = time.monotonic() + seconds
        self.seed += 1
        await asyncio.gather(*(self._user(random.Random(self.seed * 1000 + number), end) for number in range(users)))

    async def _user(self, rng: random.Random, end: float) -> None:
        while time.monotonic() < end:
            path, body, expected = make_request(rng)
            self.asked += 1
            gives_up = self.asked % GIVES_UP == 0
            try:
                outcome = await self._ask(rng, path, body, expected, gives_up)
            except httpx.HTTPError as error:
                outcome = "broken"
                self.wrong.append(f"{path}: {type(error).__name__} {error}")
            self.outcomes[outcome] += 1

    async def _ask(self, rng: random.Random, path: str, body: dict[str, Any], expected: int, gives_up: bool) -> str:
        """Ask once; one who gives up leaves after some pieces or, waiting for the whole, after some time."""
        streams = bool(body.get("stream", path == "/api/generate"))
        pieces = rng.randrange(0, 12) if gives_up and streams else 10**9
        patience = rng.uniform(0.0, 0.5) if gives_up and (not streams or rng.random() < 0.3) else 300.0
        try:
            async with asyncio.timeout(patience), self.client.stream("POST", path, json=body) as answer:
                if answer.status_code != expected and answer.status_code != 429:
                    self.wrong.append(f"{path}: {answer.status_code} {await answer.aread()!r}"[:500])
                    return "wrong"
                last = ""
                async for line in answer.aiter_lines():
                    last = line or last
                    pieces -= bool(line)
                    if pieces < 0:
                        return "cancelled"
        except TimeoutError:
            if not gives_up:
                self.wrong.append(f"{path}: no end after {patience} seconds")
            return "cancelled"
        if any(sign in last for sign in ERRORS) and answer.status_code == 200:
            self.wrong.append(f"{path}: {last}"[:500])
        return "refused" if expected == 400 else "busy" if answer.status_code == 429 else "answered"


def make_request(rng: random.Random) -> tuple[str, dict[str, Any], int]:
    """Path, body and the expected status of a random request."""
    make = rng.choice((_chat, _chat, _completion, _completion, _response, _message, _ollama_chat, _ollama_generate))
    path, body = make(rng)
    body["model"] = "demo"
    if rng.random() < 0.03:
        return path, {**body, "messages": 5, "prompt": 5.5, "input": 5}, 400
    return path, body, 200


def _text(rng: random.Random) -> str:
    beginning = rng.choice(BEGINNINGS) if rng.random() < 0.3 else ""
    return beginning + " ".join(rng.choices(WORDS, k=rng.choice((1, 5, 20, 100, 250))))


def _turns(rng: random.Random) -> list[dict[str, str]]:
    turns = [{"role": "user", "content": _text(rng)}]
    if rng.random() < 0.3:
        turns += [{"role": "assistant", "content": "42"}, {"role": "user", "content": "again"}]
    return turns


def _openai(rng: random.Random, limit: str) -> dict[str, Any]:
    body: dict[str, Any] = {limit: rng.randrange(1, 80), "stream": rng.random() < 0.6, "seed": rng.randrange(100)}
    body["temperature"] = rng.choice((0, 0.7, 3.0))
    if rng.random() < 0.2:
        body["stop"] = ["7", "story"]
    if rng.random() < 0.2:
        body["n"] = rng.randrange(1, 4)
    return body


def _chat(rng: random.Random) -> tuple[str, dict[str, Any]]:
    body = _openai(rng, "max_completion_tokens") | {"messages": _turns(rng)}
    if rng.random() < 0.2:
        body |= {"logprobs": True, "top_logprobs": 3}
    if rng.random() < 0.1:
        body["response_format"] = {"type": "json_object"}
    return "/v1/chat/completions", body


def _completion(rng: random.Random) -> tuple[str, dict[str, Any]]:
    prompts = [_text(rng) for _ in range(rng.choice((1, 1, 2)))]
    ignore = rng.random() < 0.5
    return "/v1/completions", _openai(rng, "max_tokens") | {"prompt": prompts, "ignore_eos": ignore}


def _response(rng: random.Random) -> tuple[str, dict[str, Any]]:
    return "/v1/responses", {"input": _text(rng), "max_output_tokens": rng.randrange(16, 80), "stream": True}


def _message(rng: random.Random) -> tuple[str, dict[str, Any]]:
    return "/v1/messages", {
        "messages": _turns(rng),
        "max_tokens": rng.randrange(1, 80),
        "stream": rng.random() < 0.6,
    }


def _ollama_chat(rng: random.Random) -> tuple[str, dict[str, Any]]:
    options = {"num_predict": rng.randrange(1, 80), "temperature": rng.random()}
    return "/api/chat", {"messages": _turns(rng), "stream": rng.random() < 0.6, "options": options}


def _ollama_generate(rng: random.Random) -> tuple[str, dict[str, Any]]:
    return "/api/generate", {"prompt": _text(rng), "options": {"num_predict": rng.randrange(1, 80)}}
