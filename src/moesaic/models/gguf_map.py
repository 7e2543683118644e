"""Maps the tensors of a GGUF to the parameters of the stock model, with what the model's family says.

Row permutations act on quantised rows as they are. It does not know single architectures.
"""

from __future__ import annotations

from collections.abc import Mapping

import gguf
import numpy as np
from transformers import PretrainedConfig, PreTrainedModel

from moesaic.models.base import Family
from moesaic.models.expert_layout import check_experts, expert_layout, expert_modules
from moesaic.models.families import family_for
from moesaic.models.tensor_ref import ExpertRefs, MlaRefs, TensorRef, whole
from moesaic.weights import Checkpoint, TensorInfo

__all__ = ["layer_of", "map_gguf", "name_map"]


def name_map(family: Family, num_layers: int) -> gguf.TensorNameMap:
    """The gguf package's table from names in model files to names in GGUF files, for an architecture."""
    number = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == family.architecture)
    return gguf.get_tensor_name_map(number, num_layers)


def map_gguf(
    model: PreTrainedModel, checkpoint: Checkpoint
) -> tuple[dict[str, TensorRef], dict[str, ExpertRefs], dict[str, MlaRefs]]:
    """References for the parameters, the experts modules and MLA's halves of `model`.

    Raises:
        UnsupportedModelError: no family is known for the model.
        CheckpointError: experts are missing or of another shape.
    """
    family = family_for(model.config.model_type)
    names = name_map(family, model.config.num_hidden_layers)
    tensors = checkpoint.tensors
    experts: dict[str, ExpertRefs] = {}
    for name, module in expert_modules(model).items():
        refs = _expert_refs(layer_of(name), tensors)
        if refs is not None:
            check_experts(name, expert_layout(module), refs, checkpoint)
            experts[name] = refs
    parameters = family.special_refs(model, tensors)
    for name, wanted in model.state_dict().items():
        if name.rpartition(".")[0] in experts or name in parameters:
            continue
        ref = _parameter_ref(family, name, tuple(wanted.shape), model.config, names, tensors)
        if ref is not None:
            parameters[name] = ref
    return parameters, experts, family.mla_refs(model, tensors)


def layer_of(module: str) -> int:
    """Number of the layer that a module belongs to: the first number in its name."""
    return next(int(part) for part in module.split(".") if part.isdecimal())


def _parameter_ref(
    family: Family,
    name: str,
    wanted: tuple[int, ...],
    config: PretrainedConfig,
    names: gguf.TensorNameMap,
    tensors: Mapping[str, TensorInfo],
) -> TensorRef | None:
    stored_name = family.tensor_name(name, names)
    if stored_name is None:
        return None
    info = tensors.get(stored_name)
    if info is None:
        return _from_fused_qkv(stored_name, config, wanted, tensors)
    if [size for size in info.shape if size != 1] != [size for size in wanted if size != 1]:
        return whole(info)  # the caller compares shapes; row orders are made only for sizes that the file really has
    order, values = family.row_order(name, config), family.value_map(name)
    ref = whole(info, None if values is None else values.load, wanted)
    return ref if order is None else ref.select(order)


def _from_fused_qkv(
    stored_name: str, config: PretrainedConfig, wanted: tuple[int, ...], tensors: Mapping[str, TensorInfo]
) -> TensorRef | None:
    """q, k or v as rows of `attn_qkv`, which newer converters may write."""
    block, _, rest = stored_name.rpartition("attn_")
    which, _, suffix = rest.partition(".")
    info = tensors.get(f"{block}attn_qkv.{suffix}")
    if info is None or which not in ("q", "k", "v"):
        return None
    head_dim = int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)
    num_q, num_kv = config.num_attention_heads * head_dim, config.num_key_value_heads * head_dim
    start = {"q": 0, "k": num_q, "v": num_q + num_kv}[which]
    return _rows(info, slice(start, start + wanted[0]))


def _rows(info: TensorInfo, rows: slice) -> TensorRef:
    if len(info.shape) > 1:
        return whole(info).select(np.arange(info.shape[0])[rows])
    return whole(info, lambda values: values[rows], (len(range(info.shape[0])[rows]),))


def _stack(info: TensorInfo | None, rows: slice | None = None) -> tuple[TensorRef, ...] | None:
    """One reference per expert of `[num_experts, rows, K]` (or `[num_experts, rows]` for a bias)."""
    if info is None or len(info.shape) < 2:
        return None
    shape = info.shape[1:] if rows is None else (len(range(info.shape[1])[rows]), *info.shape[2:])
    return tuple(TensorRef(info.name, info.format, shape, index, rows) for index in range(info.shape[0]))


def _expert_refs(layer: int, tensors: Mapping[str, TensorInfo]) -> ExpertRefs | None:
    """Gate, up and down of a layer's routed experts; gate and up may be one tensor."""

    def stack(name: str) -> tuple[TensorRef, ...] | None:
        return _stack(tensors.get(f"blk.{layer}.{name}"))

    gate, up, down = (stack(f"ffn_{part}_exps.weight") for part in ("gate", "up", "down"))
    fused = tensors.get(f"blk.{layer}.ffn_gate_up_exps.weight")
    if up is None and fused is not None and len(fused.shape) == 3:
        half = fused.shape[1] // 2
        gate, up = _stack(fused, slice(0, half)), _stack(fused, slice(half, 2 * half))
    if up is None or down is None:
        return None
    gate_bias, up_bias, down_bias = (stack(f"ffn_{part}_exps.bias") for part in ("gate", "up", "down"))
    return ExpertRefs(gate, up, down, gate_bias, up_bias, down_bias)
