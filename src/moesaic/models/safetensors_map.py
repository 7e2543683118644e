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

from moesaic.errors import CheckpointError, UnsupportedModelError
from moesaic.models.expert_layout import ExpertLayout, check_experts, expert_layout, expert_modules
from moesaic.models.tensor_ref import ExpertRefs, JoinedRef, MlaRefs, TensorRef, whole
from moesaic.weights import Checkpoint, TensorInfo

__all__ = ["map_safetensors"]

_PARTS = ("gate", "up", "down")


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
        layout = expert_layout(module)
        if "down_proj" in own and ("gate_up_proj" if layout.has_gate else "up_proj") in own:
            experts[name] = _expert_refs(name, layout, own, checkpoint)
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


def _expert_refs(name: str, layout: ExpertLayout, own: dict[str, _Target], checkpoint: Checkpoint) -> ExpertRefs:
    """Per-expert references, from stacked tensors or from one tensor per expert and projection."""
    down = own["down_proj"]
    if down.converter is None:
        refs = _from_stacks(layout, own, checkpoint)
    elif [type(operation) for operation in down.converter.operations] == [MergeModulelist]:
        refs = _from_lists(name, layout, own)
    else:
        raise UnsupportedModelError(
            f"{name}: experts stored with the conversion {down.converter.operations} are not known."
        )
    check_experts(name, layout, refs, checkpoint)
    return refs


def _from_lists(name: str, layout: ExpertLayout, own: dict[str, _Target]) -> ExpertRefs:
    """One tensor per expert and projection; gate and up come in the order of the converter's patterns."""
    down = tuple(whole(info) for info in own["down_proj"].all())
    if not layout.has_gate:
        return ExpertRefs(None, tuple(whole(info) for info in own["up_proj"].all()), down)
    target = own["gate_up_proj"]
    converter = target.converter
    kinds = [] if converter is None else [type(operation) for operation in converter.operations]
    if kinds != [MergeModulelist, Concatenate] or converter is None or len(converter.source_patterns) != 2:
        raise UnsupportedModelError(f"{name}: gate and up stored with the conversion {kinds} are not known.")
    gate, up = (tuple(whole(info) for info in target.sources[pattern]) for pattern in converter.source_patterns)
    return ExpertRefs(gate, up, down)


def _from_stacks(layout: ExpertLayout, own: dict[str, _Target], checkpoint: Checkpoint) -> ExpertRefs:
    """Stacked tensors `[num_experts, ...]` in the arrangement of the module."""
    infos = {key: target.all()[0] for key, target in own.items()}
    for key, info in infos.items():
        num_dims = 2 if key.endswith("_bias") else 3
        if len(info.shape) != num_dims:
            raise CheckpointError(
                checkpoint.path, f"has the shape {list(info.shape)}: expected {num_dims} dimensions.", tensor=info.name
            )
    parts: dict[str, tuple[TensorRef, ...]] = {}
    for suffix in ("", "_bias"):
        if (down := infos.get(f"down_proj{suffix}")) is not None:
            parts[f"down{suffix}"] = _pieces(layout, down, None)
        if (up := infos.get(f"up_proj{suffix}")) is not None:
            parts[f"up{suffix}"] = _pieces(layout, up, None)
        if (fused := infos.get(f"gate_up_proj{suffix}")) is not None:
            parts[f"gate{suffix}"], parts[f"up{suffix}"] = (_pieces(layout, fused, half) for half in (0, 1))
    return ExpertRefs(parts.get("gate"), parts["up"], parts["down"], *(parts.get(f"{name}_bias") for name in _PARTS))


def _pieces(layout: ExpertLayout, info: TensorInfo, half: int | None) -> tuple[TensorRef, ...]:
    """Each expert's matrix or bias; of a fused gate and up the first (0) or second (1) half."""
    is_bias = len(info.shape) == 2
    # Blocks lie along K, so quantised matrices are never stored transposed.
    transposed = layout.is_transposed and not is_bias and not info.format.is_quantized
    rows, cols = info.shape[1], info.shape[-1]
    if transposed:
        rows, cols = cols, rows
    chosen = slice(None)
    if half is not None:
        chosen = slice(half * (rows // 2), (half + 1) * (rows // 2)) if layout.is_concatenated else slice(half, None, 2)
        rows //= 2

    def rearrange(values: torch.Tensor) -> torch.Tensor:
        return (values.T if transposed else values)[chosen]

    shape = (rows,) if is_bias else (rows, cols)
    plain_rows = None if half is None or transposed or is_bias else chosen
    transform = rearrange if transposed or (is_bias and half is not None) else None
    return tuple(
        TensorRef(info.name, info.format, shape, index, rows=plain_rows, transform=transform)
        for index in range(info.shape[0])
    )
