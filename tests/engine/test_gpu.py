"""Models with their layers on a GPU against stock transformers: in Triton's interpreter where there is none.

Weights and cache are float32 here, so that what differs is the order of float32 sums (and, on a GPU, products of many
tokens with F32 weights, which are exact to about 1e-6).
"""

from __future__ import annotations

import functools
import gc
import os
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from tests.engine.pairs import relative_error
from tests.tiny_models import FAMILIES, save_tiny, tiny_config, tiny_inputs
from transformers import PreTrainedModel

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
pytest.importorskip("triton")

from moesaic.engine.answer import Sampling
from moesaic.engine.expert_profile import ModelShape, read_profile
from moesaic.engine.gpu.causal_lm import attach_runner
from moesaic.engine.gpu.expert_cache import ExpertCache
from moesaic.engine.gpu.promotion import PromotionPolicy
from moesaic.engine.gpu.runner import ModelRunner, RunnerOptions
from moesaic.engine.gpu.slots import ExpertSlots
from moesaic.engine.gpu.upload_shares import UploadShares
from moesaic.engine.gpu.uploads import MissUploads
from moesaic.engine.loader import load, prepare
from moesaic.engine.session import Session
from moesaic.errors import ConfigError, GenerationError, KernelError, UnsupportedModelError
from moesaic.kernels import PackedTensor
from moesaic.modules import RoutedExperts
from moesaic.modules.gpu import attention as gpu_attention
from moesaic.modules.gpu.decoder import GpuDecoder
from moesaic.modules.gpu.experts import ResidentExperts, page_lock
from moesaic.modules.gpu.landing import LandingSlots

ON_GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if ON_GPU else "cpu")
TOLERANCE = 1e-4
"""Largest difference of any logit divided by the largest logit, as on the CPU."""
# The interpreter takes seconds per forward: without a GPU one of each kind of attention and block.
CHOSEN = FAMILIES if ON_GPU else ["qwen3_moe", "deepseek_v3", "gpt_oss", "qwen2_moe", "qwen3_next"]
MODES = ["graph", "eager"] if ON_GPU else ["eager"]

OPTIONS = RunnerOptions(num_blocks=64, block_size=16, kv_dtype=torch.float32, max_batch=4)
VOCAB_SIZE = 48
# Smaller than the tiny models elsewhere, for the interpreter's sake.
_SMALLER = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 32,
    "kv_lora_rank": 32,
    "q_lora_rank": 32,
    "head_dim": 16,
}

_LINEAR_ATTENTION = {
    "layer_types": ["linear_attention", "full_attention"],
    "linear_key_head_dim": 12,
    "linear_value_head_dim": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "shared_expert_intermediate_size": 16,
}


@functools.cache
def checkpoint_of(family: str) -> tuple[PreTrainedModel, Path]:
    """A small stock model of a family and the folder that it was saved to."""
    folder = Path(tempfile.mkdtemp(prefix=f"moesaic-gpu-{family}-"))
    usual = tiny_config(family)
    smaller = {key: value for key, value in _SMALLER.items() if getattr(usual, key, None) is not None}
    if family in ("deepseek_v2", "deepseek_v3"):
        smaller.pop("head_dim", None)  # follows from the rotary part
    if family == "qwen3_next":
        smaller |= _LINEAR_ATTENTION
    stock = save_tiny(folder, family, **smaller)
    stock.generation_config.eos_token_id = None
    stock.generation_config.pad_token_id = 0
    return stock, folder


def load_small(family: str) -> PreTrainedModel:
    """The same, loaded by moesaic on the CPU."""
    model = load(prepare(str(checkpoint_of(family)[1]), plan="cpu"), progress=False)
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    return model


def inputs(batch: int, length: int, seed: int = 0) -> torch.Tensor:
    return tiny_inputs(batch, length, seed, VOCAB_SIZE)


