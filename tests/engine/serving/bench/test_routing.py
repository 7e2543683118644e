"""Experts that answers chose, against the router logits of the stock model."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tests.tiny_models import save_tiny
from transformers import AutoModelForCausalLM

import moesaic
from moesaic.engine.serving.bench import routing
from moesaic.engine.serving.bench.routing import distinct_experts
from moesaic.engine.serving.bench.subject import make_subject, step_bytes


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tiny")
    save_tiny(path, "qwen3_moe", vocab_size=272)
    return path


def answers() -> list[tuple[list[int], int]]:
    """Prompts of several lengths with answers of at least 6 tokens."""
    rng = torch.Generator().manual_seed(1)
    sizes = [(5, 6), (3, 9), (8, 6), (4, 7)]
    return [(torch.randint(272, (size + more,), generator=rng).tolist(), size) for size, more in sizes]


@pytest.mark.parametrize("tokens", [1, 25, 2048])  # one answer at a time, two, all
def test_experts_are_those_of_the_stock_router(folder: Path, tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(routing, "_TOKENS", tokens)
    stock = AutoModelForCausalLM.from_pretrained(folder)
    top_k, steps = stock.config.num_experts_per_tok, 5  # the last token of an answer goes into no step
    chosen: list[list[set[int]]] = [[set() for _ in range(steps)] for _ in range(stock.config.num_hidden_layers)]
    for ids, size in answers():
        with torch.no_grad():
            logits = stock(torch.tensor([ids]), output_router_logits=True).router_logits
        for layer, rows in enumerate(logits):
            for step in range(steps):
                chosen[layer][step] |= set(rows[size + step].topk(top_k).indices.tolist())
    expected = [sum(map(len, sets)) / steps for sets in chosen]
    ours = moesaic.AutoModelForCausalLM.from_pretrained(str(folder), plan="cpu", progress=False)
    names = [f"model.layers.{layer}.mlp.experts" for layer in range(len(expected))]
    assert distinct_experts(ours, names, answers()) == pytest.approx(expected)
    assert not any(module._forward_pre_hooks for module in ours.modules())


def test_what_nobody_sees_is_not_guessed(folder: Path) -> None:
    stock = AutoModelForCausalLM.from_pretrained(folder)
    assert distinct_experts(stock, ["model.layers.0.mlp.experts"], answers()) is None
    ours = moesaic.AutoModelForCausalLM.from_pretrained(str(folder), plan="cpu", progress=False)
    assert distinct_experts(ours, ["model.layers.0.mlp.experts"], [([1, 2, 3], 2)]) is None  # one token: no step


def test_a_subject_and_what_its_steps_read(folder: Path) -> None:
    subject = make_subject(model=str(folder), users=3, positions=100, cache_positions=1000)
    config = subject.model.config
    pool = subject.engine.runner.pool
    assert pool.num_blocks * pool.block_size >= 1000
    assert subject.total_layers == config.num_hidden_layers == len(subject.expert_modules)
    step = step_bytes(subject.prepared.plan, 10)
    expert = 3 * config.hidden_size * config.moe_intermediate_size * 4
    for layer in step.layers:
        assert (layer.num_experts, layer.top_k) == (config.num_experts, config.num_experts_per_tok)
        assert layer.expert_bytes == expert
    assert step.of(1) == pytest.approx(subject.prepared.plan.bytes_per_token + step.cache)
    subject.engine.close()
