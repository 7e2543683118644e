"""How the stacked experts modules of transformers 5 hold their weights, and conversion from references to that.

A stack is `gate_up_proj [E, 2I, H]` (or `up_proj [E, I, H]` for ungated experts) and `down_proj [E, H, I]`; some
classes store the matrices transposed or gate and up interleaved, which the decorator of transformers writes onto the
module as `is_transposed` and `is_concatenated`. It does not know how checkpoints store experts.
"""

from __future__ import annotations

import torch
from torch import nn

from moesaic.errors import CheckpointError
from moesaic.models.tensor_ref import ExpertRefs
from moesaic.weights import Checkpoint

__all__ = ["check_experts", "expert_modules", "stock_experts"]


def expert_modules(model: nn.Module) -> dict[str, nn.Module]:
    """The stacked experts modules of a stock model, by qualified name (transformers marks their classes)."""
    return {
        name: module
        for name, module in model.named_modules()
        if hasattr(module, "is_concatenated") and hasattr(module, "has_gate") and hasattr(module, "down_proj")
    }


def stock_experts(module: nn.Module, refs: ExpertRefs, checkpoint: Checkpoint) -> dict[str, torch.Tensor]:
    """Parameters of a stock experts module, float32 in the arrangement it wants; the inverse of `ExpertRefs`.

    Used where a plan leaves a layer in the stock implementation, and by tests.
    """
    stacks = {field: torch.stack([ref.read_float(checkpoint) for ref in part]) for field, part in refs.named().items()}
    result: dict[str, torch.Tensor] = {}
    for suffix in ("", "_bias"):
        up, down, gate = stacks.get(f"up{suffix}"), stacks.get(f"down{suffix}"), stacks.get(f"gate{suffix}")
        if up is None or down is None:
            continue
        name = "up_proj"
        if gate is not None:
            name = "gate_up_proj"
            up = torch.cat([gate, up], 1) if module.is_concatenated else torch.stack([gate, up], 2).flatten(1, 2)
        if module.is_transposed and not suffix:
            up, down = up.transpose(1, 2).contiguous(), down.transpose(1, 2).contiguous()
        result |= {f"{name}{suffix}": up, f"down_proj{suffix}": down}
    return result


def check_experts(name: str, module: nn.Module, refs: ExpertRefs, checkpoint: Checkpoint) -> None:
    """See that all experts are there, each of the shape that the module wants.

    Raises:
        CheckpointError: an expert is missing or of another shape.
    """
    num_experts = module.down_proj.shape[0]
    inner, outer = module.down_proj.shape[1:] if module.is_transposed else module.down_proj.shape[:0:-1]
    shapes = {"gate": (inner, outer), "up": (inner, outer), "down": (outer, inner)}
    shapes |= {"gate_bias": (inner,), "up_bias": (inner,), "down_bias": (outer,)}
    for part, part_refs in refs.named().items():
        if len(part_refs) != num_experts:
            raise CheckpointError(
                checkpoint.path, f"has {len(part_refs)} experts with '{part}': expected {num_experts}.", tensor=name
            )
        for ref in part_refs:
            if ref.shape != shapes[part]:
                raise CheckpointError(
                    checkpoint.path,
                    f"has the shape {list(ref.shape)}: expected {list(shapes[part])} for '{part}' of {name}.",
                    tensor=ref.name,
                )
