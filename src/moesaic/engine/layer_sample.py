"""A model of a few layers of another one, of the same shapes and formats, with random weights.

A step of it costs per layer what a step of the whole model costs, and fits where the whole does not. Layers are chosen
so that kinds of layers (dense or with experts, sliding or full attention, mixed formats) have their share of the time,
as far as so few layers allow. Nothing of the model's weights is read; what the layers compute is not looked at.
"""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from moesaic.engine.loader import Prepared
from moesaic.models import ExpertRefs, MlaRefs, TensorRef, WeightMap
from moesaic.placement import Placement, Plan
from moesaic.quant import WeightFormat, get_format
from moesaic.weights.synthetic import SyntheticCheckpoint

__all__ = ["LayerCost", "choose_layers", "layer_costs", "take_layers"]

_SEED = 0


@dataclass(frozen=True, slots=True)
class LayerCost:
    """One decoder layer of a plan.

    Attributes:
        kind: equal for layers whose modules, formats and sizes are equal.
        nbytes: bytes of its weights.
        bytes_per_token: bytes of them that a token reads.
        has_cache: whether it keeps something of every token, which a linear attention does not.
    """

    kind: str
    nbytes: int
    bytes_per_token: int
    has_cache: bool = True


def layer_costs(prepared: Prepared) -> list[LayerCost]:
    """Every decoder layer of a prepared model, in order."""
    prefix, layers = _layers_of(prepared.model)
    entries: list[list[Placement]] = [[] for _ in layers]
    for entry in prepared.plan.entries:
        found = _layer_of(entry.module, prefix)
        if found is not None:
            entries[found].append(entry)
    kinds = getattr(prepared.config.get_text_config(), "layer_types", None) or [""] * len(layers)
    return [
        LayerCost(
            str((kind, [_kind(entry, f"{prefix}{index}") for entry in group])),
            sum(entry.nbytes for entry in group),
            sum(entry.bytes_per_token for entry in group),
            any(entry.kv_bytes_per_position for entry in group),
        )
        for index, (kind, group) in enumerate(zip(kinds, entries, strict=True))
    ]


