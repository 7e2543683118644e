"""What routers say, before attention, that they will probably ask the CPU for, against stock transformers."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from tests.engine.test_gpu import MODES, ON_GPU, OPTIONS, checkpoint_of, eager_cache, inputs, on_gpu

from moesaic.engine.gpu.foretold import Foretold, ForetoldCounts, foretold_counts
from moesaic.engine.gpu.runner import ModelRunner


def likeliest_of_stock(family: str, ids: torch.Tensor) -> torch.Tensor:
    """Experts that the last layer's router would choose for the last token if its attention added nothing."""
    stock = checkpoint_of(family)[0]
    with torch.no_grad():
        hidden = stock(ids, output_hidden_states=True).hidden_states[-2]  # what the last layer gets
        layer = stock.model.layers[-1]
        scores = layer.mlp.gate(layer.post_attention_layernorm(hidden[:, -1]))
    return next(part for part in scores if not part.is_floating_point())


@pytest.mark.parametrize("mode", MODES)
def test_routers_foretell_what_they_would_choose_without_attention(mode: str) -> None:
    family = "qwen3_moe"
    ours = on_gpu(family, mode == "graph")
    runner, box = ours.runner, ours.runner.server.mailbox
    rows = [inputs(1, 5 + index, seed=index)[0] for index in range(2)]
    sequences = [runner.new_sequence() for _ in rows]
    runner.prefill([(sequence, row[:-1]) for sequence, row in zip(sequences, rows, strict=True)])
    runner.decode(sequences, [int(row[-1]) for row in rows])
    # Of the last layer; nobody foretells the first. A graph has been launched once before, to load its kernels.
    assert int(box.foretold[0]) == int(box.requested[0]) >= 2
    expected = torch.cat([likeliest_of_stock(family, row[None]) for row in rows])
    assert box.likely[:2].tolist() == expected.tolist()


@pytest.mark.parametrize("mode", MODES)
def test_padding_and_experts_on_the_gpu_are_not_foretold(mode: str) -> None:
    ours = on_gpu("qwen3_moe", mode == "graph", slots=eager_cache)
    runner, box = ours.runner, ours.runner.server.mailbox
    rows = [inputs(1, 6, seed=index)[0] for index in range(3)]  # in steps of four
    sequences = [runner.new_sequence() for _ in rows]
    runner.prefill([(sequence, row[:-1]) for sequence, row in zip(sequences, rows, strict=True)])
    for _ in range(3):
        runner.decode(sequences, [int(row[-1]) for row in rows])
        table = runner.slots.table(1).tolist()
    told = box.likely[:4].tolist()
    assert told[3] == [-1] * runner.decoder.top_k
    found = [each for row in told[:3] for each in row]
    assert -1 in found and any(each >= 0 for each in found)
    assert all(table[each] < 0 for each in found if each >= 0)


def test_logits_are_the_same_without() -> None:
    ids = inputs(1, 7)
    logits = []
    for reads_ahead in (True, False):
        ours = on_gpu("deepseek_v3", ON_GPU)
        runner = ours.runner
        if not reads_ahead:
            options = type(OPTIONS)(64, 16, torch.float32, 4, ON_GPU, reads_ahead=False)
            ours.runner = runner = ModelRunner(runner.decoder, options)
        assert runner.server.reads_ahead == reads_ahead
        sequence = runner.new_sequence()
        runner.prefill([(sequence, ids[0, :-1])])
        logits.append(runner.decode([sequence], [int(ids[0, -1])]).clone())
        assert (int(runner.server.mailbox.foretold[0]) > 0) == reads_ahead
    assert torch.equal(*logits)


def test_counts_become_figures_of_a_layer() -> None:
    before = ForetoldCounts(10, 5, 4, 4)
    now = ForetoldCounts(10 + 12, 5 + 9, 4 + 6, 4 + 3)
    assert now.since(before, 6) == Foretold(2.0, 0.75, 1.0, 0.5)
    assert ForetoldCounts(12, 9).since(ForetoldCounts(), 6) == Foretold(2.0, 0.75, 0.0, 0.0)
    assert now.since(now, 6) is None and now.since(before, 0) is None
    assert foretold_counts(None, None) == ForetoldCounts()
