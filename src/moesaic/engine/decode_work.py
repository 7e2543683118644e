"""What a decode step multiplies: a plan taken apart into products of known shapes and formats.

It measures nothing. Norms, rotations, attention over the cache, routing and the choice of a token are no products of
weights and are left out; so are biases.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from moesaic.engine.loader import Prepared
from moesaic.models import WeightMap
from moesaic.placement import Placement
from moesaic.quant import WeightFormat, get_format

__all__ = ["DecodeWork", "ExpertLayer", "Matrix", "decode_work"]

_NOT_MULTIPLIED = frozenset({"embedding", "norm", "experts"})


@dataclass(frozen=True, slots=True)
class Matrix:
    """One matrix `[rows, cols]` that a token is multiplied with."""

    format: WeightFormat
    rows: int
    cols: int

    @property
    def nbytes(self) -> int:
        """Bytes of its blocks."""
        return self.format.nbytes(self.rows, self.cols)


@dataclass(frozen=True, slots=True)
class ExpertLayer:
    """The routed experts of one layer: gate and up `[intermediate, hidden]`, down `[hidden, intermediate]`.

    Attributes:
        gate: format, None without a gate.
        up: format.
        down: format.
        hidden: width of the layer.
        intermediate: width between up and down.
        num_experts: experts of the layer.
        top_k: experts that a token uses.
    """

    gate: WeightFormat | None
    up: WeightFormat
    down: WeightFormat
    hidden: int
    intermediate: int
    num_experts: int
    top_k: int

    @property
    def expert_bytes(self) -> int:
        """Bytes of one expert."""
        inner = [part for part in (self.gate, self.up) if part is not None]
        nbytes = sum(part.nbytes(self.intermediate, self.hidden) for part in inner)
        return nbytes + self.down.nbytes(self.hidden, self.intermediate)


@dataclass(frozen=True, slots=True)
class DecodeWork:
    """The products of one decode step.

    Attributes:
        experts: kinds of layers' routed experts, and how many layers have each.
        layers: the other matrices of a layer in the order of its modules, and how many layers have the same.
        outside: matrices outside the layers: the head.
        num_layers: layers of the model.
        vocab_size: tokens to choose from.
        expert_bytes: bytes of experts that a token reads (from the plan).
        bytes_per_token: bytes of all weights that a token reads (from the plan).
    """

    experts: Counter[ExpertLayer]
    layers: Counter[tuple[Matrix, ...]]
    outside: tuple[Matrix, ...]
    num_layers: int
    vocab_size: int
    expert_bytes: int
    bytes_per_token: int


def decode_work(prepared: Prepared) -> DecodeWork:
    """Take a prepared model's plan apart.

    A layer's parts that stay with transformers are counted as products in their format too, which is what they cost at
    least.
    """
    experts: Counter[ExpertLayer] = Counter()
    layers: dict[str, list[Matrix]] = {}
    outside: list[Matrix] = []
    expert_bytes = 0
    for entry in prepared.plan.entries:
        if entry.role == "experts":
            experts[_expert_layer(entry, prepared.weight_map)] += 1
            expert_bytes += entry.bytes_per_token
        layer = next((part for part in entry.module.split(".") if part.isdecimal()), None)
        group = outside if layer is None else layers.setdefault(layer, [])
        group.extend(_matrices(entry, prepared.weight_map))
    config = prepared.config.get_text_config()
    return DecodeWork(
        experts=experts,
        layers=Counter(tuple(group) for group in layers.values()),
        outside=tuple(outside),
        num_layers=int(config.num_hidden_layers),
        vocab_size=int(config.vocab_size),
        expert_bytes=expert_bytes,
        bytes_per_token=prepared.plan.bytes_per_token,
    )


def _expert_layer(entry: Placement, weight_map: WeightMap) -> ExpertLayer:
    refs = weight_map.experts(entry.module)
    intermediate, hidden = refs.up[0].shape
    num_experts = len(refs.up)
    return ExpertLayer(
        gate=get_format(entry.formats["gate"]) if "gate" in entry.formats else None,
        up=get_format(entry.formats["up"]),
        down=get_format(entry.formats["down"]),
        hidden=hidden,
        intermediate=intermediate,
        num_experts=num_experts,
        top_k=max(1, round(num_experts * entry.bytes_per_token / entry.nbytes)),
    )


def _matrices(entry: Placement, weight_map: WeightMap) -> list[Matrix]:
    """The matrices of a module that is not one of experts; an attention's split `kv_b` counts as two."""
    if entry.role in _NOT_MULTIPLIED:
        return []
    mla = weight_map.mla(entry.module)
    found = []
    for key, name in entry.formats.items():
        if mla is not None and key in ("k_b", "v_b"):
            heads = mla.k_b if key == "k_b" else mla.v_b
            shape: tuple[int, ...] = (len(heads) * heads[0].shape[0], heads[0].shape[1])
        else:
            shape = weight_map.parameter(f"{entry.module}.{key}").shape
        if len(shape) == 2:
            found.append(Matrix(get_format(name), *shape))
    return found