def choose_layers(costs: Sequence[LayerCost], bytes_per_token: int, max_bytes: int) -> list[int]:
    """Choose layers that stand for all.

    A kind gets its next layer when it has fewest for the bytes that its layers read (the method of D'Hondt). The first
    layer has a cache of tokens, without which no model can say how long its sequence is.

    Args:
        costs: of all layers.
        bytes_per_token: bytes that a token shall read in the chosen layers together; all layers if they read less.
        max_bytes: most bytes of weights of the chosen layers, of which there is one at least.

    Returns:
        Numbers of layers, ascending; of each kind they are spread over those that there are.
    """
    kinds: dict[str, list[int]] = defaultdict(list)
    for index, cost in enumerate(costs):
        kinds[cost.kind].append(index)
    taken = dict.fromkeys(kinds, 0)
    nbytes = per_token = 0
    while sum(taken.values()) < len(costs) and per_token < bytes_per_token:
        left = [kind for kind, indices in kinds.items() if taken[kind] < len(indices)]
        if not nbytes:
            left = [kind for kind in left if costs[kinds[kind][0]].has_cache] or left
        kind = max(left, key=lambda name: sum(costs[i].bytes_per_token for i in kinds[name]) / (taken[name] + 1))
        cost = costs[kinds[kind][0]]
        if nbytes + cost.nbytes > max_bytes and nbytes:
            break
        taken[kind] += 1
        nbytes, per_token = nbytes + cost.nbytes, per_token + cost.bytes_per_token
    spread = [kinds[kind][i * len(kinds[kind]) // count] for kind, count in taken.items() for i in range(count)]
    return sorted(spread)


def take_layers(prepared: Prepared, chosen: Sequence[int]) -> Prepared:
    """A model of the chosen layers and of what is outside the layers, with random weights, ready to be loaded.

    Modules lie and are held as the plan of the whole model says.

    Args:
        prepared: the whole model, which stays as it is.
        chosen: numbers of layers, ascending.
    """
    prefix, _ = _layers_of(prepared.model)
    model = _cut(prepared.model, chosen)
    names = _Names(prefix, {old: new for new, old in enumerate(chosen)})
    entries = tuple(
        replace(entry, module=renamed)
        for entry in prepared.plan.entries
        if (renamed := names.new(entry.module)) is not None
    )
    plan = replace(prepared.plan, entries=entries, warnings=(), notes=())
    random = _RandomWeights(prepared.plan)
    parameters = {
        renamed: random.of(name, renamed, ref)
        for name, ref in prepared.weight_map.parameters.items()
        if (renamed := names.new(name)) is not None
    }
    experts: dict[str, ExpertRefs] = {}
    mla: dict[str, MlaRefs] = {}
    for entry in prepared.plan.entries:
        renamed = names.new(entry.module)
        if renamed is None:
            continue
        if entry.role == "experts":
            parts = prepared.weight_map.experts(entry.module).named()
            made = {key: random.stack(f"{entry.module}.{key}", f"{renamed}.{key}", refs) for key, refs in parts.items()}
            biases = (made.get(key) for key in ("gate_bias", "up_bias", "down_bias"))
            experts[renamed] = ExpertRefs(made.get("gate"), made["up"], made["down"], *biases)
        if (halves := prepared.weight_map.mla(entry.module)) is not None:
            mla[renamed] = MlaRefs(
                random.stack(f"{entry.module}.k_b", f"{renamed}.k_b", halves.k_b),
                random.stack(f"{entry.module}.v_b", f"{renamed}.v_b", halves.v_b),
            )
    checkpoint = random.checkpoint(prepared)
    weight_map = WeightMap(checkpoint.path, parameters, experts, mla, (), ())
    return Prepared(checkpoint, model.config, model, weight_map, plan)


def _kind(entry: Placement, layer: str) -> tuple[object, ...]:
    formats = tuple(sorted(entry.formats.items()))
    name = entry.module.removeprefix(layer)
    return name, entry.class_name, entry.implementation, formats, entry.nbytes, entry.bytes_per_token


def _layers_of(model: PreTrainedModel) -> tuple[str, nn.ModuleList]:
    """The decoder's layers, and what their qualified names begin with, e.g. `model.layers.`."""
    layers = model.get_decoder().layers
    name = next(name for name, module in model.named_modules() if module is layers)
    return f"{name}.", layers


def _layer_of(name: str, prefix: str) -> int | None:
    """The number of the layer that a module or parameter belongs to; None outside the layers."""
    return int(name.removeprefix(prefix).partition(".")[0]) if name.startswith(prefix) else None


@dataclass(frozen=True, slots=True)
class _Names:
    """Names in the model of chosen layers."""

    prefix: str
    numbers: dict[int, int]

    def new(self, name: str) -> str | None:
        """What a module or parameter is called there; None if it belongs to a layer that was not chosen."""
        layer = _layer_of(name, self.prefix)
        if layer is None:
            return name
        if layer not in self.numbers:
            return None
        rest = name.removeprefix(f"{self.prefix}{layer}")
        return f"{self.prefix}{self.numbers[layer]}{rest}"


def _cut(whole_model: PreTrainedModel, chosen: Sequence[int]) -> PreTrainedModel:
    """A copy with the chosen layers only, on the meta device; caches and masks are made for so many layers."""
    model = copy.deepcopy(whole_model)
    decoder = model.get_decoder()
    decoder.layers = nn.ModuleList(decoder.layers[index] for index in chosen)
    for number, layer in enumerate(decoder.layers):
        for module in layer.modules():
            if hasattr(module, "layer_idx"):
                module.layer_idx = number
    for config in _configs_of(model):
        config.num_hidden_layers = len(chosen)
        kinds: Any = getattr(config, "layer_types", None)
        if kinds is not None:
            config.layer_types = [kinds[index] for index in chosen]
    return model


def _configs_of(model: PreTrainedModel) -> list[PretrainedConfig]:
    """Every configuration that a module of the model holds, once; copies of one may be several objects."""
    found = [model.config.get_text_config()]
    for module in model.modules():
        config = getattr(module, "config", None)
        if isinstance(config, PretrainedConfig) and hasattr(config, "num_hidden_layers"):
            found.append(config)
    return list({id(config): config for config in found}.values())


class _RandomWeights:
    """Tensors of a random checkpoint, in the formats in which a plan holds them, so that none is converted."""

    def __init__(self, plan: Plan) -> None:
        self._formats = {f"{entry.module}.{key}": fmt for entry in plan.entries for key, fmt in entry.formats.items()}
        self._tensors: dict[str, tuple[WeightFormat, tuple[int, ...]]] = {}
        self._known: dict[int, str] = {}  # a tied parameter is one reference under two names

    def of(self, old: str, new: str, ref: TensorRef) -> TensorRef:
        """A reference to a tensor for what `ref` is for: one if it is the same `ref` again."""
        name = self._known.setdefault(id(ref), new)
        self._tensors.setdefault(name, (self._format(old, ref), ref.shape))
        return self._made(name)

    def stack(self, old: str, new: str, refs: Sequence[TensorRef]) -> tuple[TensorRef, ...]:
        """A tensor of its own for each of them."""
        made = []
        for index, ref in enumerate(refs):
            name = f"{new}.{index}"
            self._tensors[name] = (self._format(old, ref), ref.shape)
            made.append(self._made(name))
        return tuple(made)

    def checkpoint(self, prepared: Prepared) -> SyntheticCheckpoint:
        """What the references refer to."""
        name = f"random weights of the shapes of {prepared.checkpoint.path.name}"
        return SyntheticCheckpoint(name, prepared.checkpoint.metadata, self._tensors, _SEED)

    def _format(self, old: str, ref: TensorRef) -> WeightFormat:
        if len(ref.shape) != 2 or old not in self._formats:
            return get_format("F32")
        held = get_format(self._formats[old])
        return held if held.recodes is None else ref.format

    def _made(self, name: str) -> TensorRef:
        fmt, shape = self._tensors[name]
        return TensorRef(name, fmt, shape)
