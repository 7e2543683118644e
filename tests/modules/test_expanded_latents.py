"""Latent attention with expanded keys and values: the same numbers as absorbed, in float64."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from tests.kernels.triton.paged_oracle import DEVICE, Case, error_of, latent_attended

pytest.importorskip("triton")

from moesaic.kvcache.step_input import StepInput
from moesaic.modules.gpu import expanded_latents
from moesaic.modules.gpu.expanded_latents import attend_expanded, expansion_pays

HEADS, NOPE, LATENT, ROPE, VALUE = 3, 24, 40, 16, 20


@dataclass
class Chunk:
    """Sequences whose latents lie in a pool, and queries of their new tokens."""

    case: Case

    def __post_init__(self) -> None:
        case = self.case
        self.query, self.q_rope = case.random(case.num_tokens, HEADS, NOPE), case.random(case.num_tokens, HEADS, ROPE)
        self.k_b, self.v_b = case.random(HEADS, NOPE, LATENT), case.random(HEADS, LATENT, VALUE)
        self.pool = case.pool(None, LATENT + ROPE)
        tables, lens, start = case.step
        self.step = StepInput(torch.zeros(case.num_tokens), torch.zeros(0), tables, lens, start, torch.zeros(0))

    def expanded(self) -> torch.Tensor:
        return attend_expanded(
            self.query,
            self.q_rope,
            self.k_b,
            self.v_b,
            self.pool,
            self.step,
            scale=0.1,
            max_query_len=self.case.max_query_len,
        )

    def absorbed(self) -> torch.Tensor:
        """float64."""
        q_latent = torch.einsum("thn,hnl->thl", self.query.double(), self.k_b.double())
        sums = latent_attended(self.case, q_latent, self.q_rope, self.pool, 0.1)
        return torch.einsum("thl,hlv->thv", sums, self.v_b.double())


@pytest.mark.parametrize("at_once", [1, 1 << 26])
def test_expanded_and_absorbed_are_the_same(at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(expanded_latents, "_EXPANDED_VALUES", at_once)
    chunk = Chunk(Case([(30, 13), (5, 5), (44, 2)], 16))
    out = chunk.expanded()
    assert out.shape == (20, HEADS, VALUE) and out.is_contiguous()
    assert error_of(out, chunk.absorbed()) < 3e-6


def test_what_lies_behind_a_sequence_is_not_read() -> None:
    chunk = Chunk(Case([(30, 13), (5, 5)], 16))
    expected = chunk.absorbed()
    used = {
        int(block)
        for row, (length, _) in enumerate(chunk.case.sequences)
        for block in chunk.case.block_tables[row, : -(-length // 16)]
    }
    for block in set(range(chunk.case.num_blocks)) - used:
        chunk.pool[block] = torch.nan
    chunk.pool[int(chunk.case.block_tables[1, 0]), 5:] = torch.nan
    for row, (length, _) in enumerate(chunk.case.sequences):
        chunk.case.block_tables[row, -(-length // 16) :] = 1 << 30  # numbers of no block
    assert error_of(chunk.expanded(), expected) < 3e-6


def test_it_pays_for_many_new_tokens_of_sequences_of_a_length() -> None:
    def step(num_seqs: int, max_blocks: int, tokens: int) -> StepInput:
        tables = torch.zeros(num_seqs, max_blocks, dtype=torch.int32, device=DEVICE)
        nothing = torch.zeros(0)
        return StepInput(torch.zeros(tokens), nothing, tables, nothing, nothing, nothing)

    assert expansion_pays(step(1, 1000, 512), 512, 64)  # behind a long context too
    assert not expansion_pays(step(1, 8, 511), 511, 64)
    assert expansion_pays(step(4, 32, 2048), 512, 64)
    assert not expansion_pays(step(8, 512, 4608), 4096, 64)  # one long and seven short ones
