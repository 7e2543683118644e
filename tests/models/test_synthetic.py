"""Random checkpoints: every parameter has valid weights of the format asked for, at almost no memory."""

from __future__ import annotations

import tracemalloc

import gguf
import numpy as np
import pytest
import torch
from tests.models.helpers import logits, stock_from
from tests.quant.own_formats import own_values
from tests.tiny_models import ALL_FAMILIES, tiny_config, tiny_inputs

from moesaic.models import build_meta_model, build_weight_map, config_for, synthetic_checkpoint
from moesaic.quant.formats import FORMATS, WeightFormat, get_format
from moesaic.weights import Checkpoint
from moesaic.weights.synthetic import SyntheticCheckpoint


def q4_k_where_it_fits(name: str, shape: tuple[int, ...]) -> WeightFormat:
    return get_format("Q4_K" if shape[-1] % 256 == 0 and not name.endswith("gate.weight") else "F32")


@pytest.mark.parametrize("family", ALL_FAMILIES)
def test_every_family_runs(family: str) -> None:
    model = build_meta_model(tiny_config(family))
    checkpoint = synthetic_checkpoint(model, q4_k_where_it_fits)
    assert isinstance(checkpoint, Checkpoint)
    config = config_for(checkpoint)
    weight_map = build_weight_map(model, checkpoint)
    assert weight_map.missing == () and weight_map.unused == ()
    for name in weight_map.expert_modules:
        assert {ref.format.name for ref in weight_map.experts(name).down} == {"Q4_K"}
        assert len({ref.name for ref in weight_map.experts(name).down}) == weight_map.experts(name).num_experts
    values = logits(stock_from(checkpoint, weight_map, config), tiny_inputs())
    assert torch.isfinite(values).all() and values.std() > 0


def test_blocks_are_valid_and_differ() -> None:
    specification = {f"w{index}": (get_format("Q6_K"), (512, 1024)) for index in range(3)}
    checkpoint = SyntheticCheckpoint("random", {}, specification)
    raws = [np.ascontiguousarray(checkpoint.raw(name)) for name in specification]
    for raw in raws:
        values = gguf.quants.dequantize(raw, gguf.GGMLQuantizationType.Q6_K)
        assert np.isfinite(values).all()
        assert abs(values.std() - 0.02) < 0.002 and abs(values.mean()) < 0.001
    assert not np.array_equal(raws[0], raws[1]) and not np.array_equal(raws[1], raws[2])
    assert np.array_equal(np.ascontiguousarray(checkpoint.raw("w0")), raws[0]), "the same at every reading"


@pytest.mark.parametrize("name", [name for name, fmt in FORMATS.items() if not fmt.in_gguf and fmt.recodes is None])
def test_blocks_of_formats_without_a_quantiser(name: str) -> None:
    checkpoint = SyntheticCheckpoint("random", {}, {"w": (get_format(name), (256, 1024))})
    values = own_values(np.ascontiguousarray(checkpoint.raw("w")), get_format(name))
    assert abs(values.std() - 0.02) < 0.001 and abs(values.mean()) < 0.003


def test_a_model_of_gigabytes_costs_megabytes() -> None:
    tensors = {f"experts.{index}": (get_format("Q4_K"), (2048, 7168)) for index in range(256)}
    tracemalloc.start()
    checkpoint = SyntheticCheckpoint("random", {}, tensors)
    assert sum(info.nbytes for info in checkpoint.tensors.values()) > 2_000_000_000
    assert all(checkpoint.raw(name).shape == (2048, 7168 // 256 * 144) for name in tensors)
    assert tracemalloc.get_traced_memory()[1] < 64 << 20
    tracemalloc.stop()
