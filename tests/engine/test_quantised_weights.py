"""Logits with quantised weights against the stock model in float64, filled with the same values by `gguf.quants`.

The kernels round activations to int8 in groups of 32 that share a scale of max / 127. A rounding error is uniform, so
its standard deviation is scale / sqrt(12); for the maximum of 32 normal values, about 2.1 sigma, that is 0.5% of the
activation. Two products in a row inside each of the six blocks, and one more in the head, add in squares: below 3% of
the logits (BOUND), or 5% with MLA, whose queries and latents pass another product each. That nothing else is in the
error shows when the oracle rounds its activations the same way: what remains is float32 (EXPLAINED).
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from tests.engine.pairs import checkpoint_of, load_tiny
from tests.kernels.oracle import random_raw, weights_of
from tests.tiny_models import tiny_inputs
from transformers import PreTrainedModel

from moesaic.engine.loader import load, prepare
from moesaic.engine.quantize import quantize_checkpoint
from moesaic.placement import Plan, load_plan
from moesaic.quant import get_format, quantize
from moesaic.weights import GgufWriter, open_checkpoint

BOUND = 0.03
MLA_BOUND = 0.05
EXPLAINED = 1e-5

_ALL = "rules:\n  - match: {{name: '*'}}\n    format: {0}\n"
_MIXED = """rules:
  - match: {role: experts}
    format: {gate: Q4_K, up: Q5_K, down: Q6_K}
  - match: {role: attention}
    format: Q8_0
  - match: {name: "*"}
    format: Q5_K
"""
_FORMATS = [
    *("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"),
    *("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K"),
]
# Formats of gate, up and down by layer, as dynamic quantisers mix them, down to what nothing here can write.
_DYNAMIC = [("IQ1_S", "IQ2_XXS", "IQ3_S"), ("MXFP4", "Q4_K", "IQ1_M"), ("IQ2_S", "TQ2_0", "NVFP4")]


def _through_gguf(values: torch.Tensor, name: str) -> torch.Tensor:
    """The values of `[..., K]` after our quantiser and the gguf package's decoder, float64."""
    rows = values.detach().float().reshape(-1, values.shape[-1]).contiguous().numpy()
    raw = quantize(rows, get_format(name))
    decoded = gguf.quants.dequantize(raw, gguf.GGMLQuantizationType[name])
    return torch.from_numpy(np.array(decoded)).double().reshape(values.shape)


def _fill(stock: PreTrainedModel, plan: Plan) -> set[int]:
    """Put the quantised values into the stock model; addresses of the parameters that hold them."""
    filled = set()
    for entry in plan.entries:
        module = stock.get_submodule(entry.module)
        for key, name in entry.formats.items():
            if not get_format(name).is_quantized:
                continue
            if entry.role == "experts":
                filled.add(_fill_expert_part(module, key, name))
            elif getattr(module, key).data_ptr() not in filled:  # a tied head is the embedding
                parameter = getattr(module, key)
                parameter.data.copy_(_through_gguf(parameter, name))
                filled.add(parameter.data_ptr())
    return filled


def _fill_expert_part(module: torch.nn.Module, key: str, name: str) -> int:
    """Round one projection of a stock experts module to a format."""
    return _put_expert_part(module, key, lambda values: _through_gguf(values, name))


def _put_expert_part(module: torch.nn.Module, key: str, new: Callable[[torch.Tensor], torch.Tensor]) -> int:
    """New values for one projection of a stock experts module, whose rows are those of [gate; up] or interleaved."""
    parameter = module.down_proj if key == "down" else module.gate_up_proj
    values = parameter.data.transpose(1, 2) if module.is_transposed else parameter.data
    if key != "down":
        width, first = values.shape[1] // 2, key == "gate"
        rows = slice(None if first else width, width if first else None)
        values = values[:, rows] if module.is_concatenated else values[:, 0 if first else 1 :: 2]
    values.copy_(new(values))
    return parameter.data_ptr()


