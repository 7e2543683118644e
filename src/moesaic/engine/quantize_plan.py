"""What a quantised file will hold: its metadata, its tensors, and the format of each. Reads no weight.

A GGUF keeps its names, order and metadata, whatever they are. Safetensors are rearranged as llama.cpp's converter does
(`models.gguf_export`). Either way each tensor is known by the stock module that it feeds, so the rules of a placement
file mean here what they mean in `moesaic plan`.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import gguf
from transformers import PreTrainedModel

from moesaic.engine.format_choice import choose_format, may_be_quantized
from moesaic.errors import CheckpointError, TokenizerError
from moesaic.models import (
    TensorRef,
    WeightMap,
    build_meta_model,
    build_weight_map,
    config_for,
    sampling_metadata,
    tokenizer_metadata,
)
from moesaic.models.base import OutputTensor
from moesaic.models.families import family_for
from moesaic.models.gguf_export import gguf_metadata, gguf_tensors
from moesaic.placement import Rules
from moesaic.placement.roles import module_roles
from moesaic.placement.rules import DEFAULT_RULE, Rule
from moesaic.quant import WeightFormat
from moesaic.weights import Checkpoint, TensorInfo

__all__ = ["PlannedTensor", "QuantizePlan", "make_quantize_plan"]

_QUANTIZATION_VERSION = 2  # of ggml's block layouts, which have not changed since 2023
# Keys that say how the old file was laid out.
_LAYOUT_KEYS = (
    "general.architecture",
    "general.alignment",
    "general.file_type",
    "general.quantization_version",
    "split.",
)
# `general.file_type` for readers that print it: files whose matrices mostly have one format.
_FILE_TYPES: Mapping[str, gguf.LlamaFileType] = MappingProxyType(
    {
        "F32": gguf.LlamaFileType.ALL_F32,
        "F16": gguf.LlamaFileType.MOSTLY_F16,
        "BF16": gguf.LlamaFileType.MOSTLY_BF16,
        "Q4_0": gguf.LlamaFileType.MOSTLY_Q4_0,
        "Q4_1": gguf.LlamaFileType.MOSTLY_Q4_1,
        "Q5_0": gguf.LlamaFileType.MOSTLY_Q5_0,
        "Q5_1": gguf.LlamaFileType.MOSTLY_Q5_1,
        "Q8_0": gguf.LlamaFileType.MOSTLY_Q8_0,
        "Q2_K": gguf.LlamaFileType.MOSTLY_Q2_K,
        "Q3_K": gguf.LlamaFileType.MOSTLY_Q3_K_S,
        "Q4_K": gguf.LlamaFileType.MOSTLY_Q4_K_S,
        "Q5_K": gguf.LlamaFileType.MOSTLY_Q5_K_S,
        "Q6_K": gguf.LlamaFileType.MOSTLY_Q6_K,
        "IQ4_NL": gguf.LlamaFileType.MOSTLY_IQ4_NL,
        "IQ4_XS": gguf.LlamaFileType.MOSTLY_IQ4_XS,
        "MXFP4": gguf.LlamaFileType.MOSTLY_MXFP4_MOE,
    }
)


@dataclass(frozen=True, slots=True)
class PlannedTensor:
    """One tensor of the file to write.

    Attributes:
        name: name in the GGUF.
        shape: row-major, K last.
        parts: matrices of the checkpoint whose rows, one after the other, make the tensor.
        format: what it is written in.
    """

    name: str
    shape: tuple[int, ...]
    parts: tuple[TensorRef, ...]
    format: WeightFormat

    @property
    def nbytes(self) -> int:
        """Bytes of its blocks."""
        return self.format.nbytes(math.prod(self.shape[:-1]), self.shape[-1])


@dataclass(frozen=True, slots=True)
class QuantizePlan:
    """Everything that is decided before a weight is read.

    Attributes:
        architecture: `general.architecture`.
        metadata: all other key-values.
        tensors: in the order of the file.
        notes: what the person who asked should know.
    """

    architecture: str
    metadata: Mapping[str, object]
    tensors: tuple[PlannedTensor, ...]
    notes: tuple[str, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of the tensors that will be written."""
        return sum(tensor.nbytes for tensor in self.tensors)

    @property
    def source_nbytes(self) -> int:
        """Bytes of the checkpoint that will be read."""
        return sum(part.nbytes for tensor in self.tensors for part in tensor.parts)

    @property
    def num_weights(self) -> int:
        """Weights in all."""
        return sum(math.prod(tensor.shape) for tensor in self.tensors)


