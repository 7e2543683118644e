"""Whether a plan fits into the memory of a computer, and if not, what is missing and what to do.

It is called before anything is loaded and knows only numbers.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from moesaic.errors import PlanDoesNotFitError, PlanError
from moesaic.placement.units import format_gib
from moesaic.placement.vram import VramBudget, require_gpu

if TYPE_CHECKING:
    from moesaic.placement.gpus import Gpu
    from moesaic.placement.hardware import Hardware
    from moesaic.placement.plan import Plan

__all__ = ["DramNeeds", "check", "check_nodes", "dram_needs", "vram_problem"]

# Python, torch, the tokenizer and the activations of a prefill chunk, beside the weights and the cache.
_WORKING_BYTES = 512 * 1024**2


@dataclass(frozen=True, slots=True)
class DramNeeds:
    """Bytes of DRAM that a plan needs: weights, cache, pinned buffers and what every process takes.

    Weights that lie on the GPU pass through DRAM while a model is loaded, before there are a cache and buffers.
    """

    weights: int
    kv_cache: int
    pinned: int
    passing: int = 0
    working: int = _WORKING_BYTES

    @property
    def running(self) -> int:
        """When the model is loaded."""
        return self.weights + self.kv_cache + self.pinned + self.working

    @property
    def loading(self) -> int:
        """Until then."""
        return self.weights + self.passing + self.working

    @property
    def total(self) -> int:
        """At most."""
        return max(self.running, self.loading)


def dram_needs(plan: Plan, context: int) -> DramNeeds:
    """What a plan needs of DRAM with a cache for `context` tokens."""
    cache = context * plan.kv_bytes_on("cpu") + plan.state_bytes_on("cpu")
    return DramNeeds(plan.nbytes_on("cpu"), cache, plan.pinned_bytes(context), plan.nbytes_on("gpu"))


def check(plan: Plan, hardware: Hardware, context: int) -> None:
    """What `Plan.check_fits` does."""
    problems = [_dram_problem(plan, hardware, context)]
    missing: PlanError | None = None
    if plan.uses_gpu:
        try:
            problems.append(_card_problem(plan, require_gpu(hardware, plan.name)))
        except PlanError as error:
            missing = error
        if missing is None or plan.vram is not None:
            budget = plan.vram_budget(hardware, context)
            problems.append(None if budget is None else vram_problem(plan, budget))
    found = [problem for problem in problems if problem is not None]
    if found:
        told = [*found, *([] if missing is None else [str(missing)])]
        raise PlanDoesNotFitError(f"{plan.model_class} does not fit: {' And '.join(told)}")
    if missing is not None:
        raise missing


def _card_problem(plan: Plan, gpu: Gpu) -> str | None:
    """What is wrong with the VRAM that was asked for, on the card that there is."""
    free = gpu.memory_free or gpu.memory_total
    if plan.vram is None or not 0 < free < plan.vram:
        return None
    return (
        f"--vram is {format_gib(plan.vram)}, but {format_gib(free)} of {gpu.name}'s {format_gib(gpu.memory_total)} are "
        f"free: {format_gib(plan.vram - free)} too little. Leave --vram out to use what is free."
    )


def _dram_problem(plan: Plan, hardware: Hardware, context: int) -> str | None:
    needs = dram_needs(plan, context)
    shortfall = needs.total - hardware.dram_available
    if shortfall <= 0:
        return None
    limit = "the container's limit of " if hardware.dram_limited else ""
    pinned = f", pinned buffers {format_gib(needs.pinned)}" if needs.pinned else ""
    parts = f" (weights {format_gib(needs.weights)}, cache for {context} tokens {format_gib(needs.kv_cache)}{pinned}"
    if needs.loading > needs.running:
        parts = f" while it is loaded (weights {format_gib(needs.weights)}, those of the GPU on their way there "
        parts += format_gib(needs.passing)
    return (
        f"it needs {format_gib(needs.total)} of DRAM{parts}, working memory {format_gib(needs.working)}), but "
        f"{format_gib(hardware.dram_available)} of {limit}{format_gib(hardware.dram_total)} are available: "
        f"{format_gib(shortfall)} too little. {_dram_advice(plan, needs, context, hardware.dram_available)}"
    )


def _dram_advice(plan: Plan, needs: DramNeeds, context: int, available: int) -> str:
    """What to do: a shorter context where that suffices."""
    per_position = plan.kv_bytes_on("cpu")
    room = available - (needs.running - context * per_position)
    if per_position and room >= per_position and needs.loading <= available:
        return f"Use --context {room // per_position} or less, or free memory."
    return "Use a file or a rule with a smaller format (Q4_K: 4.5 bits a weight, Q2_K: 2.6), or free memory."


def vram_problem(plan: Plan, budget: VramBudget) -> str | None:
    """Why a plan does not fit into a budget of VRAM, with the shortfall and what to do; None if it does."""
    if not budget.shortfall:
        return None
    in_vram = [entry for entry in plan.entries if entry.role == "experts" and entry.device == "gpu"]
    other = "the plan 'hybrid', which leaves the routed experts in DRAM" if in_vram else "the plan 'cpu'"
    return (
        f"it needs {format_gib(budget.required)} of VRAM (weights {format_gib(budget.weights + budget.absorbed)}, "
        f"cache for {budget.context} tokens {format_gib(budget.kv_cache + budget.states)}, working memory "
        f"{format_gib(budget.working)}, driver {format_gib(budget.driver)}), but the budget is "
        f"{format_gib(budget.total)}: {format_gib(budget.shortfall)} too little. Use a shorter --context, a smaller "
        f"format, more --vram if the card has it, or {other}."
    )


def check_nodes(plan: Plan, hardware: Hardware) -> None:
    """What `Plan.check_fits_nodes` does."""
    nodes = [node for node in hardware.numa_nodes if node.cpus]
    share = plan.nbytes_on("cpu") // max(1, len(nodes))
    for node in nodes if len(nodes) > 1 else []:
        room = node.dram_total - _WORKING_BYTES
        if share > room:
            raise PlanDoesNotFitError(
                f"{plan.model_class} does not fit on NUMA node {node.node}: its share of the weights is "
                f"{format_gib(share)}, but it has {format_gib(max(0, room))} of DRAM for them: "
                f"{format_gib(share - room)} too little. Set MOESAIC_NUMA_NODES=1 to leave the division over nodes to "
                "the system (slower), or use a smaller format."
            )
