"""The demo's training code: rows, tokenizer, the fast forward pass against the stock model, the optimizer, the loop."""

from __future__ import annotations

import filecmp
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from demo.batches import BUCKETS, encode_items, rows_of
from demo.export import export_checkpoint
from demo.fast_forward import FastForward, fake_quantize
from demo.held_out import held_out_items
from demo.items import LANGUAGES, Item
from demo.model_config import VOCAB_SIZE, demo_config
from demo.optimizer import Optimizer
from demo.quick_eval import quick_evaluate
from demo.tokenizer import SPECIAL_TOKENS, train_tokenizer
from demo.train import DEFAULT_TOKENIZER, Trainer, build_model, rate
from safetensors.torch import load_file
from tokenizers import Tokenizer
from transformers import AutoTokenizer, DeepseekV3ForCausalLM

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_file(str(DEFAULT_TOKENIZER / "tokenizer.json"))


@pytest.mark.slow
def test_the_shipped_tokenizer_is_what_the_code_makes(tmp_path: Path) -> None:
    train_tokenizer().save_pretrained(tmp_path)
    for name in ("tokenizer.json", "chat_template.jinja"):
        assert filecmp.cmp(tmp_path / name, DEFAULT_TOKENIZER / name, shallow=False)


def test_digits_and_chinese_characters_are_tokens_of_their_own(tokenizer: Tokenizer) -> None:
    assert tokenizer.get_vocab_size() == VOCAB_SIZE
    assert [tokenizer.token_to_id(token) for token in SPECIAL_TOKENS] == [0, 1, 2, 3, 4]
    assert tokenizer.encode("120479").tokens == list("120479")
    text = "把苹果倒过来写"
    assert [tokenizer.decode([number]) for number in tokenizer.encode(text).ids] == list(text)
    for text in ("naïve café, 3.14!\n\t x", "𝄞 ﬁ 苹果🙂"):
        assert tokenizer.decode(tokenizer.encode(text).ids) == tokenizer.normalizer.normalize_str(text)


@pytest.mark.parametrize("task", ["addition", "small_talk", "lookup"])
def test_training_rows_are_what_the_chat_template_writes(tokenizer: Tokenizer, task: str) -> None:
    wrapped = AutoTokenizer.from_pretrained(DEFAULT_TOKENIZER)
    for language in LANGUAGES:
        items = held_out_items(task, language, 3, max_context=150)
        for item, (ids, answers) in zip(items, encode_items(tokenizer, items), strict=True):
            chat = []
            for turn in (item.turn, *item.follow_ups):
                chat.append({"role": "user", "content": turn.prompt})
                chat.append({"role": "assistant", "content": turn.answer})
            assert ids == wrapped.apply_chat_template(chat, return_dict=True)["input_ids"]
            said = tokenizer.decode([i for i, is_answer in zip(ids, answers, strict=True) if is_answer], False)
            assert said == "".join(turn.answer + "<|end|>" for turn in (item.turn, *item.follow_ups))


@pytest.mark.parametrize("name", BUCKETS)
def test_rows_are_full_of_whole_questions(tokenizer: Tokenizer, name: str) -> None:
    bucket = BUCKETS[name]
    rows = rows_of(bucket, tokenizer, seed=3)
    for _ in range(4):
        ids, answers = next(rows)
        assert ids.shape == answers.shape == (bucket.length,)
        assert ids.dtype == np.int16 and ids.min() >= 0 and ids.max() < VOCAB_SIZE
        used = int((ids != 0).sum())
        assert (ids[:used] != 0).all() and ids[used - 1] == 1
        assert not answers[used:].any() and answers[used - 1] and not answers[0]
    again = rows_of(bucket, tokenizer, seed=3)
    assert np.array_equal(next(again)[0], next(rows_of(bucket, tokenizer, seed=3))[0])


def _random_model() -> DeepseekV3ForCausalLM:
    model = build_model(1, CPU)
    for layer in model.model.layers[1:]:
        layer.mlp.gate.e_score_correction_bias.uniform_(0, 0.3)
    return model


def test_the_fast_forward_pass_equals_the_stock_model() -> None:
    model = _random_model()
    ids = torch.randint(5, VOCAB_SIZE, (2, 48))
    with torch.no_grad():
        forward = FastForward(model, compile_pieces=False, dtype=torch.float32)
        hidden = forward(ids, quantize=False)
        logits = forward.logits(hidden.states).view(2, 48, -1)
        expected = model(ids).logits
    assert (logits - expected).abs().max() < 1e-5 * expected.abs().max()
    assert hidden.loads.shape == (5, 16) and (hidden.loads.sum(1) == 2 * 48 * 4).all()


def test_padding_does_not_count_as_load() -> None:
    ids = torch.zeros(1, 16, dtype=torch.long)
    ids[0, :10] = torch.arange(10, 20)
    with torch.no_grad():
        loads = FastForward(_random_model(), compile_pieces=False)(ids, quantize=True).loads
    assert (loads.sum(1) == 10 * 4).all()


