"""How the stacked experts modules of transformers 5 hold their weights, and conversion from references to that.

A stack is `gate_up_proj [E, 2I, H]` (or `up_proj [E, I, H]` for ungated experts) and `down_proj [E, H, I]`; some
classes store the matrices transposed or gate and up interleaved, which the decorator of transformers writes onto the
module as `is_transposed` and `is_concatenated`. It does not know how checkpoints store experts.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from moesaic.errors import CheckpointError
from moesaic.models.tensor_ref import ExpertRefs
from moesaic.weights import Checkpoint

__all__ = ["ExpertLayout", "check_experts", "expert_layout", "expert_modules", "stock_experts"]


@dataclass(frozen=True, slots=True)
class ExpertLayout:
    """Sizes and arrangement of a stack.

    Attributes:
        num_experts, hidden_size, intermediate_size: sizes.
        has_gate: whether there is a gate beside up.
        has_bias: whether the projections have biases.
        is_transposed: whether matrices are stored `[in, out]`.
        is_concatenated: whether gate and up follow each other; else their rows alternate.
    """

    num_experts: int
    hidden_size: int
    intermediate_size: int
    has_gate: bool
    has_bias: bool
    is_transposed: bool
    is_concatenated: bool

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of each part of one expert, as `ExpertRefs` names the parts."""
        inner, outer = self.intermediate_size, self.hidden_size
        shapes: dict[str, tuple[int, ...]] = {"gate": (inner, outer), "up": (inner, outer), "down": (outer, inner)}
        if self.has_bias:
            shapes |= {"gate_bias": (inner,), "up_bias": (inner,), "down_bias": (outer,)}
        return {part: shape for part, shape in shapes.items() if self.has_gate or not part.startswith("gate")}


def expert_layout(module: nn.Module) -> ExpertLayout:
    """The layout of an experts module of transformers (see `expert_modules`)."""
    down = module.get_parameter("down_proj")
    num_experts, first, second = down.shape
    transposed = bool(module.is_transposed)
    hidden_size, intermediate_size = (second, first) if transposed else (first, second)
    return ExpertLayout(
        num_experts,
        hidden_size,
        intermediate_size,
        has_gate=bool(module.has_gate),
        has_bias=bool(module.has_bias),
        is_transposed=transposed,
        is_concatenated=bool(module.is_concatenated),
    )


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
    layout = expert_layout(module)
    stacks = {
        part: torch.stack([ref.read_float(checkpoint) for ref in part_refs]) for part, part_refs in refs.named().items()
    }
    result: dict[str, torch.Tensor] = {}
    for suffix in ("", "_bias") if layout.has_bias else ("",):
        name, up, down = "up_proj", stacks[f"up{suffix}"], stacks[f"down{suffix}"]
        if layout.has_gate:
            name, gate = "gate_up_proj", stacks[f"gate{suffix}"]
            up = torch.cat([gate, up], 1) if layout.is_concatenated else torch.stack([gate, up], 2).flatten(1, 2)
        if layout.is_transposed and not suffix:
            up, down = up.transpose(1, 2).contiguous(), down.transpose(1, 2).contiguous()
        result |= {f"{name}{suffix}": up, f"down_proj{suffix}": down}
    return result


def check_experts(name: str, layout: ExpertLayout, refs: ExpertRefs, checkpoint: Checkpoint) -> None:
    """See that all parts of all experts are there, each of the shape that the module wants.

    Raises:
        CheckpointError: a part is missing, superfluous or of another shape.
    """
    found = refs.named()
    if set(found) != set(layout.shapes):
        raise CheckpointError(
            checkpoint.path, f"has experts with {sorted(found)}: expected {sorted(layout.shapes)}.", tensor=name
        )
    for part, part_refs in found.items():
        if len(part_refs) != layout.num_experts:
            raise CheckpointError(
                checkpoint.path,
                f"has {len(part_refs)} experts with '{part}': expected {layout.num_experts}.",
                tensor=name,
            )
        for ref in part_refs:
            if ref.shape != layout.shapes[part]:
                raise CheckpointError(
                    checkpoint.path,
                    f"has the shape {list(ref.shape)}: expected {list(layout.shapes[part])} for '{part}' of {name}.",
                    tensor=ref.name,
                )
