"""Maps safetensors names to parameters, by the conversion tables that transformers itself loads with.

Those tables know which keys were renamed, merged into stacks or split between a checkpoint and the current modules
of some hundred architectures. Experts are recognised in the arrangements listed in `_expert_refs`; everything else that
a table converts is run through transformers' own operations when it is read. The table's functions are not a public
interface of transformers: the tests say which versions fit.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import chain

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    Concatenate,
    MergeModulelist,
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    rename_source_key,
)

from moesaic.errors import UnsupportedModelError
from moesaic.models.expert_layout import check_experts, expert_modules
from moesaic.models.tensor_ref import ExpertRefs, JoinedRef, MlaRefs, TensorRef, whole
from moesaic.weights import Checkpoint, TensorInfo

__all__ = ["map_safetensors"]


@dataclass(slots=True)
class _Target:
    """What feeds one renamed parameter: the tensors of each source pattern, and the converter that joins them."""

    converter: WeightConverter | None = None
    sources: dict[str, list[TensorInfo]] = field(default_factory=lambda: defaultdict(list))

    def all(self) -> list[TensorInfo]:
        return list(chain.from_iterable(self.sources.values()))


def map_safetensors(
    model: PreTrainedModel, checkpoint: Checkpoint
) -> tuple[dict[str, TensorRef], dict[str, ExpertRefs], dict[str, MlaRefs]]:
    """References for the parameters and the experts modules of `model`; safetensors never split MLA's `kv_b_proj`."""
    targets = _collect(model, checkpoint)
    experts: dict[str, ExpertRefs] = {}
    for name, module in expert_modules(model).items():
        own = {key.removeprefix(f"{name}."): target for key, target in targets.items() if key.startswith(f"{name}.")}
        for key in own:
            del targets[f"{name}.{key}"]
        if "down_proj" in own and ("gate_up_proj" if module.has_gate else "up_proj") in own:
            experts[name] = _expert_refs(name, module, own, checkpoint)
    parameters: dict[str, TensorRef] = {}
    for name, target in targets.items():
        parameters |= _parameter_refs(model, name, target)
    return parameters, experts, {}


def _collect(model: PreTrainedModel, checkpoint: Checkpoint) -> dict[str, _Target]:
    """Rename every key as transformers would and group those that are converted together."""
    transforms = get_model_conversion_mapping(model)
    renamings = [item for item in transforms if isinstance(item, WeightRenaming)]
    converters = [item for item in transforms if isinstance(item, WeightConverter)]
    by_pattern = {pattern: item for item in converters for pattern in item.source_patterns}
    wanted = model.state_dict()
    prefix = model.base_model_prefix
    targets: dict[str, _Target] = defaultdict(_Target)
    for key in sorted(checkpoint.tensors, key=dot_natural_key):
        renamed, pattern = rename_source_key(key, renamings, converters, prefix, wanted)
        if renamed not in wanted and key in wanted:  # already in the modules' names
            renamed, pattern = rename_source_key(key, [], [], base_model_prefix=prefix, meta_state_dict=wanted)
        if renamed in wanted:
            target = targets[renamed]
            target.converter = by_pattern[pattern] if pattern is not None else None
            target.sources[pattern or key].append(checkpoint.tensors[key])
    return dict(targets)


def _parameter_refs(model: PreTrainedModel, name: str, target: _Target) -> dict[str, TensorRef]:
    """References for what one target feeds: itself, or all parameters that its converter splits it into."""
    converter = target.converter
    if converter is None:
        return {name: whole(target.all()[0])}
    first = converter.target_patterns[0]
    names = [name.replace(first, other) for other in converter.target_patterns]
    parts = [whole(info) for info in target.all()]
    shapes = {key: tuple(tensor.shape) for key, tensor in model.state_dict().items() if key in names}
    return {key: JoinedRef.of(parts, shape, _runner(model, name, key, target)) for key, shape in shapes.items()}


def _runner(
    model: PreTrainedModel, name: str, wanted: str, target: _Target
) -> Callable[[Sequence[torch.Tensor]], torch.Tensor]:
    """A function that runs transformers' own conversion operations on the parts' values and picks `wanted`."""
    converter = target.converter
    assert converter is not None
    counts = {pattern: len(infos) for pattern, infos in target.sources.items()}

    def run(values: Sequence[torch.Tensor]) -> torch.Tensor:
        rest = list(values)
        state: dict[str, list[torch.Tensor] | torch.Tensor] = {}
        for pattern, count in counts.items():
            state[pattern], rest = rest[:count], rest[count:]
        for operation in converter.operations:
            state = operation.convert(
                state,
                source_patterns=converter.source_patterns,
                target_patterns=converter.target_patterns,
                full_layer_name=name,
                model=model,
                config=model.config,
                missing_keys=None,
            )
        found = next((value for pattern, value in state.items() if pattern in wanted), None)
        if found is None:
            raise UnsupportedModelError(
                f"the conversion table of '{model.config.model_type}' gives nothing for {wanted}."
            )
        return found[0] if isinstance(found, list) else found

    return run


