"""A runner without a model: what follows a text is a hash of it, read back from the blocks that hold it.

So a block that is shared wrongly, given back too early or filled twice changes the answer. Times are simulated.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from moesaic.engine.serving.core import Engine, EngineOptions
from moesaic.engine.serving.defaults import GenerationDefaults
from moesaic.engine.serving.outputs import Completion
from moesaic.engine.serving.params import SamplingParams
from moesaic.kernels import ops
from moesaic.kvcache.paged import BlockPool, PagedSequence
from moesaic.kvcache.states import StatePool

VOCAB_SIZE = 97
GREEDY = SamplingParams(max_tokens=12, temperature=0)


def next_token(ids: Sequence[int]) -> int:
    digest = hashlib.blake2b(np.asarray(ids, np.int64).tobytes(), digest_size=8).digest()
    return int.from_bytes(digest, "little") % VOCAB_SIZE


def answer_to(ids: Sequence[int], count: int) -> list[int]:
    """The oracle: what a runner has to say, without blocks."""
    ids, before = list(ids), len(ids)
    for _ in range(count):
        ids.append(next_token(ids))
    return ids[before:]


@dataclass
class FakeRunner:
    num_blocks: int = 64
    block_size: int = 4
    num_layers: int = 4
    max_batch: int = 64
    max_chunk: int = 64
    shares_prefixes: bool = True
    shared_positions: int | None = None
    recurrent: bool = False
    decode_seconds: float = 0.05
    layer_seconds: Callable[[int, int], float] = lambda tokens, position: 0.01 + 1e-4 * tokens
    now: float = 0.0
    failures: list[Exception] = field(default_factory=list)
    """Raised by the next steps of decoding, one each."""
    prefilled: int = 0
    """Tokens that went through all layers."""

    def __post_init__(self) -> None:
        self.pool = BlockPool(self.num_blocks, self.block_size)
        self.states = StatePool(self.max_batch) if self.recurrent else None
        self.vocab_size = VOCAB_SIZE
        self.on_launch: Callable[[], None] = lambda: None
        self.memory = np.full(self.num_blocks * self.block_size, -1, np.int64)
        self.closed = False
        if self.recurrent:
            self.shares_prefixes = False

    def clock(self) -> float:
        return self.now

    def new_sequence(self) -> PagedSequence:
        return PagedSequence(self.pool, self.states)

    def write(self, slots: torch.Tensor, ids: Any) -> None:
        self.memory[slots.numpy()] = ids

    def read(self, sequence: PagedSequence) -> np.ndarray:
        offsets = np.arange(self.block_size)
        slots = (np.array(sequence.blocks, np.int64)[:, None] * self.block_size + offsets).reshape(-1)
        return self.memory[slots[: sequence.length]]

    def logits_of(self, sequences: Sequence[PagedSequence]) -> torch.Tensor:
        logits = torch.zeros(len(sequences), VOCAB_SIZE)
        for row, sequence in enumerate(sequences):
            logits[row, next_token(self.read(sequence))] = 1
        return logits

    def decode(self, sequences: Sequence[PagedSequence], token_ids: Sequence[int]) -> torch.Tensor:
        assert 0 < len(sequences) <= self.max_batch
        assert len({id(sequence) for sequence in sequences}) == len(sequences)
        self.on_launch()
        self.now += self.decode_seconds
        if self.failures:
            if self.recurrent:
                for sequence in sequences:
                    sequence.free()
            raise self.failures.pop(0)
        for sequence, token in zip(sequences, token_ids, strict=True):
            self.write(sequence.append(1), token)
        return self.logits_of(sequences)

    def decode_likeliest(self, sequences: Sequence[PagedSequence], token_ids: Sequence[int]) -> list[int]:
        return ops.likeliest(self.decode(sequences, token_ids))

    def start_prefill(self, parts: Sequence[tuple[PagedSequence, torch.Tensor]]) -> FakePrefill:
        assert 0 < sum(len(ids) for _, ids in parts) <= self.max_chunk
        return FakePrefill(self, list(parts))

    def prepare(self, num_sequences: int) -> bool:
        return False

    def expert_uses(self) -> tuple[int, int]:
        return 0, 0

    def forget(self, sequence: PagedSequence) -> None:
        sequence.free()

    def close(self) -> None:
        self.closed = True


class FakePrefill:
    """Writes only when all layers are done."""

    def __init__(self, runner: FakeRunner, parts: list[tuple[PagedSequence, torch.Tensor]]) -> None:
        self.runner, self.parts = runner, parts
        self.before = [sequence.length for sequence, _ in parts]
        self.slots = [sequence.append(len(ids)) for sequence, ids in parts]
        self.num_layers_left = runner.num_layers

    def advance(self, num_layers: int) -> None:
        tokens = sum(len(ids) for _, ids in self.parts)
        for _ in range(min(num_layers, self.num_layers_left)):
            self.runner.now += self.runner.layer_seconds(tokens, max(self.before))
            self.num_layers_left -= 1
        if self.num_layers_left == 0:
            self.runner.prefilled += tokens
            for slots, (_, ids) in zip(self.slots, self.parts, strict=True):
                self.runner.write(slots, ids.numpy())

    def logits(self) -> torch.Tensor:
        assert self.num_layers_left == 0
        return self.runner.logits_of([sequence for sequence, _ in self.parts])

    def abandon(self) -> None:
        for (sequence, _), length in zip(self.parts, self.before, strict=True):
            sequence.free() if sequence.is_recurrent else sequence.undo(length)


class Driver:
    """An engine on a fake runner, and what has come of its requests."""

    def __init__(self, runner: FakeRunner, stop_ids: frozenset[int] = frozenset(), **options: Any) -> None:
        self.runner = runner
        self.engine = Engine(
            runner,
            None,
            GenerationDefaults({"do_sample": False}, stop_ids),
            options=EngineOptions(**options),
            clock=runner.clock,
        )
        self.answers: dict[str, dict[int, Completion]] = {}
        self.times: dict[str, list[float]] = {}
        self.steps = 0

    def add(self, name: str, ids: Sequence[int], params: SamplingParams = GREEDY) -> None:
        self.engine.add(name, ids, params)
        self.answers[name] = {index: Completion(index) for index in range(params.n)}
        self.times[name] = []

    def step(self) -> None:
        self.steps += 1
        for name, chunk in self.engine.step():
            self.answers[name][chunk.index].add(chunk)
            self.times[name].append(self.runner.now)

    def run(self, limit: int = 20000) -> None:
        """Until nothing is left to do."""
        for _ in range(limit):
            if not self.engine.has_work:
                return
            self.step()
        raise AssertionError(f"not done after {limit} steps: {self.engine.stats()}")

    def tokens(self, name: str, index: int = 0) -> list[int]:
        return self.answers[name][index].token_ids

    def check_nothing_is_held(self) -> None:
        """All blocks are free, or kept for their contents only."""
        stats = self.engine.stats()
        assert (stats.running, stats.waiting) == (0, 0)
        assert stats.blocks_free + stats.blocks_cached == stats.blocks
        if self.runner.states is not None:
            assert self.runner.states.num_free == self.runner.states.num_slots


def prompt(number: int, length: int) -> list[int]:
    """A prompt like no other one."""
    return np.random.default_rng(number).integers(0, VOCAB_SIZE, length).tolist()