def test_fake_quantize_rounds_to_16_levels_and_passes_gradients() -> None:
    weight = torch.randn(4, 64, generator=torch.Generator().manual_seed(0), requires_grad=True)
    rounded = fake_quantize(weight)
    blocks = rounded.detach().view(-1, 32)
    assert all(len(torch.unique(block.mul(1e4).round())) <= 16 for block in blocks)
    step = (weight.view(-1, 32).amax(1) - weight.view(-1, 32).amin(1)) / 15
    assert ((rounded - weight).abs().view(-1, 32) <= 0.501 * step[:, None]).all()
    rounded.sum().backward()
    assert torch.equal(weight.grad, torch.ones_like(weight))


def test_muon_steps_every_singular_direction_alike() -> None:
    matrix = torch.nn.Linear(64, 32, bias=False)
    before = matrix.weight.detach().clone()
    gradient = torch.randn(32, 64, generator=torch.Generator().manual_seed(0))
    model = torch.nn.ModuleDict({"matrix": matrix, "norm": torch.nn.RMSNorm(64)})
    optimizer = Optimizer(model, muon_lr=0.1, adam_lr=0.01, weight_decay=0.0)
    matrix.weight.grad, model["norm"].weight.grad = gradient.clone(), torch.ones(64)
    optimizer.step(1.0)
    step = (before - matrix.weight.detach()) / (0.1 * 0.2 * 64**0.5)
    singular = torch.linalg.svdvals(step)
    assert singular.min() > 0.6 and singular.max() < 1.3
    assert (step * gradient).sum() > 0
    assert torch.allclose(model["norm"].weight, torch.full((64,), 0.99), atol=1e-4)
    assert matrix.weight.grad is None


def test_the_rate_warms_up_stays_and_ends_at_zero() -> None:
    rates = [rate(step, 1000) for step in range(1000)]
    assert rates[0] == 0.05 and rates[20:500] == [1.0] * 480
    assert rates[500:] == sorted(rates[500:], reverse=True) and rates[-1] == pytest.approx(0.002)


def test_training_lowers_the_loss_and_its_result_loads_in_the_stock_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = demo_config()
    config.num_hidden_layers = 2
    small = {name: replace(bucket, length=256, max_context=150, num_workers=1) for name, bucket in BUCKETS.items()}
    monkeypatch.setattr("demo.train.BUCKETS", small)
    monkeypatch.setattr("demo.train.demo_config", lambda: config)
    monkeypatch.setattr("demo.export.demo_config", lambda: config)
    trainer = Trainer(DEFAULT_TOKENIZER, tmp_path, CPU, steps=8, batch_tokens=512, muon_lr=4e-3, adam_lr=3e-3, seed=0)
    first, _ = trainer.step(0)
    trainer.run(log_every=1)
    records = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert records[-1]["short"] < first["short"].item() - 0.5
    export_checkpoint(tmp_path, tmp_path / "checkpoint")
    model = DeepseekV3ForCausalLM.from_pretrained(tmp_path / "checkpoint", dtype=torch.float32)
    saved = load_file(tmp_path / "model.safetensors")
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, saved[name].float()), name
    assert model.generation_config.eos_token_id == demo_config().eos_token_id


def test_the_quick_evaluation_judges_single_questions(monkeypatch: pytest.MonkeyPatch) -> None:
    """A forward pass that knows the answers of Chinese questions only is right in exactly those."""
    items: dict[str, list[Item]] = {}

    class Oracle:
        def __call__(self, ids: torch.Tensor, quantize: bool) -> object:
            states = torch.roll(ids.flatten(), -1)
            is_chinese = (ids == _zh_mark).any(1).repeat_interleave(ids.shape[1])
            return type("Hidden", (), {"states": torch.where(is_chinese, states, 0)})()

        def logits(self, states: torch.Tensor) -> torch.Tensor:
            return torch.nn.functional.one_hot(states.long(), VOCAB_SIZE).float()

    _zh_mark = Tokenizer.from_file(str(DEFAULT_TOKENIZER / "tokenizer.json")).encode("，").ids[0]
    monkeypatch.setattr("demo.quick_eval.TASKS", {"sorting": None})
    monkeypatch.setattr("demo.quick_eval.held_out_items", lambda task, language, count: items[language][:count])
    items["en"], items["zh"] = (held_out_items("sorting", language, 8) for language in LANGUAGES)
    report = quick_evaluate(Oracle(), DEFAULT_TOKENIZER, CPU, 2048, num_items=8, quantize=False)
    assert report == {"sorting/en": 0.0, "sorting/zh": 100.0}


def test_rows_draw_from_every_task(tokenizer: Tokenizer) -> None:
    text = ""
    rows = rows_of(BUCKETS["short"], tokenizer, seed=5)
    for _ in range(60):
        text += tokenizer.decode(next(rows)[0].tolist(), skip_special_tokens=False)
    for sign in (" + ", " - ", "The count is", "passkey", "排序", "Reverse", "Moesaic demo"):
        assert sign in text