def _expert_refs(name: str, module: nn.Module, own: dict[str, _Target], checkpoint: Checkpoint) -> ExpertRefs:
    """Per-expert references, from stacked tensors or from one tensor per expert and projection."""
    down = own["down_proj"]
    if down.converter is None:
        refs = _from_stacks(module, own)
    elif [type(operation) for operation in down.converter.operations] == [MergeModulelist]:
        refs = _from_lists(name, module, own)
    else:
        raise UnsupportedModelError(
            f"{name}: experts stored with the conversion {down.converter.operations} are not known."
        )
    check_experts(name, module, refs, checkpoint)
    return refs


def _from_lists(name: str, module: nn.Module, own: dict[str, _Target]) -> ExpertRefs:
    """One tensor per expert and projection; gate and up come in the order of the converter's patterns."""
    down = tuple(whole(info) for info in own["down_proj"].all())
    if not module.has_gate:
        return ExpertRefs(None, tuple(whole(info) for info in own["up_proj"].all()), down)
    target = own["gate_up_proj"]
    converter = target.converter
    kinds = [] if converter is None else [type(operation) for operation in converter.operations]
    if kinds != [MergeModulelist, Concatenate] or converter is None or len(converter.source_patterns) != 2:
        raise UnsupportedModelError(f"{name}: gate and up stored with the conversion {kinds} are not known.")
    gate, up = (tuple(whole(info) for info in target.sources[pattern]) for pattern in converter.source_patterns)
    return ExpertRefs(gate, up, down)


def _transpose(values: torch.Tensor) -> torch.Tensor:
    return values.T


def _from_stacks(module: nn.Module, own: dict[str, _Target]) -> ExpertRefs:
    """Stacked tensors `[num_experts, ...]` in the arrangement of the module."""

    def info_of(key: str) -> TensorInfo | None:
        return own[key].all()[0] if key in own else None

    def halves(key: str) -> tuple[tuple[TensorRef, ...], tuple[TensorRef, ...]]:
        info = info_of(key)
        assert info is not None
        return _half(module, info, 0), _half(module, info, 1)

    down_info, down_bias_info = info_of("down_proj"), info_of("down_proj_bias")
    assert down_info is not None
    down = _matrices(down_info, transposed=module.is_transposed)
    down_bias = None if down_bias_info is None else _vectors(down_bias_info)
    if not module.has_gate:
        up_info, up_bias_info = info_of("up_proj"), info_of("up_proj_bias")
        assert up_info is not None
        up_bias = None if up_bias_info is None else _vectors(up_bias_info)
        return ExpertRefs(None, _matrices(up_info, module.is_transposed), down, None, up_bias, down_bias)
    gate, up = halves("gate_up_proj")
    gate_bias, up_bias = halves("gate_up_proj_bias") if "gate_up_proj_bias" in own else (None, None)
    return ExpertRefs(gate, up, down, gate_bias, up_bias, down_bias)


def _matrices(info: TensorInfo, transposed: bool) -> tuple[TensorRef, ...]:
    rows, cols = info.shape[-2:]
    if not transposed:
        return tuple(TensorRef(info.name, info.format, (rows, cols), index) for index in range(info.shape[0]))
    return tuple(
        TensorRef(info.name, info.format, (cols, rows), index, transform=_transpose) for index in range(info.shape[0])
    )


def _vectors(info: TensorInfo) -> tuple[TensorRef, ...]:
    return tuple(TensorRef(info.name, info.format, info.shape[1:], index) for index in range(info.shape[0]))


def _half(module: nn.Module, info: TensorInfo, which: int) -> tuple[TensorRef, ...]:
    """Gate (0) or up (1) of each expert of a fused stack: a matrix `[2I, H]`, its transpose, or a bias `[2I]`."""
    is_bias = len(info.shape) == 2
    fused = info.shape[1] if is_bias or not module.is_transposed else info.shape[2]
    half = fused // 2
    chosen = slice(which * half, (which + 1) * half) if module.is_concatenated else slice(which, fused, 2)
    if is_bias:
        return tuple(
            TensorRef(info.name, info.format, (half,), index, transform=lambda values: values[chosen])
            for index in range(info.shape[0])
        )
    if module.is_transposed:
        shape = (half, info.shape[1])
        return tuple(
            TensorRef(info.name, info.format, shape, index, transform=lambda values: values[:, chosen].T)
            for index in range(info.shape[0])
        )
    return tuple(
        TensorRef(info.name, info.format, (half, info.shape[2]), index, rows=chosen) for index in range(info.shape[0])
    )
