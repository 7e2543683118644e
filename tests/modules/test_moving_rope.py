"""Angles that change with the length, against what the model library's modules give for a lone text."""

from __future__ import annotations

import copy
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tests.tiny_models import make_tiny_model

from moesaic.errors import UnsupportedModelError
from moesaic.modules.moving_rope import FixedAngles, MovingAngles, angles_for
from moesaic.modules.rotary import longest_context, position_angles

DYNAMIC: dict[str, Any] = {
    "max_position_embeddings": 40,
    "rope_parameters": {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 8.0},
}
LONGROPE: dict[str, Any] = {
    "rope_parameters": {
        "rope_type": "longrope",
        "rope_theta": 10000.0,
        "original_max_position_embeddings": 40,
        "short_factor": [1.0 + i / 32 for i in range(32)],
        "long_factor": [2.0 + i / 4 for i in range(32)],
    }
}
KINDS = {"dynamic": ("qwen3_moe", DYNAMIC), "longrope": ("qwen3_moe", LONGROPE), "MLA": ("deepseek_v2", DYNAMIC)}


def rotary_of(kind: str) -> Any:
    family, overrides = copy.deepcopy(KINDS[kind])  # configurations write into it
    return make_tiny_model(family, **overrides).get_decoder().rotary_emb


def lone(rotary: Any, prompt: int, total: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Of a text whose prompt goes through a fresh module in one forward, and every other token in one of its own."""
    rotary, rows = copy.deepcopy(rotary), []
    for positions in (torch.arange(prompt), *torch.arange(prompt, total).split(1)):
        angles = rotary(torch.zeros(1, 1), positions.unsqueeze(0))
        rows.append((angles.real, angles.imag) if isinstance(angles, torch.Tensor) else angles)
    pairs = rotary.inv_freq.shape[0]
    cos, sin = (torch.cat([row[index][0, :, :pairs] for row in rows]) for index in range(2))
    return cos, sin


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("prompt", [1, 39, 40, 41, 100, 192])
def test_a_lone_text(kind: str, prompt: int) -> None:
    rotary = rotary_of(kind)
    angles, total = angles_for(rotary, 300), 210
    assert isinstance(angles, MovingAngles)
    assert angles.shared_positions == 40
    expected = lone(rotary, prompt, total)
    whole = angles(torch.arange(total), torch.tensor([0, total], dtype=torch.int32), [prompt])
    for ours, stock in zip(whole, expected, strict=True):
        assert (ours - stock).abs().max() < 2e-5
    if prompt > 41:  # otherwise the check above would say nothing
        assert (expected[0][:prompt] - angles._cos[:prompt]).abs().max() > 0.1


@pytest.mark.parametrize("kind", KINDS)
def test_cuts_and_neighbours_change_no_bit(kind: str) -> None:
    angles = angles_for(rotary_of(kind), 300)
    starts = torch.tensor([0, 130], dtype=torch.int32)
    whole = angles(torch.arange(130), starts, [100])
    for first, end in ((0, 1), (3, 70), (63, 129), (99, 101), (100, 130)):
        positions = torch.cat([torch.arange(50, 57), torch.arange(first, end), torch.arange(200, 203)])
        cuts = torch.tensor([0, 7, 7 + end - first, len(positions)], dtype=torch.int32)
        part = angles(positions, cuts, [60, 100, 1])
        for ours, expected in zip(part, whole, strict=True):
            assert torch.equal(ours[7 : 7 + end - first], expected[first:end])


def test_most_models_have_angles_that_do_not_move() -> None:
    rotary = make_tiny_model("deepseek_v3").get_decoder().rotary_emb
    angles = angles_for(rotary, 50)
    assert isinstance(angles, FixedAngles)
    assert angles.shared_positions is None
    positions = torch.tensor([3, 49, 0])
    for ours, table in zip(
        angles(positions, torch.tensor([0, 3], dtype=torch.int32), [3]), position_angles(rotary, 50), strict=True
    ):
        assert torch.equal(ours, table[positions])


def test_a_module_with_other_angles_is_refused() -> None:
    rotary = rotary_of("dynamic")
    rotary.attention_scaling = 1.0
    rotary.forward = lambda x, positions: (torch.zeros(1, positions.shape[1], 32),) * 2
    with pytest.raises(UnsupportedModelError, match="other angles"):
        angles_for(rotary, 300)


def test_a_gpu_has_one_table_for_all() -> None:
    with pytest.raises(UnsupportedModelError, match="does not run on a GPU"):
        position_angles(rotary_of("longrope"), 10)


def test_context_of_a_model() -> None:
    configs = [make_tiny_model("qwen3_moe", **overrides).config for overrides in copy.deepcopy((DYNAMIC, LONGROPE, {}))]
    assert [longest_context(config) for config in configs] == [320, 512, 512]
    assert longest_context(SimpleNamespace(max_position_embeddings=None)) is None
    assert longest_context(SimpleNamespace()) is None