def on_gpu(
    family: str,
    graphs: bool = False,
    options: RunnerOptions = OPTIONS,
    num_layers: int | None = None,
    slots: Callable[[GpuDecoder], ExpertSlots] = lambda decoder: ExpertSlots(),
    uploads: Callable[[GpuDecoder], MissUploads | str] = lambda decoder: "",
) -> PreTrainedModel:
    model = load_small(family)
    decoder = GpuDecoder(model, DEVICE, max_positions=512, dtype=torch.float32, num_layers=num_layers)
    chosen = RunnerOptions(options.num_blocks, options.block_size, options.kv_dtype, options.max_batch, graphs)
    return attach_runner(model, ModelRunner(decoder, chosen, slots(decoder), uploads=uploads(decoder)))


def some_uploads(decoder: GpuDecoder) -> MissUploads:
    """One of two missing experts comes to the GPU, two of three, ..."""
    experts = [each for each in decoder.routed if each is not None]
    if ON_GPU:
        for each in experts:
            page_lock(each)
    uploads = MissUploads(LandingSlots(experts, 3, decoder.top_k, DEVICE), UploadShares())
    uploads.fixed = [max(0, missing - 1) for missing in range(uploads.landing.max_distinct + 1)]
    return uploads


def eager_cache(decoder: GpuDecoder) -> ExpertSlots:
    """A cache for some of the experts that decides at every step and copies whatever it likes."""
    experts = [each for each in decoder.routed if each is not None]
    policy = PromotionPolicy(len(experts), experts[0].num_experts, num_slots=5, share=1.0, advantage=0.0)
    return ExpertSlots(cache=ExpertCache(experts, 5, DEVICE, policy, steps_per_decision=1, is_guarded=False))


def all_resident(decoder: GpuDecoder) -> ExpertSlots:
    resident = {}
    for layer, experts in enumerate(decoder.routed):
        assert experts is not None
        resident[layer] = ResidentExperts.of(experts, DEVICE)
        decoder.drop_routed(layer)
    return ExpertSlots(resident)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("family", CHOSEN)
def test_prompt_chunk_and_steps(family: str, mode: str) -> None:
    """A prompt of two rows, a chunk, single tokens: the logits of each are those of the whole."""
    stock, ours = checkpoint_of(family)[0], on_gpu(family, mode == "graph")
    check_pieces(stock, ours)


def check_pieces(stock: PreTrainedModel, ours: PreTrainedModel, num_steps: int = 1) -> None:
    length = 11 + (40 if ON_GPU else num_steps)
    ids = inputs(batch=2 if ON_GPU else 1, length=length, seed=1)
    cache = ours.new_cache()
    with torch.no_grad():
        expected = stock(ids).logits
        parts = [ours(ids[:, :9], past_key_values=cache).logits, ours(ids[:, 9:11], past_key_values=cache).logits]
        parts += [ours(ids[:, i : i + 1], past_key_values=cache).logits for i in range(11, length)]
    assert relative_error(torch.cat(parts, 1), expected) < TOLERANCE
    cache.reset()
    assert ours.runner.pool.num_free == OPTIONS.num_blocks
    assert ours.runner.states is None or ours.runner.states.num_free == OPTIONS.max_batch


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("family", CHOSEN if ON_GPU else ["qwen3_moe"])
def test_eight_sequences_in_a_step(family: str, mode: str) -> None:
    """Sequences of different lengths: each gets the logits that it has alone."""
    check_together(family, mode, 8)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("family", ["qwen3_moe", "deepseek_v3", "gpt_oss"] if ON_GPU else ["deepseek_v3"])
def test_many_sequences_in_a_step(family: str, mode: str) -> None:
    """More than the kernels for few tokens take, and padding in the bucket."""
    check_together(family, mode, 20, all_resident if family == "gpt_oss" else eager_cache)