def _oracle(family: str, plan: Plan) -> tuple[PreTrainedModel, set[int]]:
    stock = copy.deepcopy(checkpoint_of(family)[0]).double()
    stock.set_experts_implementation("eager")  # the grouped products of torch take no float64
    return stock, _fill(stock, plan)


def _rounded(x: torch.Tensor) -> torch.Tensor:
    """Activations as the kernels see them: int8 in groups of 32 along the last dimension."""
    groups = x.unflatten(-1, (-1, 32))
    scale = groups.abs().amax(-1, keepdim=True).float() / 127
    return (torch.where(scale > 0, groups / scale.double(), 0.0).round() * scale.double()).flatten(-2)


def _with_rounding(linear: Callable[..., torch.Tensor], quantised: set[int]) -> Callable[..., torch.Tensor]:
    def rounding_linear(x: torch.Tensor, weight: torch.Tensor, *rest: Any) -> torch.Tensor:
        owner = weight.untyped_storage().data_ptr()
        return linear(_rounded(x) if owner in quantised else x, weight, *rest)

    return rounding_linear


def error(ours: torch.Tensor, expected: torch.Tensor) -> float:
    """Norm of the difference over norm of the expected logits, of the median token.

    The median, because a token whose router stands between two experts may take the other one, which is a jump.
    """
    return float(((ours.double() - expected).norm(dim=-1) / expected.norm(dim=-1)).median())


