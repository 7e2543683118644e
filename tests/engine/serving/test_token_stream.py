"""One conversation by the steps of the serving engine: the same tokens as generate(), reuse that changes nothing."""

from __future__ import annotations

from itertools import islice

import pytest
import torch
from tests.engine.pairs import load_tiny
from tests.tiny_models import tiny_inputs

from moesaic.engine.serving.paged_runner import paged_runner_for
from moesaic.engine.serving.params import SamplingParams
from moesaic.engine.serving.sampler import RequestSampler
from moesaic.engine.serving.token_stream import TokenStream, token_stream_of
from moesaic.errors import GenerationError, KernelError

FAMILIES = ["qwen3_moe", "deepseek_v3", "gpt_oss", "qwen3_next"]


def stream_of(family, **options):
    stream = token_stream_of(load_tiny(family), torch.float32)
    assert stream is not None
    if options:
        model = load_tiny(family)
        stream = TokenStream(paged_runner_for(model, 40, block_size=16, kv_dtype=torch.float32, **options))
    return stream


def greedy(stream, ids, count):
    """(tokens that were computed already, the next ones)"""
    sampler = RequestSampler(SamplingParams(temperature=0), {}, stream.runner.vocab_size, ids)
    kept = stream.begin(ids)
    return kept, list(islice(stream.generate(ids, sampler), count))


@pytest.mark.parametrize("family", FAMILIES)
def test_tokens_are_those_of_generate_however_much_is_kept(family):
    model = load_tiny(family)
    stream = stream_of(family)
    first = tiny_inputs(1, 21, seed=4)[0].tolist()

    def expected(ids, count):
        out = model.generate(torch.tensor([ids]), max_new_tokens=count, do_sample=False)
        return out[0, len(ids) :].tolist()

    kept, answer = greedy(stream, first, 8)
    assert (kept, answer) == (0, expected(first, 8))
    longer = [*first, *answer, *tiny_inputs(1, 9, seed=5)[0].tolist()]
    kept, answer = greedy(stream, longer, 8)
    assert answer == expected(longer, 8)
    assert kept == len(first) + 7  # the last token that was chosen was never computed
    changed = [*first[:15], *tiny_inputs(1, 6, seed=6)[0].tolist()]
    kept, answer = greedy(stream, changed, 8)
    assert answer == expected(changed, 8)
    assert kept == (0 if family == "qwen3_next" else 15)  # a recurrent state cannot go back
    kept, answer = greedy(stream, changed, 3)
    assert answer == expected(changed, 3)
    assert kept == (0 if family == "qwen3_next" else len(changed) - 1)
    stream.forget()
    assert stream.runner.pool.num_free == stream.runner.pool.num_blocks


@pytest.mark.parametrize("family", ["qwen3_moe", "qwen3_next"])
def test_a_long_prompt_in_pieces_changes_nothing(family):
    ids = tiny_inputs(1, 61, seed=7)[0].tolist()
    whole, pieces = stream_of(family, max_chunk=64), stream_of(family, max_chunk=25)
    assert greedy(whole, ids, 5) == greedy(pieces, ids, 5)


def test_keys_of_moving_frequencies_are_kept_only_where_they_are_the_same():
    stream = stream_of("qwen3_moe")
    stream.runner.shared_positions = 24  # as if frequencies moved from there on
    ids = tiny_inputs(1, 40, seed=8)[0].tolist()
    assert greedy(stream, ids[:20], 1)[0] == 0
    assert greedy(stream, ids[:22], 1)[0] == 20
    assert greedy(stream, ids, 1)[0] == 0  # a longer prompt has other angles everywhere
    assert greedy(stream, ids[:23], 1)[0] == 0


def test_a_full_cache_and_a_stream_without_a_prompt_are_refused():
    stream = stream_of("qwen3_moe")
    with pytest.raises(GenerationError, match="prompt"):
        stream.step(1)
    model = load_tiny("qwen3_moe")
    small = TokenStream(paged_runner_for(model, 2, block_size=16, kv_dtype=torch.float32))
    assert small.max_positions == 32
    ids = tiny_inputs(1, 30)[0].tolist()
    kept, tokens = greedy(small, ids, 3)
    assert (kept, len(tokens)) == (0, 3)
    with pytest.raises(GenerationError, match="room for 32 positions"):
        small.step(1)
    assert greedy(small, ids, 3) == (29, tokens)


@pytest.mark.parametrize("family", ["qwen3_moe", "deepseek_v2", "granitemoe", "gpt_oss", "minimax_m2"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_step_as_one_call_has_the_bits_of_its_parts(family, dtype):
    """Families with factors of embeddings and logits, biases, latent attention; one sequence and several."""
    model = load_tiny(family)
    runner = paged_runner_for(model, 40, block_size=16, kv_dtype=dtype)
    ids = tiny_inputs(3, 30, seed=9)
    sequences = [runner.new_sequence() for _ in range(3)]
    for sequence, row, count in zip(sequences, ids, (5, 17, 30), strict=True):
        work = runner.start_prefill([(sequence, row[:count])])
        work.advance(runner.num_layers)
    for chosen in (sequences, sequences[:1], sequences[1:]):
        tokens = [7 * index + 3 for index in range(len(chosen))]
        at_once = runner.decode(chosen, tokens).clone()
        for sequence in chosen:
            sequence.truncate(sequence.length - 1)
        in_parts = runner._decode_in_parts(chosen, tokens)
        assert torch.equal(at_once, in_parts)


def test_tokens_outside_the_vocabulary_change_nothing():
    stream = stream_of("qwen3_moe")
    ids = tiny_inputs(1, 20)[0].tolist()
    _, expected = greedy(stream, ids, 4)
    stream.begin(ids)
    stream.fill(ids)
    with pytest.raises(KernelError, match="do not go together"):
        stream.step(10**6)
    assert [int(stream.step(token).argmax()) for token in expected[:-1]] == expected[1:]
