"""A step of one sequence, which goes through the layers by a team that stays together, has the bits of larger steps.

Those go block by block, with products, experts and attention that tests of their own compare with oracles.
"""

from __future__ import annotations

import pytest
import torch
from tests.engine.pairs import load_tiny
from tests.tiny_models import ALL_FAMILIES, tiny_inputs

from moesaic import kernels
from moesaic.engine.serving.paged_runner import PagedRunner, paged_runner_for
from moesaic.errors import KernelError
from moesaic.modules.paged_decoder import PagedDecoder
from moesaic.placement import Rules
from moesaic.placement.rules import parse_rules

MIXED = """rules:
  - match: {role: experts}
    format: {gate: Q4_K, up: Q5_K, down: Q8_0}
  - match: {role: attention}
    format: Q8_0
  - match: {name: "*"}
    format: Q6_K
"""


@pytest.fixture(params=[1, 2, 5])
def threads(request):
    before = kernels.num_threads()
    kernels.set_num_threads(request.param)
    yield request.param
    kernels.set_num_threads(before)


def runner_of(family: str, plan: str | Rules):
    runner = paged_runner_for(load_tiny(family, plan), 40, block_size=16)
    assert runner is not None
    return runner


def prefilled(runner, rows, counts):
    sequences = [runner.new_sequence() for _ in counts]
    for sequence, row, count in zip(sequences, rows, counts, strict=True):
        work = runner.start_prefill([(sequence, row[:count])])
        work.advance(runner.num_layers)
    return sequences


def alone_and_together(runner, rows, counts, steps=2):
    """Logits of the first sequence, step by step, of steps of its own and of steps with the others."""
    found = []
    for count in (1, len(counts)):
        sequences = prefilled(runner, rows, counts)
        found.append([])
        for step in range(steps):
            tokens = [int(row[n + step]) for row, n in zip(rows[:count], counts[:count], strict=True)]
            found[-1].append(runner.decode(sequences[:count], tokens)[0].clone())
        for sequence in sequences:
            runner.forget(sequence)
    return found


@pytest.mark.parametrize("family", ALL_FAMILIES)
def test_every_family(family, threads):
    runner = runner_of(family, "auto")
    alone, together = alone_and_together(runner, tiny_inputs(3, 40, seed=11), [19, 4, 30])
    for one, other in zip(alone, together, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("family", ["qwen3_moe", "qwen2_moe", "gpt_oss", "deepseek_v3", "minimax_m2"])
def test_mixed_formats(family, threads):
    """Quantised beside float weights, experts of several formats, shared experts with and without a gate."""
    runner = runner_of(family, parse_rules(MIXED, "mixed"))
    alone, together = alone_and_together(runner, tiny_inputs(3, 40, seed=12), [19, 4, 30])
    for one, other in zip(alone, together, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss"])
def test_long_sequences_are_cut_into_tasks(family, threads):
    """Over 1,024 keys are several segments of each head, which threads share; gpt-oss has windows and sinks."""
    runner = PagedRunner(PagedDecoder(load_tiny(family), 1600), 100, block_size=16)
    alone, together = alone_and_together(runner, tiny_inputs(2, 1160, seed=13) % 100, [1100, 5], steps=3)
    for one, other in zip(alone, together, strict=True):
        assert torch.equal(one, other)


def test_a_step_after_one_that_failed(threads):
    """Nothing of a step that was refused is left in what threads share."""
    runner = runner_of("qwen3_moe", "auto")
    rows = tiny_inputs(1, 40, seed=14)
    (sequence,) = prefilled(runner, rows, [20])
    expected = runner.decode([sequence], [3]).clone()
    sequence.truncate(20)
    with pytest.raises(KernelError, match="do not go together"):
        runner.decode([sequence], [10**7])
    assert torch.equal(runner.decode([sequence], [3]), expected)
