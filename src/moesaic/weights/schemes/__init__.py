"""The ways in which published safetensors checkpoints are quantised: one file per `quant_method` of config.json.

A scheme recognises the tensors that together are a quantised weight and gives the weight's rows as blocks of a format,
keeping every bit; see `base.QuantizedTensor`. It does not know what the weights are for.
"""

from __future__ import annotations

import reprlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType

from moesaic.errors import CheckpointError, UnsupportedFormatError
from moesaic.weights.safetensors_file import StoredTensor
from moesaic.weights.schemes.awq import find_awq
from moesaic.weights.schemes.base import Parts, QuantizedTensor
from moesaic.weights.schemes.compressed_tensors import find_compressed_tensors
from moesaic.weights.schemes.fp8 import find_fp8
from moesaic.weights.schemes.gptq import find_gptq
from moesaic.weights.schemes.mxfp4 import find_mxfp4

__all__ = ["QuantizedTensor", "find_quantized"]

_SCHEMES: Mapping[str, Callable[[Parts], Iterator[QuantizedTensor]]] = MappingProxyType(
    {
        "fp8": find_fp8,
        "compressed-tensors": find_compressed_tensors,
        "gptq": find_gptq,
        "awq": find_awq,
        "mxfp4": find_mxfp4,
    }
)


def find_quantized(
    config: Mapping[str, object], tensors: Mapping[str, StoredTensor], folder: Path
) -> list[QuantizedTensor]:
    """The quantised weights of a checkpoint; none if its config.json has no `quantization_config`.

    Only shapes and small index tensors are read.

    Raises:
        UnsupportedFormatError: the checkpoint is quantised in a way that is not known here.
        CheckpointError: the parts of a weight are incomplete, or contradict each other or config.json.
    """
    values = config.get("quantization_config", config.get("compression_config"))
    if values is None:
        return []
    file = folder / "config.json"
    if not isinstance(values, dict):
        raise CheckpointError(file, f"is {reprlib.repr(values)}: expected an object.", tensor="quantization_config")
    method = values.get("quant_method")
    scheme = _SCHEMES.get(method) if isinstance(method, str) else None
    if scheme is None:
        raise UnsupportedFormatError(
            f"{file}: the weights are quantised by quant_method {reprlib.repr(method)}: expected one of "
            f"{', '.join(_SCHEMES)}; use a checkpoint in one of these, in BF16, or a GGUF of this model."
        )
    found = list(scheme(Parts(file, values, tensors)))
    _check_names(found, tensors)
    return found


def _check_names(found: list[QuantizedTensor], tensors: Mapping[str, StoredTensor]) -> None:
    """A weight's name must not be that of a tensor which is not part of it, nor of another weight."""
    seen: set[str] = set()
    for tensor in found:
        name = tensor.info.name
        if name in seen or (name in tensors and tensors[name] not in tensor.parts):
            raise CheckpointError(tensor.info.file, "is there twice: quantised in parts, and as a whole.", tensor=name)
        seen.add(name)
