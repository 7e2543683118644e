"""Random checkpoints of a given architecture, and their mapping, which is by the stock model's own names.

Experts are one tensor per expert and projection, `<module>.<expert>.<part>`, so that each gets memory of its own.
"""

from __future__ import annotations

from collections.abc import Callable

from transformers import PreTrainedModel

from moesaic.models.expert_layout import expert_layout, expert_modules
from moesaic.models.tensor_ref import ExpertRefs, MlaRefs, TensorRef, whole
from moesaic.quant.formats import WeightFormat, get_format
from moesaic.weights import Checkpoint
from moesaic.weights.synthetic import SyntheticCheckpoint

__all__ = ["map_synthetic", "synthetic_checkpoint"]

_BIASES = ("gate_bias", "up_bias", "down_bias")


def synthetic_checkpoint(
    model: PreTrainedModel,
    format_of: Callable[[str, tuple[int, ...]], WeightFormat],
    name: str = "synthetic",
    seed: int = 0,
) -> SyntheticCheckpoint:
    """Random weights for a stock model (usually on the meta device).

    Args:
        model: the model; its config becomes the checkpoint's metadata.
        format_of: chooses the format of a matrix by parameter name (experts: `<module>.gate`, `.up`, `.down`) and
            shape `[rows, cols]`; vectors and tensors of more than two dimensions are F32.
        name: what to call it in messages.
        seed: seed of the random blocks.
    """
    float32 = get_format("F32")
    tensors: dict[str, tuple[WeightFormat, tuple[int, ...]]] = {}
    stacks = expert_modules(model)
    for module_name, module in stacks.items():
        layout = expert_layout(module)
        for part, shape in layout.shapes.items():
            chosen = format_of(f"{module_name}.{part}", shape) if len(shape) == 2 else float32
            for expert in range(layout.num_experts):
                tensors[f"{module_name}.{expert}.{part}"] = (chosen, shape)
    tied = set(model.all_tied_weights_keys)
    for parameter, values in model.state_dict().items():
        if parameter.rpartition(".")[0] not in stacks and parameter not in tied:
            shape = tuple(values.shape)
            tensors[parameter] = (format_of(parameter, shape) if len(shape) == 2 else float32, shape)
    return SyntheticCheckpoint(name, model.config.to_dict(), tensors, seed)


def map_synthetic(
    model: PreTrainedModel, checkpoint: Checkpoint
) -> tuple[dict[str, TensorRef], dict[str, ExpertRefs], dict[str, MlaRefs]]:
    """References by the names that `synthetic_checkpoint` gives."""
    experts: dict[str, ExpertRefs] = {}
    for name, module in expert_modules(model).items():
        layout = expert_layout(module)
        stacks = {
            part: tuple(whole(checkpoint.tensors[f"{name}.{expert}.{part}"]) for expert in range(layout.num_experts))
            for part in layout.shapes
        }
        experts[name] = ExpertRefs(
            stacks.get("gate"), stacks["up"], stacks["down"], *(stacks.get(part) for part in _BIASES)
        )
    parameters = {name: whole(checkpoint.tensors[name]) for name in model.state_dict() if name in checkpoint.tensors}
    return parameters, experts, {}
