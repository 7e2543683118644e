"""Tiny checkpoints as publishers quantise them: rounding to nearest in each scheme, with its tensors, names and config.

Each scheme takes a float32 weight and gives the tensors to store and the values that they mean, in float64, written
from the scheme's published definition. This module knows nothing of moesaic: it is the oracle's side.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from tests.tiny_models import save_tiny
from transformers import PreTrainedModel

__all__ = ["SCHEMES", "Scheme", "pack_rows", "quantise_folder", "save_published"]

Stored = dict[str, torch.Tensor]
E4M3_MAX = 448.0
FP4 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], dtype=torch.float64)


@dataclass(frozen=True)
class Scheme:
    """A way to quantise.

    Attributes:
        config: `quantization_config`.
        quantise: (name of the weight, float32 `[N, K]`) -> tensors to store under full names, values float64 `[N, K]`.
        chosen: which weights are quantised; the others stay as they are.
    """

    config: dict[str, Any]
    quantise: Callable[[str, torch.Tensor], tuple[Stored, torch.Tensor]]
    chosen: str = r".*(self_attn|mlp|block_sparse_moe)\..*(?<!gate)\.weight"
    extra: Stored = field(default_factory=dict)


def pack_rows(nibbles: np.ndarray) -> torch.Tensor:
    """Nibbles `[n, m]` as int32 `[n, m / 8]`, the first of eight in the lowest bits."""
    words = nibbles.astype(np.uint32).reshape(len(nibbles), -1, 8) << np.arange(0, 32, 4, dtype=np.uint32)
    return torch.from_numpy(np.bitwise_or.reduce(words, axis=-1).view(np.int32).copy())


def _grouped(x: torch.Tensor, group: int, dtype: torch.dtype, asymmetric: bool) -> tuple[np.ndarray, torch.Tensor, Any]:
    """Codes 0..15 `[N, K]`, scales `[N, groups]` in `dtype`, zero points `[N, groups]`."""
    groups = x.unflatten(-1, (-1, group))
    if asymmetric:
        low, high = groups.amin(-1).clamp(max=0), groups.amax(-1).clamp(min=0)
        scales = ((high - low) / 15).to(dtype)
        zeros = (-low / scales.float()).round().clamp(1, 15)
    else:
        scales = (groups.abs().amax(-1) / 7.5).to(dtype)
        zeros = torch.full(scales.shape, 8.0)
    codes = (groups / scales.float()[..., None] + zeros[..., None]).round().clamp(0, 15)
    return codes.flatten(-2).numpy().astype(np.uint8), scales, zeros.numpy().astype(np.uint8)


def _values(codes: np.ndarray, scales: torch.Tensor, zeros: np.ndarray) -> torch.Tensor:
    """(q - z) * scale in float64."""
    group = codes.shape[1] // scales.shape[1]
    shifted = torch.from_numpy(codes.astype(np.float64) - np.repeat(zeros, group, 1))
    return shifted * scales.double().repeat_interleave(group, 1)


def _fp8_block(name: str, x: torch.Tensor) -> tuple[Stored, torch.Tensor]:
    rows, cols = x.shape
    scales = torch.zeros(-(-rows // 128), -(-cols // 128))
    codes = torch.empty(rows, cols, dtype=torch.float8_e4m3fn)
    values = torch.empty(rows, cols, dtype=torch.float64)
    for i in range(scales.shape[0]):
        for j in range(scales.shape[1]):
            at = slice(128 * i, 128 * i + 128), slice(128 * j, 128 * j + 128)
            scales[i, j] = x[at].abs().max() / E4M3_MAX
            codes[at] = (x[at] / scales[i, j]).to(torch.float8_e4m3fn)
            values[at] = codes[at].double() * scales[i, j].double()
    return {name: codes, f"{name}_scale_inv": scales}, values


def _fp8_channel(name: str, x: torch.Tensor) -> tuple[Stored, torch.Tensor]:
    scales = (x.abs().amax(-1, keepdim=True) / E4M3_MAX).bfloat16()
    codes = (x / scales.float()).clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn)
    return {name: codes, f"{name}_scale": scales}, codes.double() * scales.double()


def _fp8_tensor(name: str, x: torch.Tensor) -> tuple[Stored, torch.Tensor]:
    scale = x.abs().max() / E4M3_MAX
    codes = (x / scale).to(torch.float8_e4m3fn)
    module = name.removesuffix(".weight")
    extra = torch.tensor(0.5)  # static scale of activations
    return {name: codes, f"{name}_scale": scale, f"{module}.input_scale": extra}, codes.double() * scale.double()


def _compressed_int4(group: int, dtype: torch.dtype, asymmetric: bool) -> Callable[[str, torch.Tensor], Any]:
    def quantise(name: str, x: torch.Tensor) -> tuple[Stored, torch.Tensor]:
        codes, scales, zeros = _grouped(x, group or x.shape[1], dtype, asymmetric)
        stored = {
            f"{name}_packed": pack_rows(codes),
            f"{name}_scale": scales,
            f"{name}_shape": torch.tensor(x.shape),
        }
        if asymmetric:
            padded = np.pad(zeros, ((0, -len(zeros) % 8), (0, 0)))
            stored[f"{name}_zero_point"] = pack_rows(padded.T).T.contiguous()
        return stored, _values(codes, scales, zeros)

    return quantise


def _gptq(group: int, symmetric: bool, stored_less: int = 1) -> Callable[[str, torch.Tensor], Any]:
    def quantise(name: str, x: torch.Tensor) -> tuple[Stored, torch.Tensor]:
        module = name.removesuffix(".weight")
        codes, scales, zeros = _grouped(x, group, torch.float16, not symmetric)
        stored = {
            f"{module}.qweight": pack_rows(codes).T.contiguous(),
            f"{module}.qzeros": pack_rows(zeros.T - np.uint8(stored_less)),
            f"{module}.scales": scales.T.contiguous(),
            f"{module}.g_idx": (torch.arange(x.shape[1]) // group).int(),
        }
        return stored, _values(codes, scales, zeros)

    return quantise


def _awq(group: int) -> Callable[[str, torch.Tensor], Any]:
    order = [0, 2, 4, 6, 1, 3, 5, 7]

    def interleaved(nibbles: np.ndarray) -> torch.Tensor:
        return pack_rows(nibbles.reshape(len(nibbles), -1, 8)[..., order].reshape(len(nibbles), -1))

    def quantise(name: str, x: torch.Tensor) -> tuple[Stored, torch.Tensor]:
        module = name.removesuffix(".weight")
        codes, scales, zeros = _grouped(x, group, torch.float16, asymmetric=True)
        stored = {
            f"{module}.qweight": interleaved(codes.T),
            f"{module}.qzeros": interleaved(zeros.T),
            f"{module}.scales": scales.T.contiguous(),
        }
        return stored, _values(codes, scales, zeros)

    return quantise


def _mxfp4(name: str, x: torch.Tensor) -> tuple[Stored, torch.Tensor]:
    """Stacks as the stock module has them, `[E, K, R]`; stored as `[E, R, K / 32, 16]`."""
    blocks = x.double().transpose(1, 2).unflatten(-1, (-1, 32))
    exponents = (blocks.abs().amax(-1) / 6).log2().ceil().clamp(-127, 127)
    scaled = blocks / exponents.exp2()[..., None]
    codes = (scaled[..., None] - FP4).abs().argmin(-1).byte()
    stored = {
        f"{name}_blocks": codes[..., 0::2] | codes[..., 1::2] << 4,
        f"{name}_scales": (exponents + 127).byte(),
    }
    values = FP4[codes.long()] * exponents.exp2()[..., None]
    return stored, values.flatten(-2).transpose(1, 2)


def _compressed(layout: str, bits: int, kind: str, strategy: str, **rest: Any) -> dict[str, Any]:
    weights = {"num_bits": bits, "type": kind, "strategy": strategy, "symmetric": True, "dynamic": False} | rest
    group = {"targets": ["Linear"], "weights": weights, "input_activations": None, "output_activations": None}
    return {
        "quant_method": "compressed-tensors",
        "format": layout,
        "config_groups": {"group_0": group},
        "ignore": ["lm_head", "re:.*mlp.gate$"],
        "kv_cache_scheme": None,
        "quantization_status": "compressed",
    }


def _int4(group: int | None, dtype: torch.dtype = torch.bfloat16, asymmetric: bool = False, **rest: Any) -> Scheme:
    strategy = "group" if group else "channel"
    config = _compressed("pack-quantized", 4, "int", strategy, group_size=group, symmetric=not asymmetric)
    return Scheme(config, _compressed_int4(group or 0, dtype, asymmetric), **rest)


def _gptq_scheme(group: int, symmetric: bool, layout: str = "gptq") -> Scheme:
    config = {"quant_method": "gptq", "bits": 4, "group_size": group, "desc_act": False, "sym": symmetric}
    return Scheme(config | {"checkpoint_format": layout}, _gptq(group, symmetric, int(layout == "gptq")))


def _awq_scheme(group: int) -> Scheme:
    config = {"quant_method": "awq", "bits": 4, "group_size": group, "zero_point": True, "version": "gemm"}
    return Scheme(config, _awq(group))


_FP8 = {"quant_method": "fp8", "activation_scheme": "dynamic", "fmt": "e4m3"}
SCHEMES: dict[str, Scheme] = {
    "fp8-block": Scheme(_FP8 | {"weight_block_size": [128, 128]}, _fp8_block),
    "fp8-tensor": Scheme({"quant_method": "fp8", "activation_scheme": "static"}, _fp8_tensor),
    "fp8-channel": Scheme(_compressed("float-quantized", 8, "float", "channel"), _fp8_channel),
    # As Kimi-K2-Thinking: only the routed experts.
    "int4-32-experts": _int4(32, chosen=r".*\.experts\.\d+\..*\.weight"),
    "int4-128-asymmetric": _int4(128, torch.float16, asymmetric=True),
    "int4-channel": _int4(None),
    **{f"gptq-{group}": _gptq_scheme(group, symmetric=True) for group in (32, 64, 128)},
    "gptq-asymmetric": _gptq_scheme(128, symmetric=False),
    "gptq-v2": _gptq_scheme(64, symmetric=False, layout="gptq_v2"),
    **{f"awq-{group}": _awq_scheme(group) for group in (32, 64, 128)},
    "mxfp4": Scheme({"quant_method": "mxfp4"}, _mxfp4, chosen=r".*\.experts\.(gate_up|down)_proj"),
}


def quantise_folder(folder: Path, scheme: Scheme) -> Stored:
    """Quantise a saved model in its place; the tensors with the values that the new ones mean, by unquantised names."""
    stored: Stored = {}
    meant: Stored = {}
    for name, x in load_file(folder / "model.safetensors").items():
        if x.ndim > 1 and re.fullmatch(scheme.chosen, name):
            parts, values = scheme.quantise(name, x.float())
            stored |= parts
            meant[name] = values.float().contiguous()
        else:
            stored[name] = meant[name] = x
    save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": scheme.config}))
    return meant


def save_published(folder: Path, family: str, scheme: str, **overrides: Any) -> PreTrainedModel:
    """Save a tiny model quantised by a scheme into `folder`; return the stock float32 model with the same values."""
    stock = save_tiny(folder, family, **overrides)
    meant = quantise_folder(folder, SCHEMES[scheme])
    plain = folder / "plain"
    plain.mkdir()
    stock.config.save_pretrained(plain)
    save_file(meant, plain / "model.safetensors", metadata={"format": "pt"})
    filled = type(stock).from_pretrained(plain, dtype=torch.float32, attn_implementation="eager").eval()
    for file in plain.iterdir():
        file.unlink()
    plain.rmdir()
    return filled
