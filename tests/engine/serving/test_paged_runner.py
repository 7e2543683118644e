"""Steps of many sequences on a paged cache give what the model gives for each of them alone."""

from __future__ import annotations

import pytest
import torch
from tests.engine.pairs import checkpoint_of, load_tiny, relative_error
from tests.tiny_models import ALL_FAMILIES, tiny_inputs

from moesaic.engine.serving.cache_room import CacheRoom, room_for_cache
from moesaic.engine.serving.paged_runner import paged_runner_for
from moesaic.errors import ConfigError, GenerationError, KernelError
from moesaic.kvcache.paged import pool_bytes
from moesaic.placement.rules import parse_rules

PAGED = ALL_FAMILIES
PROMPTS = [5, 21, 1, 12]
BLOCK = 16


def runner_of(model, num_blocks=40, **options):
    runner = paged_runner_for(model, num_blocks, block_size=BLOCK, **({"kv_dtype": torch.float32} | options))
    assert runner is not None
    return runner


def prefill(runner, parts, layers=None):
    work = runner.start_prefill(parts)
    while work.num_layers_left:
        work.advance(layers or runner.num_layers)
    return work.logits()


@pytest.mark.parametrize("family", PAGED)
def test_every_family_gives_the_logits_of_the_model_library(family):
    """Prompts of different lengths in one prefill, then decode steps of all, then some go on with several tokens."""
    stock, runner = checkpoint_of(family)[0], runner_of(load_tiny(family))
    ids = tiny_inputs(len(PROMPTS), 40)
    with torch.no_grad():
        expected = stock(ids).logits
    sequences = [runner.new_sequence() for _ in PROMPTS]
    at = list(PROMPTS)
    parts = [(sequence, row[:n]) for sequence, row, n in zip(sequences, ids, at, strict=True)]
    logits = prefill(runner, parts)
    for index, n in enumerate(at):
        assert relative_error(logits[index], expected[index, n - 1]) < 1e-4
    for _ in range(4):
        logits = runner.decode(sequences, [int(row[n]) for row, n in zip(ids, at, strict=True)])
        for index, n in enumerate(at):
            assert relative_error(logits[index], expected[index, n]) < 1e-4
        at = [n + 1 for n in at]
    logits = prefill(runner, [(sequences[1], ids[1, at[1] : at[1] + 9]), (sequences[2], ids[2, at[2] : at[2] + 20])])
    assert relative_error(logits[0], expected[1, at[1] + 8]) < 1e-4
    assert relative_error(logits[1], expected[2, at[2] + 19]) < 1e-4
    for sequence in sequences:
        runner.forget(sequence)
    assert runner.pool.num_free == runner.pool.num_blocks


@pytest.mark.parametrize("independent", ["decode", "all"])
@pytest.mark.parametrize("family", ["deepseek_v2", "deepseek_v3"])
def test_latents_of_a_long_prompt_are_made_in_parts(family, independent):
    """The borders of the parts, 256 tokens each, lie inside of sequences and between them; or latents are expanded."""
    model = load_tiny(family)
    runner = runner_of(model, num_blocks=60, independent=independent)
    ids = tiny_inputs(3, 330)
    with torch.no_grad():
        expected = model(ids).logits
    lengths = [230, 26, 330]
    sequences = [runner.new_sequence() for _ in lengths]
    prefill(runner, [(sequences[2], ids[2, :20])])
    rows = [ids[0, :230], ids[1, :26], ids[2, 20:]]
    logits = prefill(runner, list(zip(sequences, rows, strict=True)))
    for index, length in enumerate(lengths):
        assert relative_error(logits[index], expected[index, length - 1]) < 1e-4


@pytest.mark.parametrize("family", ["qwen3_moe", "deepseek_v3", "gpt_oss", "qwen3_next"])
def test_greedy_text_is_that_of_generate(family):
    model = load_tiny(family)
    runner = runner_of(model)
    prompts = [tiny_inputs(1, n, seed=n) for n in (3, 14, 30)]
    expected = [model.generate(p, max_new_tokens=12, do_sample=False)[0, p.shape[1] :].tolist() for p in prompts]
    sequences = [runner.new_sequence() for _ in prompts]
    chosen = prefill(runner, [(s, p[0]) for s, p in zip(sequences, prompts, strict=True)]).argmax(-1).tolist()
    texts = [[token] for token in chosen]
    for _ in range(11):
        chosen = runner.decode(sequences, chosen).argmax(-1).tolist()
        for text, token in zip(texts, chosen, strict=True):
            text.append(token)
    assert texts == expected