def check_together(
    family: str,
    mode: str,
    count: int,
    slots: Callable[[GpuDecoder], ExpertSlots] = lambda decoder: ExpertSlots(),
    uploads: Callable[[GpuDecoder], MissUploads | str] = lambda decoder: "",
) -> None:
    ours = on_gpu(family, mode == "graph", replace(OPTIONS, max_batch=32), slots=slots, uploads=uploads)
    stock, runner = checkpoint_of(family)[0], ours.runner
    rows = [inputs(1, 3 + index % 8, seed=index)[0] for index in range(count)]
    sequences = [runner.new_sequence() for _ in rows]
    runner.prefill([(sequence, row[:-1]) for sequence, row in zip(sequences, rows, strict=True)])
    logits = runner.decode(sequences, [int(row[-1]) for row in rows]).cpu()
    with torch.no_grad():
        expected = torch.cat([stock(row[None]).logits[:, -1] for row in rows])
    assert relative_error(logits, expected) < TOLERANCE


@pytest.mark.parametrize("mode", MODES)
def test_latent_attention_by_groups_of_heads(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What chunks of many tokens do, so that queries on latents need not all be there at once."""
    monkeypatch.setattr(gpu_attention, "latent_heads_at_once", lambda *sizes: 3)
    check_pieces(checkpoint_of("deepseek_v3")[0], on_gpu("deepseek_v3", mode == "graph"))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("family", ["qwen3_moe", "deepseek_v3"])
def test_first_layers_only(family: str, mode: str) -> None:
    """The traditional split: a layer on the GPU, the next and the head on the CPU."""
    check_pieces(checkpoint_of(family)[0], on_gpu(family, mode == "graph", num_layers=1))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss"] if ON_GPU else ["qwen3_moe"])
def test_a_cache_that_changes_all_the_time_changes_nothing(family: str, mode: str) -> None:
    ours = on_gpu(family, mode == "graph", slots=eager_cache)
    check_pieces(checkpoint_of(family)[0], ours, num_steps=5)
    statistics = ours.runner.slots.cache.statistics()
    assert 0.05 < statistics.hit_rate < 1 and statistics.copied >= 5


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("family", CHOSEN if ON_GPU else ["deepseek_v3", "gpt_oss"])
def test_misses_that_come_to_the_gpu_change_nothing(family: str, mode: str) -> None:
    """Without a cache, and beside one that changes all the time; some experts have biases."""
    slots = eager_cache if family == "deepseek_v3" else lambda decoder: ExpertSlots()
    ours = on_gpu(family, mode == "graph", slots=slots, uploads=some_uploads)
    check_pieces(checkpoint_of(family)[0], ours, num_steps=3)
    done = ours.runner.uploads.statistics()
    assert done.steps >= 3 and done.missing > done.brought > 0


@pytest.mark.parametrize("mode", MODES)
def test_misses_of_several_sequences_come_to_the_gpu(mode: str) -> None:
    check_together("qwen3_moe", mode, 5, uploads=some_uploads)


@pytest.mark.parametrize("num_layers", [None, 1])
def test_the_likeliest_tokens_are_those_of_the_logits(num_layers: int | None) -> None:
    """With the head on the GPU, which chooses by itself, and behind a split; twice, so that a graph is replayed."""
    runner = on_gpu("qwen3_moe", ON_GPU, num_layers=num_layers).runner
    sequences = [runner.new_sequence() for _ in range(2)]
    twins = [runner.new_sequence() for _ in range(2)]
    found = []
    for tokens in ([3, 40], [7, 21], [30, 5]):
        logits = runner.decode(sequences, tokens, to_host=True)
        assert logits.device.type == "cpu"
        found.append(runner.decode_likeliest(twins, tokens))
        assert found[-1] == logits.argmax(-1).tolist()
    assert len({token for tokens in found for token in tokens}) > 1


def test_padding_uses_no_experts() -> None:
    """What runs before a graph is captured is neither counted as used nor as missing."""
    runner = on_gpu("qwen3_moe", uploads=some_uploads).runner
    runner.steps.warm_up(runner.steps.bucket(2), True)
    assert runner.server.next_request > 1 and not runner.server.uses.any()
    assert (runner.uploads.statistics().missing, runner.uploads.statistics().brought) == (0, 0)


def test_uploads_are_tried_and_steps_stay_right() -> None:
    """Without the interpreter's times, which say nothing: the share that is expected is taken at once."""
    ours = on_gpu("qwen3_moe", ON_GPU, uploads=some_uploads)
    uploads = ours.runner.uploads
    uploads.fixed = None
    uploads.shares = Scripted([0, 4, 8, 0])
    check_pieces(checkpoint_of("qwen3_moe")[0], ours, num_steps=4)
    done = uploads.statistics()
    assert uploads.shares.observed >= 4 and done.steps >= 2 and 0 < done.brought < done.missing


class Scripted(UploadShares):
    """Shares in turns."""

    def __init__(self, shares: list[int]) -> None:
        super().__init__()
        self.turns, self.observed = shares, 0

    def begin(self, batch: int, is_quiet: bool = True) -> int:
        return self.turns[self.observed % len(self.turns)]

    def observe(self, seconds: float, is_quiet: bool = True) -> None:
        assert 0 < seconds < 60
        self.observed += 1


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("family", ["gpt_oss", "deepseek_v3", "qwen2_moe"] if ON_GPU else ["gpt_oss"])
def test_all_experts_on_the_gpu(family: str, mode: str) -> None:
    ours = on_gpu(family, mode == "graph", slots=all_resident)
    assert ours.runner.server is None
    check_pieces(checkpoint_of(family)[0], ours)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("family", ["qwen3_moe", "qwen3_next"])
def test_generate_gives_the_tokens_of_stock(family: str, mode: str) -> None:
    stock, ours = checkpoint_of(family)[0], on_gpu(family, mode == "graph")
    some_beams = family == "qwen3_next" and not ON_GPU
    ids = inputs(batch=1 if some_beams else 2, length=12)
    mask = torch.ones_like(ids)
    mask[0, :3] = 0  # padding
    beams = {"max_new_tokens": 2 if some_beams else 4, "num_beams": 2}
    without = {"max_new_tokens": 5 if ON_GPU else 2}
    for options in (without, beams) if ON_GPU else (beams if some_beams else without,):
        expected = stock.generate(ids, attention_mask=mask, do_sample=False, **options)
        found = ours.generate(ids, attention_mask=mask, do_sample=False, **options)
        assert found.tolist() == expected.tolist()


def test_a_full_cache_is_refused_and_nothing_is_lost() -> None:
    ours = on_gpu("qwen3_moe", options=RunnerOptions(num_blocks=2, block_size=16, kv_dtype=torch.float32))
    ids = inputs(batch=1, length=40)
    with pytest.raises(GenerationError, match="cache is full"):
        ours(ids)
    assert ours.runner.pool.num_free == 2
    with torch.no_grad():
        ours(ids[:, :1])


def test_a_copy_has_a_recurrent_state_of_its_own() -> None:
    ours = on_gpu("qwen3_next")
    runner = ours.runner
    for states in (x for cache in runner.caches[:1] for x in (cache.conv, cache.recurrent)):
        states.fill_(100.0)  # what other sequences left there
    first = runner.new_sequence()
    with torch.no_grad():
        runner.prefill([(first, inputs(batch=1, length=9)[0])])
        twin = runner.copy(first)
        assert twin.state_slot != first.state_slot
        logits = runner.decode([first, twin], [5, 5])
    assert relative_error(logits[1], logits[0]) < 1e-6


def test_recurrent_states_cannot_go_back_and_are_limited() -> None:
    ours = on_gpu("qwen3_next", options=RunnerOptions(8, 16, torch.float32, max_batch=1))
    cache = ours.new_cache()
    assert cache.is_linear == [True, False] and not cache.is_croppable
    ids = inputs(batch=1, length=9)
    with torch.no_grad():
        ours(ids, past_key_values=cache)
        with pytest.raises(KernelError, match="cannot go back"):
            cache.crop(-1)
        with pytest.raises(GenerationError, match="All 1 recurrent states are taken"):
            ours(ids)
    cache.crop(-9)
    assert (ours.runner.states.num_free, ours.runner.pool.num_free) == (1, 8)


def test_a_session_knows_how_long_the_cache_is() -> None:
    ours = on_gpu("qwen3_moe", options=RunnerOptions(num_blocks=2, block_size=16, kv_dtype=torch.float32))
    session = Session(ours, None)  # type: ignore[arg-type]
    assert session.context_length == 32
    with pytest.raises(GenerationError, match=r"context is 32.*larger --context"):
        session.answer(list(range(3, 43)), Sampling())


def test_what_lies_on_the_gpu_leaves_dram() -> None:
    def packed_bytes() -> int:
        gc.collect()
        return sum(each.nbytes for each in gc.get_objects() if type(each) is PackedTensor)

    before = packed_bytes()
    model = load_small("qwen3_moe")
    everything = packed_bytes() - before
    decoder = GpuDecoder(model, DEVICE, max_positions=64, dtype=torch.float32)
    experts = [part for each in decoder.routed if each is not None for part in (each.gate, each.up, each.down)]
    kept = sum(part.nbytes for part in experts if part is not None) + decoder.embedding.packed.nbytes
    assert packed_bytes() - before == kept < everything
    for layer in range(len(decoder.routed)):
        experts.clear()
        decoder.drop_routed(layer)
    for module in model.modules():
        if isinstance(module, RoutedExperts):
            module.packed = None  # as start_on_gpu does
    assert packed_bytes() - before == decoder.embedding.packed.nbytes


def test_what_a_gpu_cannot_do_is_refused() -> None:
    other = load_small("qwen3_next")
    other.model.layers[0].linear_attn.conv1d.bias = torch.nn.Parameter(torch.zeros(1))
    with pytest.raises(UnsupportedModelError, match=r"layer 0 .* not all known"):
        GpuDecoder(other, DEVICE, max_positions=512)
    ours = on_gpu("qwen3_moe")
    with pytest.raises(UnsupportedModelError, match="output_attentions"):
        ours(inputs(batch=1, length=4), output_attentions=True)


def test_the_use_of_experts_is_saved_and_the_next_cache_begins_with_it(tmp_path: Path) -> None:
    ours = on_gpu("qwen3_moe", slots=eager_cache)
    experts = [each.num_experts for each in ours.runner.decoder.routed]
    ours._moesaic_shape = ModelShape("qwen3_moe", tuple(experts))
    ids, cache = inputs(batch=1, length=8), ours.new_cache()
    with torch.no_grad():
        ours(ids[:, :3], past_key_values=cache)
        for index in range(3, 8):
            ours(ids[:, index : index + 1], past_key_values=cache)
    ours.save_expert_profile(tmp_path / "experts.json")
    profile = read_profile(tmp_path / "experts.json", ours._moesaic_shape)
    assert profile.num_tokens == 5
    assert profile.uses.sum(axis=1).tolist() == [5 * ours.runner.decoder.top_k] * len(experts)
    following = eager_cache(ours.runner.decoder).cache
    assert following is not None
    following.fill(profile.uses, profile.num_tokens)
    held = np.stack([following.held(layer) for layer in range(len(experts))])
    assert held.sum() == 5
    assert profile.uses[held].min() >= profile.uses[~held].max()
    ours._moesaic_shape = None
    with pytest.raises(ConfigError, match="no use of them"):
        ours.save_expert_profile(tmp_path / "experts.json")
