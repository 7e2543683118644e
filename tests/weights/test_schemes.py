"""Quantised safetensors: every value exactly, and one typed error with the right names for every defect."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.published import SCHEMES, Scheme

from moesaic.errors import CheckpointError, UnsupportedFormatError
from moesaic.quant import dequantize
from moesaic.weights import open_checkpoint

NAME = "model.layers.0.mlp.experts.0.up_proj.weight"
MODULE = NAME.removesuffix(".weight")
LINEAR = [name for name in SCHEMES if name != "mxfp4"]


def quantised(folder: Path, scheme: Scheme, x: torch.Tensor, name: str = NAME) -> torch.Tensor:
    """A folder with one quantised weight; its values in float64."""
    stored, values = scheme.quantise(name, x)
    save_file(stored, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"quantization_config": scheme.config}))
    return values


def weight(rows: int, cols: int) -> torch.Tensor:
    return torch.randn(rows, cols, generator=torch.Generator().manual_seed(rows)) * 0.05


def values_of(folder: Path, name: str = NAME, rows: Any = None) -> np.ndarray:
    checkpoint = open_checkpoint(folder)
    info = checkpoint.tensors[name]
    assert info.nbytes == info.format.nbytes(int(np.prod(info.shape[:-1])), info.shape[-1])
    raw = checkpoint.raw(name, rows)
    if rows is None:
        assert raw.nbytes == info.nbytes
    values = dequantize(raw, info.format, info.shape[-1])
    checkpoint.release(name)
    checkpoint.close()
    return values


@pytest.mark.parametrize("scheme", LINEAR)
@pytest.mark.parametrize("shape", [(8, 128), (136, 256), (640, 2048)])
def test_values_are_exact(scheme: str, shape: tuple[int, int], tmp_path: Path) -> None:
    """The format's float32 product of code and scale is the definition's product, rounded once."""
    expected = quantised(tmp_path, SCHEMES[scheme], weight(*shape)).float().numpy()
    assert open_checkpoint(tmp_path).tensors.keys() == {NAME}
    assert np.array_equal(values_of(tmp_path), expected)
    assert np.array_equal(values_of(tmp_path, rows=slice(1, 7, 2)), expected[1:7:2])
    assert np.array_equal(values_of(tmp_path, rows=np.array([5, 0, 5])), expected[[5, 0, 5]])


@pytest.mark.parametrize("scheme", ["fp8-block", "fp8-channel", "int4-32-experts"])
def test_rows_of_any_number(scheme: str, tmp_path: Path) -> None:
    """As kv_a_proj_with_mqa of DeepSeek-V3, whose 576 rows are 4.5 blocks."""
    expected = quantised(tmp_path, SCHEMES[scheme], weight(213, 384)).float().numpy()
    assert np.array_equal(values_of(tmp_path), expected)


def test_zero_points_of_rows_that_fill_no_word(tmp_path: Path) -> None:
    expected = quantised(tmp_path, SCHEMES["int4-128-asymmetric"], weight(13, 256)).float().numpy()
    assert np.array_equal(values_of(tmp_path), expected)


def test_stacks_of_mxfp4(tmp_path: Path) -> None:
    name = "model.layers.0.mlp.experts.gate_up_proj"
    x = torch.randn(3, 96, 10, generator=torch.Generator().manual_seed(1))
    x[0, :32] *= 2.0**-130  # the smallest scale, 2^-127
    expected = quantised(tmp_path, SCHEMES["mxfp4"], x, name).transpose(1, 2).reshape(30, 96).float().numpy()
    info = open_checkpoint(tmp_path).tensors[name]
    assert (info.format.name, info.shape) == ("MXFP4", (3, 10, 96))
    assert np.array_equal(values_of(tmp_path, name), expected)
    assert np.array_equal(values_of(tmp_path, name, slice(11, 20, 2)), expected[11:20:2])


@pytest.mark.parametrize(("dtype", "scale"), [(torch.bfloat16, 0.0123), (torch.float32, 0.0123), ("e8m0", 2.0**-7)])
def test_types_of_scales(dtype: Any, scale: float, tmp_path: Path) -> None:
    codes = torch.arange(256).remainder(127).to(torch.uint8).repeat(128, 1).view(torch.float8_e4m3fn)
    table = torch.full((1, 2), scale)
    table = table.to(torch.float8_e8m0fnu if dtype == "e8m0" else dtype)
    save_file({NAME: codes, f"{NAME}_scale_inv": table}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": SCHEMES["fp8-block"].config}))
    assert np.array_equal(values_of(tmp_path), (codes.float() * table[0, 0].float()).numpy())


Damage = Callable[[dict[str, torch.Tensor], dict[str, Any]], Any]


def _without(suffix: str) -> Damage:
    return lambda tensors, config: tensors.pop(next(name for name in tensors if name.endswith(suffix)))


def _change(suffix: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Damage:
    def apply(tensors: dict[str, torch.Tensor], config: dict[str, Any]) -> None:
        name = next(name for name in tensors if name.endswith(suffix))
        tensors[name] = change(tensors[name]).contiguous()

    return apply


def _config(**values: Any) -> Damage:
    return lambda tensors, config: config.update(values)


def _weights(**values: Any) -> Damage:
    return lambda tensors, config: config["config_groups"]["group_0"]["weights"].update(values)


DEFECTS: list[tuple[str, Damage, type[Exception], str]] = [
    ("fp8-block", _without("_scale_inv"), CheckpointError, r"up_proj\.weight'.*no partner.*weight_scale_inv"),
    ("fp8-block", _change("_inv", lambda x: x[:, :1]), CheckpointError, r"_scale_inv'.*\[2, 1\].*expected \[2, 2\]"),
    ("fp8-block", _change("_inv", lambda x: x.int()), UnsupportedFormatError, r"_scale_inv'.*I32"),
    ("fp8-block", _change(".weight", lambda x: x[0]), CheckpointError, r"weight'.*expected a matrix"),
    ("fp8-block", _config(weight_block_size=[128, 0]), CheckpointError, r"config\.json.*weight_block_size"),
    ("fp8-block", _config(weight_block_size="x"), CheckpointError, r"config\.json.*weight_block_size"),
    ("fp8-block", _config(weight_block_size=[128, 200]), UnsupportedFormatError, r"up_proj\.weight'.*every 200"),
    ("fp8-block", _config(fmt="e5m2"), UnsupportedFormatError, "'e5m2'.*expected e4m3"),
    ("fp8-block", _config(quant_method="bitsandbytes"), UnsupportedFormatError, "'bitsandbytes'.*compressed-tensors"),
    ("fp8-block", _config(quant_method=["fp8"]), UnsupportedFormatError, "expected one of fp8"),
    ("fp8-channel", _change("_scale", lambda x: x[:5]), CheckpointError, r"_scale'.*\[5, 1\].*expected \[136, 1\]"),
    ("fp8-channel", _weights(type="int"), UnsupportedFormatError, "8-bit 'int' per 'channel' in 'float-quantized'"),
    ("int4-32-experts", _weights(num_bits=8), UnsupportedFormatError, "8-bit 'int' per 'group' in 'pack-quantized'"),
    ("int4-32-experts", _config(format="marlin-24"), UnsupportedFormatError, "marlin-24"),
    ("int4-32-experts", _config(sparsity_config={"format": "sparse-24"}), UnsupportedFormatError, "sparse-24"),
    ("int4-32-experts", _config(config_groups=[]), CheckpointError, "config_groups"),
    ("int4-32-experts", _without("_scale"), CheckpointError, r"weight_packed'.*no partner.*weight_scale"),
    ("int4-32-experts", _without("_shape"), CheckpointError, r"weight_packed'.*no partner.*weight_shape"),
    ("int4-32-experts", _change("_shape", lambda x: x + 8), CheckpointError, r"weight_shape'.*expected \[136, 256\]"),
    ("int4-32-experts", _change("_scale", lambda x: x[:, :3]), CheckpointError, r"weight_scale'.*3 scales.*256"),
    ("int4-32-experts", _change("_scale", lambda x: x.float()), CheckpointError, r"weight_scale'.*F32.*F16 or BF16"),
    ("int4-32-experts", _change("_scale", lambda x: x.repeat(1, 2)), UnsupportedFormatError, "groups of 16"),
    ("int4-32-experts", _change("_packed", lambda x: x[0]), CheckpointError, r"weight_packed'.*expected I32"),
    ("int4-128-asymmetric", _change("_point", lambda x: x[:1]), CheckpointError, r"zero_point'.*\[17, 2\]"),
    ("gptq-32", _config(bits=8), UnsupportedFormatError, "GPTQ with 8 bits"),
    ("gptq-32", _config(bits="4"), CheckpointError, r"config\.json.*bits.*expected an integer"),
    ("gptq-32", _config(sym=1), CheckpointError, r"config\.json.*sym.*true or false"),
    ("gptq-32", _config(checkpoint_format="marlin"), UnsupportedFormatError, "'marlin'.*gptq_v2"),
    ("gptq-32", _without("scales"), CheckpointError, r"qweight'.*no partner.*scales"),
    ("gptq-32", _without("qzeros"), CheckpointError, r"qweight'.*no partner.*qzeros"),
    ("gptq-32", _change("qzeros", lambda x: x[:, :4]), CheckpointError, r"qzeros'.*expected I32 \[8, 17\]"),
    ("gptq-32", _change("g_idx", lambda x: x[:9]), CheckpointError, r"g_idx'.*\[9\].*\[256\]"),
    ("awq-32", _config(version="gemv"), UnsupportedFormatError, "'gemv'.*expected gemm"),
    ("awq-32", _config(bits=None), CheckpointError, "bits"),
    ("awq-32", _without("qzeros"), CheckpointError, r"qweight'.*no partner.*qzeros"),
    ("awq-32", _change("scales", lambda x: x[:, :8]), CheckpointError, r"scales'.*expected F16 or BF16 \[8, 136\]"),
    ("mxfp4", _without("_scales"), CheckpointError, r"_blocks'.*no partner.*up_proj\.weight_scales"),
    ("mxfp4", _change("_scales", lambda x: x[:, :1]), CheckpointError, r"_scales'.*expected U8"),
    ("mxfp4", _change("_blocks", lambda x: x[..., :8]), CheckpointError, r"_blocks'.*16\]"),
]


def damaged(folder: Path, scheme: str, damage: Damage) -> None:
    x = weight(136, 256)
    chosen = replace(SCHEMES[scheme], config=copy.deepcopy(SCHEMES[scheme].config))
    quantised(folder, chosen, x.T[None] if scheme == "mxfp4" else x)
    tensors = load_file(folder / "model.safetensors")
    damage(tensors, chosen.config)
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"quantization_config": chosen.config}))


@pytest.mark.parametrize(("scheme", "damage", "error", "message"), DEFECTS, ids=[str(i) for i in range(len(DEFECTS))])
def test_defects_are_found_when_the_folder_is_opened(
    scheme: str, damage: Damage, error: type[Exception], message: str, tmp_path: Path
) -> None:
    damaged(tmp_path, scheme, damage)
    with pytest.raises(error, match=message):
        open_checkpoint(tmp_path)


def _nan(codes: torch.Tensor) -> torch.Tensor:
    bits = codes.view(torch.uint8).clone()
    bits[77, 99] = 0xFF
    return bits.view(torch.float8_e4m3fn)


@pytest.mark.parametrize(
    ("scheme", "damage", "message"),
    [
        ("fp8-block", _change(".weight", _nan), r"up_proj\.weight'.*NaN"),
        ("mxfp4", _change("_scales", lambda x: x * 0 + 255), r"_scales'.*NaN"),
        ("gptq-32", _change("qzeros", lambda x: x + 1), r"qzeros'.*zero points other than 8.*sym"),
        ("gptq-32", _change("g_idx", lambda x: x.flip(0)), r"g_idx'.*out of order"),
    ],
)
def test_defects_of_values_are_found_when_they_are_read(
    scheme: str, damage: Damage, message: str, tmp_path: Path
) -> None:
    damaged(tmp_path, scheme, damage)
    checkpoint = open_checkpoint(tmp_path)
    with pytest.raises(CheckpointError, match=message):
        checkpoint.raw(next(iter(checkpoint.tensors)))


@pytest.mark.parametrize("shuffled", [True, False])
def test_act_order_is_refused_at_once_by_name(shuffled: bool, tmp_path: Path) -> None:
    def damage(tensors: dict[str, torch.Tensor], config: dict[str, Any]) -> None:
        config["desc_act"] = True
        if shuffled:
            _change("g_idx", lambda x: x[torch.randperm(256)])(tensors, config)

    damaged(tmp_path, "gptq-32", damage)
    if shuffled:
        with pytest.raises(CheckpointError, match=r"up_proj\.g_idx'.*desc_act"):
            open_checkpoint(tmp_path)
    else:
        assert NAME in open_checkpoint(tmp_path).tensors


def test_a_weight_cannot_be_there_twice(tmp_path: Path) -> None:
    damaged(tmp_path, "gptq-32", lambda tensors, config: tensors.update({NAME: torch.ones(2, 2)}))
    with pytest.raises(CheckpointError, match=r"up_proj\.weight'.*twice"):
        open_checkpoint(tmp_path)


def test_without_a_config_the_types_are_refused_by_name(tmp_path: Path) -> None:
    quantised(tmp_path, SCHEMES["fp8-block"], weight(128, 128))
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UnsupportedFormatError, match=r"up_proj\.weight'.*F8_E4M3.*does not say how"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize("value", [[], "fp8", 7, True])
def test_the_config_must_be_an_object(value: object, tmp_path: Path) -> None:
    quantised(tmp_path, SCHEMES["fp8-block"], weight(128, 128))
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": value}))
    with pytest.raises(CheckpointError, match=r"quantization_config.*expected an object"):
        open_checkpoint(tmp_path)