@pytest.mark.parametrize("family", ["qwen3_moe", "deepseek_v3", "qwen3_next"])
def test_layers_of_a_prefill_between_decode_steps_of_others(family):
    model = load_tiny(family)
    runner = runner_of(model)
    ids = tiny_inputs(3, 40, seed=3)

    def start():
        sequences = [runner.new_sequence() for _ in range(3)]
        prefill(runner, [(sequences[0], ids[0, :20]), (sequences[1], ids[1, :7])])
        return sequences

    sequences = start()
    work = runner.start_prefill([(sequences[2], ids[2, :33])])
    steps = []
    while work.num_layers_left:
        work.advance(1)
        at = [sequence.length for sequence in sequences[:2]]
        steps.append(runner.decode(sequences[:2], [int(ids[0, at[0]]), int(ids[1, at[1]])]).clone())
    pieces = work.logits().clone()
    assert len(steps) == runner.num_layers
    again = start()
    whole = prefill(runner, [(again[2], ids[2, :33])])
    assert torch.equal(pieces, whole)
    for step in steps:
        at = [sequence.length for sequence in again[:2]]
        assert torch.equal(step, runner.decode(again[:2], [int(ids[0, at[0]]), int(ids[1, at[1]])]))


def test_two_sequences_share_the_blocks_of_a_prefix():
    model = load_tiny("qwen3_moe")
    runner = runner_of(model)
    ids = tiny_inputs(1, 40)[0]
    first = runner.new_sequence()
    expected = prefill(runner, [(first, ids)])
    second = runner.new_sequence()
    shared = first.blocks[:2]
    runner.pool.hold(shared)
    second._extend(list(shared))
    second.length = 2 * BLOCK
    assert relative_error(prefill(runner, [(second, ids[2 * BLOCK :])]), expected) < 1e-5
    assert second.blocks[:2] == first.blocks[:2]


def test_abandoned_work_takes_its_positions_back():
    model = load_tiny("qwen3_moe")
    runner = runner_of(model)
    ids = tiny_inputs(1, 40)[0]
    sequence = runner.new_sequence()
    prefill(runner, [(sequence, ids[:10])])
    free = runner.pool.num_free
    work = runner.start_prefill([(sequence, ids[10:])])
    work.advance(1)
    with pytest.raises(KernelError, match="are left"):
        work.logits()
    work.abandon()
    assert sequence.length == 10
    assert runner.pool.num_free == free
    logits = prefill(runner, [(sequence, ids[10:])])
    with torch.no_grad():
        assert relative_error(logits[0], model(ids[None]).logits[0, -1]) < 1e-4


def test_half_a_cache_is_close():
    model = load_tiny("qwen3_moe")
    ids = tiny_inputs(1, 40)[0]
    runner = runner_of(model, kv_dtype=torch.bfloat16)
    logits = prefill(runner, [(runner.new_sequence(), ids)])
    with torch.no_grad():
        assert relative_error(logits[0], model(ids[None]).logits[0, -1]) < 2e-2


def test_a_full_cache_leaves_everything_as_it_was():
    model = load_tiny("qwen3_moe")
    runner = runner_of(model, num_blocks=3)
    sequences = [runner.new_sequence() for _ in range(2)]
    ids = tiny_inputs(2, 60)
    prefill(runner, [(sequences[0], ids[0, :BLOCK]), (sequences[1], ids[1, : 2 * BLOCK])])
    for call in (
        lambda: runner.decode(sequences, [5, 6]),
        lambda: runner.start_prefill([(sequences[0], ids[0, :3])]),
        lambda: runner.start_prefill([(sequences[0], ids[0, :60])]),
    ):
        with pytest.raises(GenerationError):
            call()
        assert [sequence.length for sequence in sequences] == [BLOCK, 2 * BLOCK]


def test_wrong_calls_are_refused():
    runner = runner_of(load_tiny("qwen3_moe"), max_batch=2, max_chunk=8)
    sequences = [runner.new_sequence() for _ in range(3)]
    for count, tokens in ((0, []), (3, [1, 2, 3]), (2, [1])):
        with pytest.raises(KernelError):
            runner.decode(sequences[:count], tokens)
    with pytest.raises(KernelError, match="at most 8"):
        runner.start_prefill([(sequences[0], tiny_inputs(1, 9)[0])])
    runner.close()
    with pytest.raises(KernelError, match="closed"):
        runner.decode(sequences[:1], [1])