def make_quantize_plan(checkpoint: Checkpoint, fmt: WeightFormat, rules: Rules | None = None) -> QuantizePlan:
    """Decide the format of every tensor.

    Args:
        checkpoint: a GGUF or safetensors checkpoint.
        fmt: format of matrices that neither a rule nor their role gives another one.
        rules: rules of a placement file; only their formats are used.

    Raises:
        CheckpointError: the checkpoint lacks tensors of the model.
        UnsupportedModelError: the architecture, or its form in GGUF, is not known.
    """
    notes: list[str] = []
    config = config_for(checkpoint)
    model = build_meta_model(config)
    weight_map = build_weight_map(model, checkpoint)
    if weight_map.missing:
        names = ", ".join(weight_map.missing[:5])
        raise CheckpointError(
            checkpoint.path, f"lacks {len(weight_map.missing)} tensors of the model, among them {names}."
        )
    if checkpoint.kind == "gguf":
        outputs = _gguf_outputs(checkpoint, weight_map)
        architecture = str(checkpoint.metadata["general.architecture"])
        metadata: dict[str, Any] = {
            key: value for key, value in checkpoint.metadata.items() if not key.startswith(_LAYOUT_KEYS)
        }
    else:
        outputs = gguf_tensors(model, weight_map)
        architecture = family_for(config.model_type).architecture
        metadata = {"general.name": checkpoint.path.name, **gguf_metadata(config)}
        tokenizer, notes = _tokenizer_keys(checkpoint, config.vocab_size)
        metadata |= tokenizer | sampling_metadata(checkpoint)
    metadata["general.quantization_version"] = _QUANTIZATION_VERSION
    if fmt.name in _FILE_TYPES:
        metadata["general.file_type"] = int(_FILE_TYPES[fmt.name])
    chooser = _Chooser(model, fmt, rules)
    tensors = tuple(chooser.choose(output) for output in outputs)
    return QuantizePlan(architecture, metadata, tensors, (*notes, *chooser.notes()))


def _tokenizer_keys(checkpoint: Checkpoint, vocab_size: int) -> tuple[dict[str, Any], list[str]]:
    """The tokenizer that lies beside the weights, as keys of the file, or a note why the file will have none."""
    try:
        return tokenizer_metadata(checkpoint.path, vocab_size), []
    except TokenizerError as error:
        return {}, [f"the file will hold no tokenizer: {error}"]


def _gguf_outputs(checkpoint: Checkpoint, weight_map: WeightMap) -> list[OutputTensor]:
    """The tensors of a GGUF as they are, each with the parameter that it feeds ("" if none)."""
    fed: dict[str, str] = {}
    for parameter, ref in weight_map.parameters.items():
        for source in ref.sources:
            fed.setdefault(source, parameter)
    for module in weight_map.expert_modules:
        for field, refs in weight_map.experts(module).named().items():
            for source in {source for ref in refs for source in ref.sources}:
                fed.setdefault(source, f"{module}.{field}")
    return [
        OutputTensor(name, info.shape or (1,), _matrices(info), fed.get(name, ""))
        for name, info in checkpoint.tensors.items()
    ]


def _matrices(info: TensorInfo) -> tuple[TensorRef, ...]:
    """A tensor as matrices: a stack of experts is read one by one."""
    if len(info.shape) < 3:
        return (TensorRef(info.name, info.format, info.shape),)
    return tuple(TensorRef(info.name, info.format, info.shape[1:], index) for index in range(info.shape[0]))


class _Chooser:
    """Gives each tensor its format, and remembers what is worth telling."""

    def __init__(self, model: PreTrainedModel, fmt: WeightFormat, rules: Rules | None) -> None:
        self._fmt, self._rules = fmt, rules
        self._roles = module_roles(model)
        self._classes = {name: type(module).__name__ for name, module in model.named_modules()}
        self._matched: set[Rule] = set()
        self._used: set[Rule] = set()
        self._fallbacks: dict[str, list[str]] = defaultdict(list)
        self._unknown: list[str] = []
        self._requantised: dict[str, list[str]] = defaultdict(list)

    def choose(self, output: OutputTensor) -> PlannedTensor:
        source = output.parts[0].format
        if not output.parameter:
            self._unknown.append(output.name)
            return PlannedTensor(output.name, output.shape, output.parts, source)
        module, _, projection = output.parameter.rpartition(".")
        role = self._roles[module]
        rule = DEFAULT_RULE if self._rules is None else self._rules.find(module, role, self._classes[module])
        self._matched.add(rule)
        projection = _projection(module, projection)
        if may_be_quantized(role, projection, output.shape):
            self._used.add(rule)
        choice = choose_format(role, projection, output.shape, source, self._fmt, rule)
        if choice.note is not None:
            self._fallbacks[choice.note].append(output.name)
        if source.is_quantized and choice.format != source:
            self._requantised[source.name].append(output.name)
        return PlannedTensor(output.name, output.shape, output.parts, choice.format)

    def notes(self) -> list[str]:
        notes = [f"{_some(names)}: {note}." for note, names in self._fallbacks.items()]
        for name, tensors in self._requantised.items():
            notes.append(f"{_some(tensors)}: already {name}, so errors add up: quantise the original where you can.")
        if self._unknown:
            notes.append(f"{_some(self._unknown)}: copied as they are, because the model has no such parameters.")
        if self._rules is not None:
            for rule in self._rules.rules:
                where = f"{self._rules.source}:{rule.line}"
                if rule not in self._matched:
                    notes.append(f"{where}: no tensor matches this rule ({rule}).")
                elif rule not in self._used:
                    notes.append(f"{where}: changes nothing ({rule}): norms, routers and vectors stay F32.")
        return notes


def _projection(module: str, parameter: str) -> str:
    """Name by which rules know a matrix: `gate` for experts' `gate_proj` and for a module `gate_proj`."""
    is_projection = parameter == "weight" and module.endswith("_proj")
    return (module.rpartition(".")[2] if is_projection else parameter).replace("_proj", "")


def _some(names: list[str]) -> str:
    """The first names of a list and how many more there are."""
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
