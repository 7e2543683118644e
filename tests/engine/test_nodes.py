"""Whole models whose experts are divided over pretended memory nodes, against the stock model and against one node."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from tests.engine.pairs import checkpoint_of, load_tiny, relative_error
from tests.tiny_models import tiny_inputs

from moesaic import kernels
from moesaic.modules import RoutedExperts
from moesaic.placement import load_plan


@pytest.fixture(autouse=True)
def system_nodes() -> Iterator[None]:
    yield
    kernels.set_num_nodes(0)


def _num_slices(model: torch.nn.Module) -> set[int]:
    return {len(module.packed.down.slices) for module in model.modules() if isinstance(module, RoutedExperts)}


@pytest.mark.parametrize("num_nodes", [2, 3])
@pytest.mark.parametrize("family", ["qwen3_moe", "deepseek_v3", "gpt_oss"])
def test_a_model_on_several_nodes(family: str, num_nodes: int) -> None:
    stock, whole = checkpoint_of(family)[0], load_tiny(family)
    kernels.set_num_nodes(num_nodes)
    ours = load_tiny(family)
    assert (_num_slices(whole), _num_slices(ours)) == ({1}, {num_nodes})
    ids = tiny_inputs(batch=2, length=12)
    with torch.no_grad():
        assert relative_error(ours(ids).logits, stock(ids).logits) < 1e-4
    arguments = {"max_new_tokens": 8, "do_sample": False}
    tokens = ours.generate(ids, **arguments)
    assert tokens.shape == (2, 20)
    assert torch.equal(tokens, whole.generate(ids, **arguments))


def test_requantised_experts_on_several_nodes(tmp_path: Path) -> None:
    """The blocks of a slice are those of the whole: only float32 sums are associated differently."""
    rules = "rules:\n  - match: {role: experts}\n    format: {gate: Q4_0, up: Q5_0, down: Q8_0}\n"
    (tmp_path / "plan.yaml").write_text(rules)
    plan = load_plan(str(tmp_path / "plan.yaml"))
    one, ids = load_tiny("qwen3_moe", plan), tiny_inputs(batch=2, length=12)
    kernels.set_num_nodes(2)
    two = load_tiny("qwen3_moe", plan)
    assert (_num_slices(one), _num_slices(two)) == ({1}, {2})
    experts = [next(m.packed for m in model.modules() if isinstance(m, RoutedExperts)) for model in (one, two)]
    for key in ("gate", "up", "down"):
        assert torch.equal(getattr(experts[0], key).dequantize(), getattr(experts[1], key).dequantize())
    with torch.no_grad():
        # Sums that differ in the last bit may round an activation of the next layer to the next step in 127.
        assert relative_error(two(ids).logits, one(ids).logits.double()) < 5e-3
