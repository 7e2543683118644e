"""Budgets of VRAM against arithmetic by hand, on tiny models and on the real dimensions of DeepSeek-V3."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable

import pytest
from tests.tiny_models import tiny_config
from transformers import PreTrainedModel

from moesaic.engine.presets import get_preset
from moesaic.engine.subjects import prepare_synthetic
from moesaic.errors import PlanDoesNotFitError
from moesaic.models import WeightMap
from moesaic.placement import Gpu, Hardware, Plan, VramBudget, load_plan, make_plan
from moesaic.placement.lots import VramLots, divide
from moesaic.placement.rules import parse_rules
from moesaic.placement.table import render_budget
from moesaic.placement.vram import NO_STEP, StepSizes
from moesaic.quant import get_format

GIB, MIB = 1024**3, 1024**2
DRIVER = 600 * MIB
Tiny = Callable[[str], tuple[PreTrainedModel, WeightMap]]


@pytest.fixture
def with_gpu(hardware: Hardware) -> Hardware:
    return dataclasses.replace(hardware, gpus=(Gpu("RTX", 24 * GIB, memory_free=23 * GIB),))


def budget_of(plan: Plan, hardware: Hardware) -> VramBudget:
    budget = plan.vram_budget(hardware)
    assert budget is not None
    return budget


def test_a_tiny_model_by_hand(tiny: Tiny, with_gpu: Hardware) -> None:
    """Qwen3-MoE: 3 layers, hidden 256, 4 heads and 2 KV heads of 64, 8 experts of 256, top 3; all in F32."""
    config = tiny_config("qwen3_moe")
    assert (config.num_experts, config.num_experts_per_tok, config.moe_intermediate_size) == (8, 3, 256)
    plan = make_plan(*tiny("qwen3_moe"), load_plan("hybrid"), with_gpu, vram=GIB, context=1000)
    attention = (256 + 128 + 128) * 256 + 256 * 256 + 2 * 64  # q, k, v, o, norms of heads
    weights = 4 * (3 * (attention + 16 * 256 + 2 * 256) + 256 + 512 * 256)  # 8 rows of the router are padded to 16
    expert = 4 * 3 * 256 * 256
    # q, k, v and what o reads: 256 + 128 + 128 + 256; experts: top_k * (gate, up, output)
    widest = max(768, 3 * (2 * 256 + 256))
    expanded = 2 * 256 * 256  # q's matrix in bfloat16
    working = 4 * (1000 * (4 * 256 + widest) + 2 * 32 * 512 + (16 + 32) * 64 * 2 * 64) + expanded + 128 * MIB
    assert budget_of(plan, with_gpu) == VramBudget(
        total=GIB,
        context=1000,
        weights=weights,
        absorbed=0,
        kv_cache=(16 + 32) * 64 * 3 * 2 * 128 * 2,  # 16 blocks of 64 positions, and one begun by each of 32 sequences
        working=working,
        driver=DRIVER,
        expert_bytes=expert,
        num_experts=24,
        fixed="its driver was not asked",
    )
    assert plan.pinned_bytes() == (1000 + 32) * (2 * 256 * 4 + 3 * 20)
    dram = 3 * 8 * expert + 4 * 512 * 256
    assert plan.nbytes_on("cpu") == dram
    assert plan.required_bytes() == dram + weights + 512 * MIB  # on their way, more than pinned buffers take later
    assert (plan.kv_bytes_on("cpu"), plan.kv_bytes_on("gpu")) == (0, 3 * 2 * 128 * 2)


def test_recurrent_states_by_hand(tiny: Tiny, with_gpu: Hardware) -> None:
    """Qwen3-Next: 3 layers of linear attention, 4 heads of keys and 8 of values of 32; a full one."""
    plan = make_plan(*tiny("qwen3_next"), load_plan("hybrid"), with_gpu)
    channels = 2 * 4 * 32 + 8 * 32
    states = 4 * 3 * (3 * channels + 8 * 32 * 32)
    assert (plan.state_bytes_on("gpu"), plan.state_bytes_on("cpu")) == (states, 0)
    budget = budget_of(plan, with_gpu)
    assert (budget.states, budget.kv_cache) == (8 * states, (64 + 32) * 64 * 2 * 2 * 64 * 2)
    assert budget.required == sum((budget.weights, budget.kv_cache, budget.states, budget.working, budget.driver))
    assert {plan.of(f"model.layers.0.linear_attn.{part}").implementation for part in ("conv1d", "norm")} == {"moesaic"}
    on_cpu = make_plan(*tiny("qwen3_next"), load_plan("cpu"), with_gpu)
    assert on_cpu.required_bytes() == on_cpu.nbytes + states + 4096 * 4 * 2 * 2 * 64 + 512 * MIB
    # q, k, v, z, beta, decay, what the convolution gives and what the rule gives
    assert 2 * channels + 2 * 8 + 8 * 32 <= plan.step.widest


def test_absorbed_matrices_are_bfloat16(tiny: Tiny, with_gpu: Hardware) -> None:
    """DeepSeek-V3: 3 layers, 4 heads, latent 256, rope 32, nope and value 64."""
    text = "strategy: hybrid\nrules:\n  - match: {role: attention}\n    format: Q4_K\n"
    plan = make_plan(*tiny("deepseek_v3"), parse_rules(text, "mine.yaml"), with_gpu)
    kv_b = plan.of("model.layers.1.self_attn.kv_b_proj")
    assert (kv_b.device, kv_b.formats, kv_b.nbytes) == ("gpu", {"weight": "BF16"}, 4 * (64 + 64) * 256 * 2)
    assert plan.of("model.layers.1.self_attn.o_proj").formats == {"weight": "Q4_K"}
    budget = budget_of(plan, with_gpu)
    assert budget.absorbed == 3 * kv_b.nbytes
    assert budget.weights + budget.absorbed == plan.nbytes_on("gpu")
    assert budget.kv_cache == (4096 + 2048) * 3 * (256 + 32) * 2
    on_cpu = make_plan(*tiny("deepseek_v3"), load_plan("cpu"), with_gpu)
    assert on_cpu.of("model.layers.1.self_attn.kv_b_proj").formats == {"weight": "F32"}


def test_a_tied_head_is_a_copy_of_the_embedding(tiny: Tiny, with_gpu: Hardware) -> None:
    plan = make_plan(*tiny("granitemoe"), load_plan("hybrid"), with_gpu)
    assert (plan.of("lm_head").device, plan.of("lm_head").nbytes) == ("gpu", 4 * 512 * 256)
    assert plan.of("model.embed_tokens").nbytes == 4 * 512 * 256


def test_experts_of_the_largest_layer_make_the_slot(tiny: Tiny, with_gpu: Hardware) -> None:
    text = (
        "strategy: hybrid\nrules:\n"
        '  - match: {name: "model.layers.1.*experts"}\n    format: {down: Q6_K}\n'
        '  - match: {name: "*.mlp.experts"}\n    format: Q4_K\n'
    )
    plan = make_plan(*tiny("qwen3_moe"), parse_rules(text, "mine.yaml"), with_gpu)
    mixed = 2 * 4 * 256 * 256 + 256 * 256 // 256 * 210
    assert budget_of(plan, with_gpu).expert_bytes == mixed


@pytest.mark.parametrize(
    ("free", "total"), [(23 * GIB, 23 * GIB - 23 * GIB // 20), (4 * GIB, 4 * GIB - 512 * MIB), (256 * MIB, 0)]
)
def test_what_is_free_less_a_margin(free: int, total: int, tiny: Tiny, hardware: Hardware) -> None:
    machine = dataclasses.replace(hardware, gpus=(Gpu("RTX", 24 * GIB, memory_free=free),))
    plan = make_plan(*tiny("mixtral"), load_plan("hybrid"), machine)
    assert budget_of(plan, machine).total == total


def test_what_is_left_is_divided_into_slots() -> None:
    budget = VramBudget(1000, 64, 100, 50, 30, 15, 5, expert_bytes=10, num_experts=1000)
    assert (budget.required, budget.shortfall, budget.left, budget.num_slots) == (200, 0, 800, 80)
    assert (budget.staging_experts, budget.cache_experts, budget.staging, budget.cache) == (40, 40, 400, 400)
    for total, staging, cache in ((199, 0, 0), (219, 0, 1), (220, 2, 0), (255, 2, 3), (360, 8, 8)):
        tight = dataclasses.replace(budget, total=total)
        assert (tight.staging_experts, tight.cache_experts) == (staging, cache)
    assert dataclasses.replace(budget, total=150).shortfall == 50
    for size, staging in ((10 * MIB, 36), (200 * MIB, 4)):
        large = dataclasses.replace(budget, total=100 * GIB, expert_bytes=size)
        assert large.staging_experts == staging
    assert dataclasses.replace(budget, num_experts=10).cache_experts == 10
    passing = dataclasses.replace(budget, upload_experts=4)
    assert (passing.uploads, passing.left, passing.staging_experts, passing.cache_experts) == (40, 760, 36, 40)
    full = dataclasses.replace(budget, expert_bytes=0, num_experts=0)
    assert (full.staging_experts, full.cache_experts) == (0, 0)


def test_both_memories_are_checked(tiny: Tiny, with_gpu: Hardware) -> None:
    model, weight_map = tiny("mixtral")
    plan = make_plan(model, weight_map, load_plan("hybrid"), with_gpu, vram=500 * MIB)
    with pytest.raises(
        PlanDoesNotFitError, match=r"of VRAM .* but the budget is 0\.49 GiB: 0\.\d\d GiB too little"
    ) as caught:
        plan.check_fits(with_gpu)
    assert "DRAM" not in str(caught.value)
    small = dataclasses.replace(with_gpu, dram_available=MIB)
    with pytest.raises(PlanDoesNotFitError, match=r"of DRAM .* pinned buffers .* too little.* And it needs .* of VRAM"):
        plan.check_fits(small)
    with pytest.raises(PlanDoesNotFitError, match=r"cache for 90000000 tokens .* shorter --context"):
        make_plan(model, weight_map, load_plan("hybrid"), with_gpu).check_fits(with_gpu, 90_000_000)
    everything = make_plan(model, weight_map, load_plan("gpu"), with_gpu, vram=MIB)
    with pytest.raises(PlanDoesNotFitError, match="or the plan 'hybrid'"):
        everything.check_fits(with_gpu)
    greedy = make_plan(model, weight_map, load_plan("hybrid"), with_gpu, vram=30 * GIB)
    with pytest.raises(
        PlanDoesNotFitError, match=r"--vram is 30\.00 GiB, but 23\.00 GiB of RTX's 24\.00 GiB are free: 7\.00"
    ):
        greedy.check_fits(with_gpu)
    make_plan(model, weight_map, load_plan("hybrid"), with_gpu).check_fits(with_gpu)


def test_weights_of_the_gpu_pass_through_dram(tiny: Tiny, with_gpu: Hardware) -> None:
    """A card may have more memory than the computer: all weights are in DRAM until they are loaded."""
    made = make_plan(*tiny("mixtral"), load_plan("gpu"), with_gpu)
    small, large = (
        dataclasses.replace(
            made, entries=tuple(dataclasses.replace(e, nbytes=e.nbytes * of // 1000) for e in made.entries)
        )
        for of in (1, 1_000_000)
    )
    assert small.required_bytes() == small.nbytes_on("cpu") + small.pinned_bytes() + 512 * MIB
    assert large.required_bytes() == large.nbytes + 512 * MIB
    large.check_fits(dataclasses.replace(with_gpu, dram_available=large.required_bytes()))
    message = r"of DRAM while it is loaded \(weights .* those of the GPU on their way there .* too little\. Use a file"
    with pytest.raises(PlanDoesNotFitError, match=message):
        large.check_fits(dataclasses.replace(with_gpu, dram_available=large.required_bytes() - 1))


def test_only_what_lies_in_dram_is_shared_by_nodes(tiny: Tiny, with_gpu: Hardware) -> None:
    plan = make_plan(*tiny("mixtral"), load_plan("hybrid"), with_gpu)
    heavy = tuple(
        dataclasses.replace(entry, nbytes=500 * GIB) if entry.module == "lm_head" else entry for entry in plan.entries
    )
    nodes = tuple(dataclasses.replace(with_gpu.numa_nodes[0], node=node, cpus=(node,)) for node in range(2))
    dataclasses.replace(plan, entries=heavy).check_fits_nodes(dataclasses.replace(with_gpu, numa_nodes=nodes))


def q4_k(*shape: int) -> int:
    """Bytes of a matrix in Q4_K: 144 for 256 weights; all of these have rows in multiples of 16."""
    count = 1
    for size in shape:
        count *= size
    return count // 256 * 144


@pytest.fixture(scope="module")
def deepseek() -> tuple[Plan, Hardware]:
    """DeepSeek-V3 in Q4_K, all 61 layers, with 24 GiB of an H200 beside 600 GiB of DRAM."""
    machine = Hardware("Xeon", 16, 16, None, 640 * GIB, 600 * GIB, False, ())
    machine = dataclasses.replace(machine, gpus=(Gpu("H200", 141 * GIB, memory_free=140 * GIB),))
    q4 = get_format("Q4_K")
    return prepare_synthetic("deepseek-v3", q4, None, "hybrid", vram=24 * GIB, hardware=machine).plan, machine


def test_deepseek_v3_on_24_gib(deepseek: tuple[Plan, Hardware]) -> None:
    plan, machine = deepseek
    c = get_preset("deepseek-v3").values
    hidden, heads, latent, rope = c["hidden_size"], c["num_attention_heads"], c["kv_lora_rank"], c["qk_rope_head_dim"]
    nope, value, low, vocab = c["qk_nope_head_dim"], c["v_head_dim"], c["q_lora_rank"], c["vocab_size"]
    layers, dense, inner, experts = 61, 3, c["moe_intermediate_size"], 256
    query = heads * (nope + rope)
    attention = q4_k(low, hidden) + q4_k(query, low) + q4_k(latent + rope, hidden) + q4_k(hidden, heads * value)
    vectors = 4 * (low + latent + 2 * hidden)
    moe = 4 * (experts * hidden + experts) + 3 * q4_k(inner, hidden)  # router with its bias, one shared expert
    mlp = 3 * q4_k(c["intermediate_size"], hidden)
    head = q4_k(vocab, hidden) + 4 * hidden
    absorbed = 2 * layers * heads * (nope + value) * latent
    expert = 3 * q4_k(inner, hidden)
    at_once = 32  # heads that attend together: 4096 tokens x 32 x 512 floats are 256 MiB
    attending = low + query + (latent + rope) + heads * value + at_once * (2 * latent + latent // 2) + heads * rope
    routed = c["num_experts_per_tok"] * (2 * inner + hidden) + 2 * inner
    widest = max(attending, routed)
    expanded = 2 * c["intermediate_size"] * hidden  # a matrix of a dense layer in bfloat16
    working = 4 * (4096 * (4 * hidden + widest) + 2 * 32 * vocab + 6144 * 2 * rope) + expanded + 128 * MIB

    budget = budget_of(plan, machine)
    assert budget.weights == layers * (attention + vectors) + (layers - dense) * moe + dense * mlp + head
    assert budget.absorbed == absorbed == 2046820352  # 1.9 GiB
    assert budget.kv_cache == (64 + 32) * 64 * layers * (latent + rope) * 2
    assert budget.working == working
    assert (budget.expert_bytes, budget.num_experts) == (expert, 58 * 256) == (24772608, 14848)
    left = 24 * GIB - budget.weights - absorbed - budget.kv_cache - working - DRIVER
    assert budget.upload_experts == left // expert // 32 == 14
    assert budget.cache_experts == left // expert - 16 - budget.upload_experts
    assert 400 < budget.cache_experts < 520
    assert plan.nbytes_on("cpu") == 58 * 256 * expert + q4_k(vocab, hidden)
    assert plan.bytes_per_token_on("cpu") == 58 * 8 * expert + q4_k(vocab, hidden) // vocab
    plan.check_fits(machine)
    assert plan.warnings == ()


def test_deepseek_v3_in_words_and_as_json(deepseek: tuple[Plan, Hardware]) -> None:
    plan, machine = deepseek
    text = render_budget(budget_of(plan, machine))
    lines = {line[:20].strip(): line[20:].split() for line in text.splitlines()[1:]}
    assert text.startswith("VRAM: 24.0 GiB to use\n")
    assert lines["absorbed kv_b_proj"][:2] == ["1.9", "GiB"]
    assert lines["KV cache"][:4] == ["411.8", "MiB", "4096", "tokens,"]
    assert lines["driver"] == ["600.0", "MiB"]
    cache = budget_of(plan, machine).cache_experts
    assert " ".join(lines["expert cache"]) == (
        f"{cache * 24772608 / GIB:.1f} GiB {cache} experts of 23.6 MiB, {cache / 14848:.1%} of all in DRAM"
    )
    table = plan.table()
    assert "total: 343.0 GiB of weights in DRAM, 10.7 GiB read per token, cache 0 B" in table
    assert "10.2 GiB of weights in VRAM, 10.2 GiB read per token, cache 68.6 KiB per token" in table
    data = json.loads(plan.to_json())
    assert data["vram"]["kv_bytes_per_position"] == 61 * 576 * 2
    assert data["dram"]["pinned_bytes"] == (8192 + 32) * (2 * 7168 * 4 + 8 * 20)
    assert data["nbytes"] == data["dram"]["nbytes"] + data["vram"]["nbytes"]


def test_deepseek_v3_on_less(deepseek: tuple[Plan, Hardware]) -> None:
    plan, machine = deepseek
    required = budget_of(plan, machine).required
    q4 = get_format("Q4_K")
    for vram, strategy in ((required, "hybrid"), (required - 1, "cpu")):
        made = prepare_synthetic("deepseek-v3", q4, None, "auto", vram=vram, hardware=machine).plan
        assert made.strategy == strategy
    assert dataclasses.replace(plan, vram=required - 1).vram_budget(machine).shortfall == 1  # type: ignore[union-attr]


def test_what_the_experts_can_lend(deepseek: tuple[Plan, Hardware]) -> None:
    plan, machine = deepseek
    fixed = budget_of(plan, machine)
    assert (fixed.lots, fixed.fixed) == (None, "its driver was not asked")
    assert render_budget(fixed).endswith("nothing of it can be lent: its driver was not asked")
    able = dataclasses.replace(machine, gpus=(dataclasses.replace(machine.gpus[0], fixed_memory=""),))
    budget = budget_of(plan, able)
    lots = budget.lots
    assert lots is not None
    assert dataclasses.replace(budget, lots=None, fixed=fixed.fixed, streamed=fixed.streamed) == fixed
    staging = 52 * 24772608  # of 54 that 1.25 GiB hold, as many as make four equal groups
    assert (budget.staging_experts, fixed.staging_experts) == (52, 16)
    lot, block = 16 * MIB, 64 * 61 * 576 * 2
    positions = get_preset("deepseek-v3").values["max_position_embeddings"]
    could = ((fixed.kv_cache + fixed.left) // lot - 2 - -(-staging // lot)) * lot // block * 64
    assert lots.rotary_positions == min(positions, could) > 140_000
    angles = (lots.rotary_positions - 6144) * 2 * 64 * 4
    assert lots.total == (fixed.kv_cache + fixed.left - angles) // lot
    assert (lots.keys, lots.staging, lots.least) == (26, -(-staging // lot), 2)
    assert lots.num_blocks == (lots.total - lots.staging - 2 - lots.long) * lot // block
    assert lots.first_slots == (lots.total - 26) * lot // 24772608
    assert (lots.chunk, lots.long_chunk) == (4096, 8192) and lots.long * lot >= plan.step.chunk_bytes(4096) > GIB
    assert lots.most_keys + lots.staging + lots.least <= lots.total
    text = render_budget(budget)
    assert f"room for {(lots.num_blocks - 32) * 64} tokens in all, and for 52 experts on their way in prefill" in text
    sizes = budget.weights + budget.absorbed + budget.working + budget.driver + budget.uploads + angles + lots.nbytes
    assert 0 <= budget.total - sizes < lot
    assert json.loads(json.dumps(dataclasses.asdict(budget)))["lots"]["num_blocks"] == lots.num_blocks


def test_nothing_is_lent_where_nothing_is_cached(tiny: Tiny, with_gpu: Hardware) -> None:
    able = dataclasses.replace(with_gpu, gpus=(dataclasses.replace(with_gpu.gpus[0], fixed_memory=""),))
    for name in ("gpu", "layers"):
        budget = budget_of(make_plan(*tiny("mixtral"), load_plan(name), able, vram=GIB), able)
        assert (budget.lots, budget.fixed) == (None, "")
    tight = budget_of(make_plan(*tiny("mixtral"), load_plan("hybrid"), able, vram=GIB), able)
    least = dataclasses.replace(tight, total=tight.required + 2 * tight.expert_bytes, lots=None)
    assert divide(least, NO_STEP, 64, 32) is None  # no room for two lots
    assert divide(dataclasses.replace(least, total=0), NO_STEP, 64, 32) is None


@pytest.mark.parametrize("lot", [1000, 4096, 65536])
def test_lots_are_never_more_than_there_is(lot: int) -> None:
    for left in range(20_000, 2_000_000, 97_531):
        required = VramBudget(0, 640, 100, 0, 42 * 3000, 15, 5, expert_bytes=2500, num_experts=300)
        budget = dataclasses.replace(required, total=required.required + left)
        lots = divide(budget, StepSizes(rotary=2, longest=4000), 64, 32, lot)
        if lots is None:
            continue
        angles = (lots.rotary_positions - 42 * 64) * 8
        assert lots.nbytes + angles <= budget.kv_cache + left
        assert lots.keys + lots.staging + lots.least <= lots.total
        assert lots.most_keys + lots.staging + lots.least <= max(lots.total, lots.keys + lots.staging + lots.least)
        assert lots.num_blocks >= lots.first_blocks == 42 and lots.num_blocks * 3000 <= lots.most_keys * lot
        assert lots.staging * lot >= budget.staging and lots.slots(lots.least) >= 1
        assert lots.num_blocks <= max(42, 32 * 64) and lots.rotary_positions <= 4000


def test_latents_of_a_short_context(deepseek: tuple[Plan, Hardware]) -> None:
    """Fewer tokens attend with more heads at once: the queries on latents of 512 tokens are those of 128 heads."""
    step = deepseek[0].step
    assert (step.latent_heads, step.latent_dim) == (128, 512)
    without = dataclasses.replace(step, latent_heads=0)
    queries_and_sums, copy = 2 * 4 * 512 * 128 * 512, 2 * 512 * 128 * 512
    short = step.working_bytes(512) - 4 * 512 * (4 * step.hidden_size + step.attention)
    rest = without.working_bytes(512) - 4 * 512 * (4 * step.hidden_size + max(step.widest, step.attention))
    assert short - rest == queries_and_sums + copy


def test_long_chunks_where_experts_can_lend_the_memory() -> None:
    step = StepSizes(hidden_size=10, widest=60, longest=100_000)
    assert step.chunk_bytes(8192) - step.chunk_bytes(4096) == 4096 * 100 * 4
    assert step.working_bytes(4096) - step.working_bytes(2048) == step.chunk_bytes(2048)
    required = VramBudget(0, 4096, 100, 0, 96 * 3000, 15, 5, expert_bytes=2500, num_experts=30_000)

    def lots_with(left: int, context: int = 4096) -> VramLots:
        budget = dataclasses.replace(required, context=context, total=required.required + left)
        lots = divide(budget, step, 64, 32, 4096, 8192)
        assert lots is not None
        return lots

    extra = -(-4096 * 400 // 4096)
    lots = lots_with(30_000_000)
    assert (lots.chunk, lots.long_chunk, lots.long) == (4096, 8192, extra)
    assert lots.most_keys + lots.staging + lots.least + lots.long <= lots.total  # there for the longest prompts too
    short = lots_with(30_000_000, context=576)  # a small context at first: less is set aside
    assert (short.chunk, short.long_chunk) == (576, 8192) and short.long > lots.long
    tight = lots_with(8_000_000)
    assert (tight.chunk, tight.long_chunk, tight.long) == (4096, 0, 0)
    budget = dataclasses.replace(required, total=required.required + 30_000_000)
    assert (budget.max_chunk, dataclasses.replace(budget, lots=lots).max_chunk) == (4096, 8192)
    assert dataclasses.replace(budget, lots=tight).max_chunk == 4096
