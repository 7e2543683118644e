"""Experts that arrive one layer late in decode on a GPU: whether a plan has any use for that, and what is said of it.

How they are computed is in csrc/deferral.h; this module knows plans and numbers.
"""

from __future__ import annotations

from moesaic.errors import ConfigError
from moesaic.placement import Plan
from moesaic.placement.roles import layer_of

__all__ = ["check_deferral", "deferral_note", "experts_per_token"]


def experts_per_token(plan: Plan) -> tuple[int, ...]:
    """Of each layer whose routed experts the CPU computes for layers on a GPU, how many experts a token has."""
    return tuple(
        max(1, round(entry.num_experts * entry.bytes_per_token / entry.nbytes))
        for entry in plan.entries
        if entry.role == "experts" and entry.device == "cpu" and layer_of(entry.module) in plan.gpu_layers
    )


def check_deferral(plan: Plan, count: int, option: str = "--defer-experts") -> None:
    """Refuse to defer experts where that cannot be, or would change nothing.

    Args:
        plan: of the model.
        count: experts of each token that arrive one layer late; 0 is never refused.
        option: by which they were asked for.

    Raises:
        ConfigError: no layer on a GPU has experts on the CPU, or only one; or a token has not more than `count`.
    """
    if count == 0:
        return
    per_layer = experts_per_token(plan)
    if len(per_layer) < 2:
        found = "only one layer" if per_layer else "no layer"
        raise ConfigError(
            f"{option} {count}: with the plan '{plan.name}', as {plan.strategy}, {found} on a GPU has routed experts "
            "on the CPU, so none could arrive a layer late. Leave it out, or choose the plan 'hybrid'."
        )
    if not 0 < count < min(per_layer):
        raise ConfigError(
            f"{option} {count}: a token has {min(per_layer)} experts, at least one of which has to be on time: "
            f"expected 0 to {min(per_layer) - 1}."
        )


def deferral_note(plan: Plan, count: int) -> str:
    """What people should know of a model whose experts are deferred."""
    return (
        f"{count} of {max(experts_per_token(plan))} experts arrive one layer late; answers differ slightly from the "
        "exact model."
    )