def _compare(family: str, rules: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[float, float]:
    """Error against the exact oracle, and against the one that rounds activations."""
    (tmp_path / "plan.yaml").write_text(rules)
    chosen = load_plan(str(tmp_path / "plan.yaml"))
    plan = prepare(str(checkpoint_of(family)[1]), plan=chosen).plan
    ours, (stock, quantised) = load_tiny(family, chosen), _oracle(family, plan)
    ids = tiny_inputs(batch=2, length=9)
    with torch.no_grad():
        found, exact = ours(ids).logits, stock(ids).logits
        with monkeypatch.context() as patch:
            patch.setattr(torch.nn.functional, "linear", _with_rounding(torch.nn.functional.linear, quantised))
            rounded = stock(ids).logits
    return error(found, exact), error(found, rounded)


@pytest.mark.parametrize("name", _FORMATS)
def test_each_format(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    error, unexplained = _compare("qwen3_moe", _ALL.format(name), tmp_path, monkeypatch)
    assert error < BOUND
    assert unexplained < EXPLAINED


@pytest.mark.parametrize("family", ["mixtral", "glm4_moe", "olmoe", "hunyuan_v1_moe"])
def test_mixed_formats(family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Gate, up, down, attention and head in formats of their own; Hunyuan's embedding is its head too."""
    error, unexplained = _compare(family, _MIXED, tmp_path, monkeypatch)
    assert error < BOUND
    assert unexplained < EXPLAINED


@pytest.mark.parametrize("family", ["deepseek_v2", "deepseek_v3", "gpt_oss"])
@pytest.mark.parametrize("name", ["Q8_0", "Q4_K"])
def test_absorbed_and_transposed(family: str, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """MLA rounds other activations than the stock order of products does, so that here only the bound is tested."""
    error, _ = _compare(family, _ALL.format(name), tmp_path, monkeypatch)
    assert error < (BOUND if family == "gpt_oss" else MLA_BOUND)


def _write_dynamic(output: Path, source: Path, stock: PreTrainedModel) -> set[int]:
    """The GGUF `source` with experts of random blocks in _DYNAMIC's formats; their values go into `stock`."""
    checkpoint, filled = open_checkpoint(source), set()
    experts = {
        f"blk.{layer}.ffn_{part}_exps.weight": (layer, part, get_format(name))
        for layer, names in enumerate(_DYNAMIC)
        for part, name in zip(("gate", "up", "down"), names, strict=True)
    }
    assert experts.keys() <= checkpoint.tensors.keys()
    metadata = dict(checkpoint.metadata)
    with GgufWriter(output, str(metadata.pop("general.architecture"))) as writer:
        writer.add_metadata(metadata)
        for name, info in checkpoint.tensors.items():
            writer.declare(name, experts[name][2] if name in experts else info.format, info.shape)
        for seed, (name, info) in enumerate(checkpoint.tensors.items()):
            if name not in experts:
                writer.write(name, checkpoint.raw(name))
                continue
            layer, part, fmt = experts[name]
            raw = random_raw(fmt, info.shape[0] * info.shape[1], info.shape[2], seed)
            writer.write(name, raw)
            module = stock.get_submodule(f"model.layers.{layer}.mlp.experts")
            values = torch.from_numpy(weights_of(raw, fmt, info.shape[2])).reshape(info.shape)
            filled.add(_put_expert_part(module, part, lambda _, values=values: values))
    return filled


def _in_memory(name: str, ternary: str) -> str:
    return f"{name}_TERNARY" if ternary == "always" and name.startswith("IQ1") else name


@pytest.mark.parametrize("ternary", ["never", "always"])
def test_gate_up_and_down_of_each_layer_in_formats_of_their_own(
    ternary: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = checkpoint_of("qwen3_moe")[1]
    quantize_checkpoint(open_checkpoint(folder), tmp_path / "plain.gguf", get_format("F32"))
    stock = copy.deepcopy(checkpoint_of("qwen3_moe")[0]).double()
    stock.set_experts_implementation("eager")
    quantised = _write_dynamic(tmp_path / "dynamic.gguf", tmp_path / "plain.gguf", stock)
    prepared = prepare(str(tmp_path / "dynamic.gguf"), plan=replace(load_plan("auto"), ternary=ternary))
    for layer, names in enumerate(_DYNAMIC):
        formats = prepared.plan.of(f"model.layers.{layer}.mlp.experts").formats
        assert (formats["gate"], formats["up"], formats["down"]) == tuple(_in_memory(name, ternary) for name in names)
    ours, ids = load(prepared, progress=False), tiny_inputs(batch=2, length=9)
    with torch.no_grad():
        found, exact = ours(ids).logits, stock(ids).logits
        with monkeypatch.context() as patch:
            patch.setattr(torch.nn.functional, "linear", _with_rounding(torch.nn.functional.linear, quantised))
            rounded = stock(ids).logits
    assert error(found, exact) < BOUND
    assert error(found, rounded) < EXPLAINED


def test_ternary_digits_are_the_same_weights_and_give_the_same_tokens(tmp_path: Path) -> None:
    folder = checkpoint_of("qwen3_moe")[1]
    quantize_checkpoint(open_checkpoint(folder), tmp_path / "plain.gguf", get_format("F32"))
    _write_dynamic(tmp_path / "dynamic.gguf", tmp_path / "plain.gguf", copy.deepcopy(checkpoint_of("qwen3_moe")[0]))
    weights, tokens = [], []
    for ternary in ("never", "always"):
        prepared = prepare(str(tmp_path / "dynamic.gguf"), plan=replace(load_plan("cpu"), ternary=ternary))
        model = load(prepared, progress=False)
        experts = [model.get_submodule(f"model.layers.{layer}.mlp.experts").packed for layer in (0, 1)]
        assert (experts[0].gate.format.name, experts[1].down.format.name) == (
            _in_memory("IQ1_S", ternary),
            _in_memory("IQ1_M", ternary),
        )
        weights.append([experts[0].gate.dequantize(), experts[1].down.dequantize()])
        ids = tiny_inputs(batch=1, length=9)
        tokens.append(model.generate(ids, max_new_tokens=12, do_sample=False))
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(*weights, strict=True))
    assert torch.equal(*tokens)