@pytest.mark.parametrize(("family", "name"), [("qwen3_moe", "*.0.self_attn"), ("qwen3_next", "*.1.linear_attn")])
def test_what_cannot_be_paged_is_left_to_others(family, name):
    """Here because the plan leaves a part to the model library."""
    text = f"rules:\n  - match: {{name: '{name}'}}\n    implementation: transformers\n"
    model = load_tiny(family, parse_rules(text, "test"))
    assert paged_runner_for(model, 4) is None
    assert room_for_cache(model, 1 << 20) is None


def test_bytes_of_a_cache_become_blocks():
    model = load_tiny("deepseek_v3")
    runner = runner_of(model, num_blocks=1)
    block = pool_bytes(runner.decoder.cache_shapes, 1, 64, torch.bfloat16)
    assert room_for_cache(model, 5 * block + 1) == CacheRoom(5)
    with pytest.raises(ConfigError, match="more memory"):
        room_for_cache(model, block - 1)


def test_bytes_of_a_cache_become_blocks_and_states():
    model = load_tiny("qwen3_next")
    block = 64 * 2 * (2 * 64 + 2 * 64)  # one layer of two heads, bfloat16
    state = 3 * 4 * (3 * (2 * 4 * 32 + 8 * 32) + 8 * 32 * 32)  # three layers: convolution and matrices, float32
    assert room_for_cache(model, 100 * (block + state), max_batch=8) == CacheRoom(100 + 92 * state // block, 8)
    assert room_for_cache(model, 4 * state + block, max_batch=64) == CacheRoom(1 + 2 * state // block, 2)
    for context, num_states in ((7 * 64, 2), (7 * 64 + 1, 1)):
        room = room_for_cache(model, 4 * state, context=context)
        assert room == CacheRoom((4 - num_states) * state // block, num_states)
    assert room_for_cache(model, state + block) == CacheRoom(1, 1)
    with pytest.raises(ConfigError, match="recurrent state"):
        room_for_cache(model, state + block - 1)


def test_recurrent_states_cannot_go_back():
    model = load_tiny("qwen3_next")
    runner = runner_of(model, num_states=2)
    ids = tiny_inputs(3, 40)
    sequences = [runner.new_sequence() for _ in range(3)]
    prefill(runner, [(sequences[0], ids[0, :10]), (sequences[1], ids[1, :30])])
    with pytest.raises(GenerationError, match="All 2 recurrent states"):
        runner.start_prefill([(sequences[2], ids[2])])
    work = runner.start_prefill([(sequences[0], ids[0, 10:])])
    work.advance(1)
    work.abandon()
    assert [sequence.length for sequence in sequences] == [0, 30, 0]
    assert runner.states.num_free == 1
    logits = prefill(runner, [(sequences[2], ids[2]), (sequences[1], ids[1, 30:])])  # in the slot of another one
    with torch.no_grad():
        expected = model(ids[1:]).logits[:, -1]
    assert relative_error(logits[0], expected[1]) < 1e-4
    assert relative_error(logits[1], expected[0]) < 1e-4
    assert not runner.shares_prefixes


@pytest.mark.parametrize("family", ["qwen3_moe", "deepseek_v3", "gpt_oss", "granitemoe", "qwen3_next"])
def test_logits_do_not_depend_on_the_batch_to_the_bit(family):
    """Neither on who else decodes, nor on what else or how much at once is filled in."""
    runner = runner_of(load_tiny(family), num_blocks=200, independent="all")
    ids = tiny_inputs(33, 40, seed=5)

    def decode(batch):
        sequences = [runner.new_sequence() for _ in range(batch)]
        prefill(runner, [(sequence, row[:20]) for sequence, row in zip(sequences, ids, strict=False)])
        steps = [runner.decode(sequences, [int(row[i]) for row in ids[:batch]])[0].clone() for i in range(20, 24)]
        for sequence in sequences:
            runner.forget(sequence)
        return torch.stack(steps)

    alone = decode(1)
    for batch in (2, 7, 33):
        assert torch.equal(decode(batch), alone), batch
    whole = prefill(runner, [(runner.new_sequence(), ids[0])])[0]
    with_others = prefill(runner, [(runner.new_sequence(), row) for row in ids[:8]])[0]
    assert torch.equal(with_others, whole)
    for first in (39, 17, 2):
        sequence = runner.new_sequence()
        prefill(runner, [(sequence, ids[0, :first])])
        assert torch.equal(prefill(runner, [(sequence, ids[0, first:])])[0], whole), first
