"""The role of every module of a stock Hugging Face model: what it is for, whatever its class or name.

Roles are found by structure first (a module that owns a stack of three-dimensional projections holds routed experts;
what sits beside it and has one row per expert is the router) and by the field's names second. This module knows no
architecture by name, no weights and no rules.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel

__all__ = ["ROLES", "layer_of", "module_roles"]

ROLES = ("experts", "attention", "shared_experts", "mlp", "router", "norm", "embedding", "lm_head", "other")

# Roles that everything inside a module of that role shares, apart from norms.
_INHERITED = frozenset({"attention", "shared_experts", "mlp", "router", "experts"})
_ATTENTION_NAMES = frozenset({"self_attn", "linear_attn", "attn", "attention", "self_attention"})
_ATTENTION_CLASS_WORDS = ("Attention", "DeltaNet")
_MLP_NAMES = frozenset({"mlp", "feed_forward", "ffn"})


def module_roles(model: PreTrainedModel) -> dict[str, str]:
    """The role of every module of `model`, by qualified name.

    Args:
        model: a stock Hugging Face causal language model; it may be on the meta device.

    Returns:
        One of `ROLES` for each name of `model.named_modules()`, in that order. Containers that are no unit of their
        own (the model, a decoder layer, a module list) have the role "other".
    """
    fixed = {id(model.get_input_embeddings()): "embedding"}
    head = model.get_output_embeddings()
    if head is not None:
        fixed[id(head)] = "lm_head"
    return dict(_walk(model, "", "other", fixed, 0))


def layer_of(name: str) -> int | None:
    """The decoder layer that the module of this qualified name belongs to; None outside the layers."""
    return next((int(part) for part in name.split(".") if part.isdecimal()), None)


def _walk(
    module: nn.Module, name: str, role: str, fixed: dict[int, str], num_experts: int
) -> Iterator[tuple[str, str]]:
    """Yield (name, role) of `module` and of everything below it; `num_experts` is that of the MoE block around it."""
    yield name, role
    block_experts = max((_expert_count(child) for child in module.children()), default=0) or num_experts
    for child_name, child in module.named_children():
        child_role = fixed.get(id(child)) or _role(child_name, child, role, block_experts)
        yield from _walk(child, f"{name}.{child_name}" if name else child_name, child_role, fixed, block_experts)


def _role(name: str, module: nn.Module, parent: str, num_experts: int) -> str:
    class_name = type(module).__name__
    if _expert_count(module):
        return "experts"
    if "Norm" in class_name:
        return "norm"
    if num_experts and parent == "mlp":  # a part of a MoE block
        return _role_in_moe_block(name, module, num_experts)
    if parent in _INHERITED:
        return parent
    if name in _ATTENTION_NAMES or any(word in class_name for word in _ATTENTION_CLASS_WORDS):
        return "attention"
    if name in _MLP_NAMES or class_name.endswith("MLP") or any(_expert_count(child) for child in module.children()):
        return "mlp"
    return "other"


def _role_in_moe_block(name: str, module: nn.Module, num_experts: int) -> str:
    if "shared" in name:
        return "shared_experts"
    if any(parameter.shape[0] == num_experts for parameter in module.parameters() if parameter.dim()):
        return "router"
    return "mlp"


def _expert_count(module: nn.Module) -> int:
    """Number of routed experts whose stacked projections `module` owns itself; 0 if it owns none."""
    stacks = [p.shape[0] for key, p in module.named_parameters(recurse=False) if p.dim() == 3 and "proj" in key]
    return int(stacks[0]) if stacks else 0
