"""Checkpoints of the compressed-tensors package: INT4 in groups ("pack-quantized") and FP8 ("float-quantized").

INT4: `<module>.weight_packed` I32 `[N, K / 8]`, eight weights a word from its lowest bits on, of which 8 (or the zero
point) is subtracted; `weight_scale` F16 or BF16 `[N, K / group]`; `weight_shape` `[2]`; for asymmetric ones
`weight_zero_point` I32 `[N / 8, K / group]`, packed along N; with activation order `weight_g_idx` `[K]`.
FP8: see `fp8.py`.

Source: the compressed-tensors package (compressors `pack_quantized` and `naive_quantized`), and the config of
moonshotai/Kimi-K2-Thinking on the hub.
"""

from __future__ import annotations

import reprlib
from collections.abc import Iterator, Mapping

import numpy as np

from moesaic.errors import CheckpointError
from moesaic.weights.checkpoint import Rows
from moesaic.weights.safetensors_file import StoredTensor
from moesaic.weights.schemes.base import Parts, QuantizedTensor, describe, row_chunks
from moesaic.weights.schemes.fp8 import Block, find_e4m3
from moesaic.weights.schemes.nibbles import check_shape, grouped_blocks, grouped_format, unpacked

__all__ = ["find_compressed_tensors"]

_KNOWN = "4-bit int weights per group or channel (pack-quantized) or FP8 per tensor, channel or block (float-quantized)"


def find_compressed_tensors(parts: Parts) -> Iterator[QuantizedTensor]:
    """The weights of a checkpoint with `quant_method: compressed-tensors`."""
    sparsity = parts.config.get("sparsity_config")
    if isinstance(sparsity, dict) and sparsity.get("format", "dense") != "dense":
        raise parts.refuse(f"sparse weights ({reprlib.repr(sparsity['format'])})", _KNOWN)
    blocks = {_check_group(parts, name, group) for name, group in _groups(parts).items()}
    blocks.discard(None)
    if len(blocks) > 1:
        raise parts.refuse(f"FP8 in blocks of several sizes ({sorted(map(str, blocks))})", "one size")
    yield from find_e4m3(parts, next(iter(blocks), None))
    for module, packed in parts.ending(".weight_packed"):
        yield _int4(parts, module, packed)


def _groups(parts: Parts) -> Mapping[str, Mapping[str, object]]:
    groups = parts.config.get("config_groups")
    if not isinstance(groups, dict) or not all(isinstance(group, dict) for group in groups.values()):
        raise CheckpointError(
            parts.file, f"is {reprlib.repr(groups)}: expected objects.", "quantization_config.config_groups"
        )
    return groups


def _check_group(parts: Parts, name: str, group: Mapping[str, object]) -> Block | None:
    """Refuse what cannot be read; the block size of FP8 in blocks, else None."""
    weights = group.get("weights")
    if not isinstance(weights, dict):
        raise CheckpointError(
            parts.file, f"is {reprlib.repr(weights)}: expected an object.", f"quantization_config.{name}.weights"
        )
    layout = group.get("format") or parts.config.get("format")
    bits, kind, strategy = (weights.get(key) for key in ("num_bits", "type", "strategy"))
    if (layout, bits, kind) == ("pack-quantized", 4, "int") and strategy in ("group", "channel"):
        return None
    is_fp8 = layout in ("float-quantized", "naive-quantized") and (bits, kind) == (8, "float")
    if is_fp8 and strategy in ("tensor", "channel"):
        return None
    if is_fp8 and strategy == "block":
        block = weights.get("block_structure")
        if isinstance(block, list) and len(block) == 2 and all(type(n) is int and 0 < n < 1 << 16 for n in block):
            return block[0], block[1]
    found = f"{reprlib.repr(bits)}-bit {reprlib.repr(kind)} per {reprlib.repr(strategy)} in {reprlib.repr(layout)}"
    raise parts.refuse(f"compressed-tensors, {found}", _KNOWN)


def _int4(parts: Parts, module: str, packed: StoredTensor) -> QuantizedTensor:
    if packed.dtype != "I32" or len(packed.shape) != 2:
        raise CheckpointError(
            packed.file.path, f"is {packed.dtype} {list(packed.shape)}: expected I32 [N, K / 8].", packed.name
        )
    num_rows, cols = packed.shape[0], 8 * packed.shape[1]
    scales = parts.partner(packed, f"{module}.weight_scale")
    num_groups = scales.shape[-1] if len(scales.shape) == 2 else 0
    check_shape(scales, ("F16", "BF16"), (num_rows, num_groups), packed)
    zeros = parts.tensors.get(f"{module}.weight_zero_point")
    fmt = grouped_format(scales, cols, num_groups, zeros is not None)
    if zeros is not None:
        check_shape(zeros, ("I32",), (-(-num_rows // 8), num_groups), packed)
    shape = parts.partner(packed, f"{module}.weight_shape")
    check_shape(shape, ("I64", "I32"), (2,), packed)
    if shape.array().tolist() != [num_rows, cols]:
        raise CheckpointError(
            shape.file.path, f"is {shape.array().tolist()}: expected {[num_rows, cols]}, as packed.", shape.name
        )
    order = parts.tensors.get(f"{module}.weight_g_idx")
    if order is not None:
        _check_order(order, cols, num_groups, packed)
    extras = parts.present(f"{module}.weight_g_idx", f"{module}.input_scale")

    def read(rows: Rows | None) -> np.ndarray:
        natural, scale_bits = packed.raw().reshape(num_rows, -1), scales.raw().view(np.uint16).reshape(num_rows, -1)
        points = None if zeros is None else unpacked(zeros.array().T).reshape(num_groups, -1)[:, :num_rows].T
        count, chunks = row_chunks(num_rows, cols, rows)
        result = np.empty((count, fmt.row_bytes(cols)), np.uint8)
        for where, chosen in chunks:
            result[where] = grouped_blocks(
                fmt, natural[chosen], scale_bits[chosen], None if points is None else points[chosen]
            )
        return result

    used = (packed, scales, shape) if zeros is None else (packed, scales, shape, zeros)
    return QuantizedTensor(
        describe(f"{module}.weight", fmt, (num_rows, cols), packed.file.path), (*used, *extras), read
    )


def _check_order(order: StoredTensor, cols: int, num_groups: int, packed: StoredTensor) -> None:
    """Groups of consecutive columns only; -1 everywhere says the same."""
    check_shape(order, ("I32", "I64"), (cols,), packed)
    values = order.array()
    if not (np.array_equal(values, np.arange(cols) // (cols // num_groups)) or bool((values == -1).all())):
        raise CheckpointError(
            order.file.path,
            "assigns columns to groups out of order (actorder: group), which cannot be run: use a checkpoint that was "
            "quantised without it, or a GGUF of this model.",
            order.name,
        )
