"""/tokenize and /detokenize: tokens are code points here, after a 0 that stands for a special token."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from tests.server.openai.fakes import Served
from tests.server.openai.test_chat import WEATHER

from moesaic.server.conversation import Message, Tool

TURN = [{"role": "user", "content": "b"}]


def post(served: Served, path: str, body: dict[str, Any]) -> tuple[int, dict[str, Any]]:
    """Status and body."""
    answer = asyncio.run(served.http.post(path, json=body))
    return answer.status_code, answer.json()


def test_text_and_back() -> None:
    served = Served()
    assert post(served, "/tokenize", {"prompt": "Aé", "model": "tiny"}) == (
        200,
        {"count": 3, "max_model_len": 4096, "tokens": [0, 65, 233], "token_strs": None},
    )
    _, told = post(served, "/tokenize", {"prompt": "Aé", "add_special_tokens": False, "return_token_strs": True})
    assert told["tokens"] == [65, 233] and told["token_strs"] == ["A", "é"]
    assert post(served, "/tokenize", {"prompt": ""})[1]["tokens"] == [0]
    assert post(served, "/detokenize", {"tokens": [65, 233]}) == (200, {"prompt": "Aé"})


def test_a_conversation(monkeypatch: pytest.MonkeyPatch) -> None:
    served, seen = Served(), []
    encode = served.chat.encode_chat
    monkeypatch.setattr(served.chat, "encode_chat", lambda request: seen.append(request) or encode(request))
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "He"}]
    body = {"messages": messages, "tools": [WEATHER], "continue_final_message": True}
    status, told = post(served, "/tokenize", body | {"chat_template_kwargs": {"a": 1}})
    assert status == 200 and told["tokens"] == [0, *map(ord, "<user>Hi<assistant>He")]
    assert seen[0].messages == (Message("user", "Hi"), Message("assistant", "He")) and seen[0].continue_last
    assert [tool.name for tool in seen[0].tools] == ["weather"] and isinstance(seen[0].tools[0], Tool)
    assert seen[0].template_arguments == {"a": 1}


@pytest.mark.parametrize(
    ("path", "body", "status", "param"),
    [
        ("/tokenize", {}, 400, "prompt"),
        ("/tokenize", {"prompt": "a", "messages": TURN}, 400, "prompt"),
        ("/tokenize", {"prompt": 5}, 400, "prompt"),
        ("/tokenize", {"prompt": "a", "model": "other"}, 404, "model"),
        ("/tokenize", {"prompt": "a", "chat_template": "x"}, 400, "chat_template"),
        ("/tokenize", {"prompt": "a", "return_offsets": True}, 400, "return_offsets"),
        ("/tokenize", {"messages": []}, 400, "messages"),
        (
            "/tokenize",
            {"messages": [{"role": "user", "content": "b"}], "add_special_tokens": True},
            400,
            "add_special_tokens",
        ),
        (
            "/tokenize",
            {"messages": [{"role": "user", "content": "b"}], "add_generation_prompt": False},
            400,
            "add_generation_prompt",
        ),
        ("/detokenize", {}, 400, None),
        ("/detokenize", {"tokens": [-1]}, 400, "tokens[0]"),
        ("/detokenize", {"tokens": [2**30]}, 400, "tokens"),
        ("/detokenize", {"tokens": [1], "model": "other"}, 404, "model"),
    ],
)
def test_what_is_refused(path: str, body: dict[str, Any], status: int, param: str | None) -> None:
    found, told = post(Served(), path, body)
    assert found == status and told["error"]["param"] == param and told["error"]["message"]
