"""Any model, one sequence after the other: the logits of each alone, and nothing left behind by what fails."""

from __future__ import annotations

import pytest
import torch
from tests.engine.pairs import relative_error
from tests.tiny_models import make_tiny_model, tiny_inputs
from transformers import PreTrainedModel

from moesaic.engine.serving.solo_runner import SoloRunner
from moesaic.errors import GenerationError

TOLERANCE = 1e-5


@pytest.fixture(params=["qwen3_moe", "gpt_oss", "qwen3_next"])
def model(request: pytest.FixtureRequest) -> PreTrainedModel:
    """All layers keep everything; some a window; some a recurrent state."""
    return make_tiny_model(request.param)


def expected(model: PreTrainedModel, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model(ids[None], use_cache=False).logits[:, -1]


def test_pieces_and_steps_give_the_logits_of_the_whole(model: PreTrainedModel) -> None:
    runner = SoloRunner(model, 8, 16, max_batch=2)
    rows = [tiny_inputs(1, length, seed=length)[0] for length in (21, 9)]
    sequences = [runner.new_sequence() for _ in rows]
    work = runner.start_prefill([(sequences[0], rows[0][:12])])
    assert work.num_layers_left == 1
    work.advance(1)
    work = runner.start_prefill([(s, row[s.length : -1]) for s, row in zip(sequences, rows, strict=True)])
    work.advance(1)
    assert work.num_layers_left == 0
    for logits, row in zip(work.logits(), rows, strict=True):
        assert relative_error(logits, expected(model, row[:-1])[0]) < TOLERANCE
    logits = runner.decode(sequences, [int(row[-1]) for row in rows])
    assert logits.shape == (2, runner.vocab_size)
    for own, row in zip(logits, rows, strict=True):
        assert relative_error(own, expected(model, row)[0]) < TOLERANCE
    assert runner.pool.num_free == 8 - 2 - 1
    for sequence in sequences:
        runner.forget(sequence)
    assert runner.pool.num_free == 8
    assert runner.states is None or runner.states.num_free == 2


def test_what_fails_is_taken_back(model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    runner = SoloRunner(model, 8, 16, max_batch=2)
    rows = [tiny_inputs(1, 9, seed=seed)[0] for seed in range(2)]
    sequences = [runner.new_sequence() for _ in rows]
    runner.start_prefill([(s, row[:-1]) for s, row in zip(sequences, rows, strict=True)]).advance(1)
    forward = runner.forward

    def fail(sequence: object, ids: torch.Tensor) -> torch.Tensor:
        if sequence is sequences[1]:
            raise GenerationError("no")
        return forward(sequence, ids)  # type: ignore[arg-type]

    monkeypatch.setattr(runner, "forward", fail)
    with pytest.raises(GenerationError):
        runner.decode(sequences, [int(row[-1]) for row in rows])
    monkeypatch.undo()
    keeps_all = runner.states is None
    assert [sequence.length for sequence in sequences] == ([8, 8] if keeps_all else [0, 0])
    work = runner.start_prefill([(s, row[s.length :]) for s, row in zip(sequences, rows, strict=True)])
    work.advance(1)
    for logits, row in zip(work.logits(), rows, strict=True):
        assert relative_error(logits, expected(model, row)[0]) < TOLERANCE


def test_a_full_cache_is_refused_and_nothing_is_appended() -> None:
    runner = SoloRunner(make_tiny_model("qwen3_moe"), 2, 16)
    sequences = [runner.new_sequence() for _ in range(2)]
    with pytest.raises(GenerationError, match="cache is full"):
        runner.start_prefill([(sequences[0], torch.arange(16)), (sequences[1], torch.arange(17))])
    assert [sequence.length for sequence in sequences] == [0, 0]
    assert runner.pool.num_free == 2
