"""The official client reads what is said of the model."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime

import httpx
import ollama
import pytest
from tests.server.scripted import ScriptedChat, scripted_state, serving

from moesaic.server.ollama.models import OPERATIONS


@pytest.fixture
def served() -> Iterator[tuple[ollama.Client, ScriptedChat]]:
    state, chat = scripted_state()
    with serving(state, OPERATIONS) as address, ollama.Client(address) as client:
        yield client, chat


def test_tags(served: tuple[ollama.Client, ScriptedChat]) -> None:
    models = served[0].list().models
    assert [each.model for each in models] == ["demo:latest", "claude-anything:latest", "other:7b"]
    first = models[0]
    assert (first.digest, first.size, first.modified_at) == (
        "ab12",
        17_000,
        datetime(2023, 11, 14, 22, 13, 20, tzinfo=UTC),
    )
    assert first.details is not None
    assert first.details.model_dump() == {
        "parent_model": "",
        "format": "gguf",
        "family": "qwen3_moe",
        "families": ["qwen3_moe"],
        "parameter_size": "30.5B",
        "quantization_level": "Q4_K",
    }


def test_running(served: tuple[ollama.Client, ScriptedChat]) -> None:
    client, chat = served
    (model,) = client.ps().models
    assert (model.name, model.size, model.context_length) == ("demo:latest", 17_000, 4096)
    assert model.expires_at is not None and model.expires_at.year > 2100
    chat.engine.status = "dead"
    assert list(client.ps().models) == []


def test_show(served: tuple[ollama.Client, ScriptedChat]) -> None:
    client, chat = served
    shown = client.show("demo:latest")
    assert (shown.template, shown.capabilities) == ("{{ x }}", ["completion", "tools", "thinking"])
    assert shown.modelinfo == {
        "general.architecture": "qwen3_moe",
        "general.basename": "demo",
        "general.parameter_count": 30_532_122_624,
        "qwen3_moe.context_length": 4096,
    }
    chat.has_tools = chat.has_reasoning = False
    assert client.show("other:7b").capabilities == ["completion"]
    with pytest.raises(ollama.ResponseError) as caught:
        client.show("llama3")
    assert caught.value.status_code == 404


def test_show_takes_the_older_name_and_needs_one(served: tuple[ollama.Client, ScriptedChat]) -> None:
    url = f"{served[0]._client.base_url}/api/show"
    assert httpx.post(url, json={"name": "demo"}).status_code == 200
    answer = httpx.post(url, json={})
    assert (answer.status_code, answer.json()) == (400, {"error": "model: expected its name."})


def test_version(served: tuple[ollama.Client, ScriptedChat]) -> None:
    answer = httpx.get(f"{served[0]._client.base_url}/api/version").json()
    assert [part.isdigit() for part in answer["version"].split(".")] == [True] * 3
    assert answer["moesaic"] == "0.1.0"
