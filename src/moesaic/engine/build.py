"""Turns a stock model on the meta device into one on packed weights: replaces modules and lists what has to be read.

Which module becomes what is the plan's decision; this module carries it out. It knows neither files nor threads
(`packing` does), and it takes over no forward (`modules` does).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from moesaic.engine.packing import Job, pack_matrix
from moesaic.errors import UnsupportedModelError
from moesaic.kernels import PackedExperts, PackedTensor, SlicedTensor, cut_intermediate, empty_stack
from moesaic.models import TensorRef, WeightMap, stock_experts
from moesaic.modules import FAMILIES, SPLIT_KV_B, PackedEmbedding, PackedLinear, RoutedExperts, activation_of
from moesaic.placement import Placement, Plan
from moesaic.quant import get_format
from moesaic.weights import Checkpoint

__all__ = ["build_modules", "check_no_meta_tensors", "initialise_buffers"]


def build_modules(model: PreTrainedModel, weight_map: WeightMap, plan: Plan, checkpoint: Checkpoint) -> list[Job]:
    """Replace the modules of `model` as the plan says, with uninitialised storage; return the jobs that fill it.

    Returns:
        Jobs in the order of the checkpoint's tensors.

    Raises:
        UnsupportedModelError: a module needs something that the kernels do not have.
    """
    order = {name: position for position, name in enumerate(checkpoint.tensors)}
    jobs = _Builder(model, weight_map, plan).jobs()
    return sorted(jobs, key=lambda job: (order[job.sources[0]], job.index))


def initialise_buffers(model: PreTrainedModel) -> None:
    """Compute the buffers that no checkpoint holds (rotary frequencies, scales), as transformers' own loading does.

    Before weights are read: what initialises a module's buffers writes random values into its parameters too.
    """
    for module in model.modules():
        names = [name for name in module._non_persistent_buffers_set if module._buffers.get(name) is not None]
        for name in names:
            module._buffers[name] = torch.empty_like(module._buffers[name], device="cpu")
        if names:
            with torch.no_grad():
                model._init_weights(module)


def check_no_meta_tensors(model: PreTrainedModel) -> None:
    """Refuse a model of which something has no values.

    Raises:
        UnsupportedModelError: naming the tensors.
    """
    tensors = [*model.named_parameters(), *model.named_buffers()]
    empty = [name for name, tensor in tensors if tensor.device.type == "meta"]
    if empty:
        raise UnsupportedModelError(
            f"{type(model).__name__}: no values for {', '.join(empty[:5])}{' ...' if len(empty) > 5 else ''}: neither "
            "the checkpoint nor the plan covers them."
        )


class _Builder:
    """One run of `build_modules`."""

    def __init__(self, model: PreTrainedModel, weight_map: WeightMap, plan: Plan) -> None:
        self._model, self._weight_map, self._plan = model, weight_map, plan
        self._embedding_name = next((name for name, module in model.named_modules() if module is _embedding(model)), "")
        self._tied = frozenset(
            target.removesuffix(".weight")
            for target, source in model.all_tied_weights_keys.items()
            if source == f"{self._embedding_name}.weight"
        )

    def jobs(self) -> Iterator[Job]:
        for name, module in list(self._model.named_modules()):
            if name not in self._plan:
                continue
            placement = self._plan.of(name)
            packed = placement.implementation == "moesaic"
            if placement.role == "experts":
                yield from self._experts(name, module, placement) if packed else self._stock_experts(name, module)
            elif packed and type(module) is nn.Linear and placement.role != "router":
                yield from self._linear(name, module, placement)
            elif packed and type(module) is nn.Embedding:
                yield from self._embedding(name, module, placement)
            else:
                yield from self._floats(name, module)
            if placement.role == "attention" and self._weight_map.mla(name) is not None:
                yield from self._split_kv_b(name, module, placement)

    def _linear(self, name: str, module: nn.Linear, placement: Placement) -> Iterator[Job]:
        weight = self._shared_with_embedding(name, placement)
        if weight is None:
            fmt = get_format(placement.formats["weight"])
            weight = PackedTensor.empty(fmt, module.out_features, module.in_features)
            yield _matrix_job(self._weight_map.parameter(f"{name}.weight"), weight)
        bias = None if module.bias is None else torch.empty(module.out_features)
        self._model.set_submodule(name, PackedLinear(weight, bias))
        if bias is not None:
            yield _float_job(self._weight_map.parameter(f"{name}.bias"), bias)

    def _shared_with_embedding(self, name: str, placement: Placement) -> PackedTensor | None:
        """The embedding's packed matrix if this head is tied to it and the plan wants both alike."""
        embedding = _embedding(self._model)
        if name not in self._tied or not isinstance(embedding, PackedEmbedding):
            return None
        return embedding.packed if embedding.packed.format.name == placement.formats["weight"] else None

    def _embedding(self, name: str, module: nn.Embedding, placement: Placement) -> Iterator[Job]:
        fmt = get_format(placement.formats["weight"])
        weight = PackedTensor.empty(fmt, module.num_embeddings, module.embedding_dim)
        self._model.set_submodule(name, PackedEmbedding(weight, module.padding_idx))
        yield _matrix_job(self._weight_map.parameter(f"{name}.weight"), weight)

    def _experts(self, name: str, module: nn.Module, placement: Placement) -> Iterator[Job]:
        stacks: dict[str, PackedTensor | SlicedTensor] = {}
        biases: dict[str, torch.Tensor] = {}
        parts = self._weight_map.experts(name)
        sizes = cut_intermediate(parts.down[0].shape[1], get_format(placement.formats["down"]))
        for key, refs in parts.named().items():
            if key.endswith("_bias"):
                bias = biases[key] = torch.empty(len(refs), *refs[0].shape)
                yield from (_float_job(ref, bias[expert]) for expert, ref in enumerate(refs))
            else:
                rows, cols = refs[0].shape
                fmt = get_format(placement.formats[key])
                stack = empty_stack(fmt, rows, cols, len(refs), sizes, "cols" if key == "down" else "rows")
                stacks[key] = stack
                yield from (_matrix_job(ref, stack, expert) for expert, ref in enumerate(refs))
        packed = PackedExperts(
            stacks.get("gate"),
            stacks["up"],
            stacks["down"],
            biases.get("gate_bias"),
            biases.get("up_bias"),
            biases.get("down_bias"),
            activation=activation_of(module, name),
        )
        self._model.set_submodule(name, RoutedExperts(packed))

    def _stock_experts(self, name: str, module: nn.Module) -> Iterator[Job]:
        refs = self._weight_map.experts(name)
        parts = [ref for part in refs.named().values() for ref in part]

        def run(checkpoint: Checkpoint) -> None:
            for key, values in stock_experts(module, refs, checkpoint).items():
                _set_tensor(module, key, values)

        sources = tuple(dict.fromkeys(source for ref in parts for source in ref.sources))
        yield Job(sources, sum(ref.nbytes for ref in parts), 0, run)

    def _split_kv_b(self, name: str, module: Any, placement: Placement) -> Iterator[Job]:
        """MLA whose file stores `kv_b_proj` as two stacks of one matrix per head."""
        if placement.implementation != "moesaic" or self._model.config.model_type not in FAMILIES:
            yield from self._floats(f"{name}.kv_b_proj", module.kv_b_proj)
            return
        refs = self._weight_map.mla(name)
        assert refs is not None
        stacks = []
        for key, heads in (("k_b", refs.k_b), ("v_b", refs.v_b)):
            rows, cols = heads[0].shape
            stack = PackedTensor.empty(get_format(placement.formats[key]), rows, cols, len(heads))
            stacks.append(stack)
            yield from (_matrix_job(ref, stack, head) for head, ref in enumerate(heads))
        setattr(module, SPLIT_KV_B, tuple(stacks))
        module.kv_b_proj = None

    def _floats(self, name: str, module: nn.Module) -> Iterator[Job]:
        """Parameters and persistent buffers of the module itself, as float32 tensors."""
        persistent = [key for key in module._buffers if key not in module._non_persistent_buffers_set]
        for key in [*module._parameters, *persistent]:
            if getattr(module, key) is None:
                continue
            embedding = _embedding(self._model)
            if name in self._tied and key == "weight" and isinstance(embedding, nn.Embedding):
                module.weight = embedding.weight
                continue
            ref = self._weight_map.parameter(f"{name}.{key}")
            values = torch.empty(ref.shape)
            _set_tensor(module, key, values)
            yield _float_job(ref, values)


def _embedding(model: PreTrainedModel) -> nn.Module:
    embedding = model.get_input_embeddings()
    assert isinstance(embedding, nn.Module)
    return embedding


def _set_tensor(module: nn.Module, name: str, values: torch.Tensor) -> None:
    """Put values in place of a parameter or buffer of the module."""
    if name in module._buffers:
        module._buffers[name] = values
    else:
        module._parameters[name] = nn.Parameter(values, requires_grad=False)


def _matrix_job(ref: TensorRef, packed: PackedTensor | SlicedTensor, index: int = 0) -> Job:
    requantises = ref.format != packed.format and packed.format.recodes != ref.format.ggml_type
    return Job.of(ref, lambda checkpoint: pack_matrix(ref, checkpoint, packed, index), requantises)


def _float_job(ref: TensorRef, destination: torch.Tensor) -> Job:
    def run(checkpoint: Checkpoint) -> None:
        destination.copy_(ref.read_float(checkpoint))

    return Job.of(ref, run)
