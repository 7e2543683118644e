"""What a model looks like as a GGUF: its metadata, and which references make each tensor.

The inverse of `gguf_map.py`: from a stock model and its weight map (of any container) to the arrangement that llama.cpp
reads. It reads no tensor and chooses no formats.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from transformers import PretrainedConfig, PreTrainedModel

from moesaic.errors import UnsupportedModelError
from moesaic.models.base import Family, OutputTensor
from moesaic.models.families import family_for
from moesaic.models.gguf_map import layer_of, name_map
from moesaic.models.weight_map import WeightMap

__all__ = ["gguf_metadata", "gguf_tensors"]


def gguf_metadata(config: PretrainedConfig) -> dict[str, Any]:
    """Key-values that describe the model, without `general.architecture` and without the tokenizer.

    Raises:
        UnsupportedModelError: GGUF files of this model type are not known.
    """
    return family_for(config.model_type).metadata(config)


def gguf_tensors(model: PreTrainedModel, weight_map: WeightMap) -> list[OutputTensor]:
    """Every tensor of the GGUF of `model`, in the order of the model.

    Raises:
        UnsupportedModelError: GGUF files of this model type are not known, or a parameter has no place in them.
        CheckpointError: the checkpoint lacks a parameter.
    """
    family = family_for(model.config.model_type)
    mla = {name: refs for name, _ in model.named_modules() if (refs := weight_map.mla(name)) is not None}
    special = list(family.special_outputs(model.config, weight_map.parameters, mla))
    outputs = [*_parameter_outputs(family, model, weight_map, {output.parameter for output in special}), *special]
    for module in weight_map.expert_modules:
        outputs.extend(_expert_outputs(module, weight_map))
    position = {name: index for index, name in enumerate(model.state_dict())}
    return sorted(outputs, key=lambda output: position[_neighbour(output.parameter, weight_map)])


def _neighbour(parameter: str, weight_map: WeightMap) -> str:
    """The stock parameter that stands where an output belongs: itself, or for experts a stack of their module."""
    module = parameter.rpartition(".")[0]
    return f"{module}.down_proj" if module in weight_map.expert_modules else parameter


def _parameter_outputs(
    family: Family, model: PreTrainedModel, weight_map: WeightMap, done: set[str]
) -> Iterator[OutputTensor]:
    names = name_map(family, model.config.num_hidden_layers)
    tied = set(model.all_tied_weights_keys)
    for parameter in model.state_dict():
        if parameter in done or parameter in tied or parameter.rpartition(".")[0] in weight_map.expert_modules:
            continue
        name = family.tensor_name(parameter, names)
        if name is None:
            raise UnsupportedModelError(f"{model.config.model_type}: GGUF has no tensor for the parameter {parameter}.")
        ref = weight_map.parameter(parameter)
        order, values = family.row_order(parameter, model.config), family.value_map(parameter)
        if order is not None:
            ref = ref.select(np.argsort(order))
        if values is not None:
            ref = ref.select(slice(None), values.save)
        shape = ref.shape
        if len(shape) == 3:  # a depthwise convolution [channels, 1, kernel]
            shape = (shape[0], *(size for size in shape[1:-1] if size != 1), shape[-1])
        yield OutputTensor(name, shape, (ref,), parameter)


def _expert_outputs(module: str, weight_map: WeightMap) -> Iterator[OutputTensor]:
    for field, refs in weight_map.experts(module).named().items():
        part, _, is_bias = field.partition("_")
        name = f"blk.{layer_of(module)}.ffn_{part}_exps.{'bias' if is_bias else 'weight'}"
        yield OutputTensor(name, (len(refs), *refs[0].shape), refs, f"{module}.{part}_proj{'_bias' if is_bias else ''}")
