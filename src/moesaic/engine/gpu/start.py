"""From a loaded model and its plan to a model that runs on the GPU: uploads, budgets, page-locked experts, a runner.

It carries out what the plan's budget of the VRAM says and decides nothing of it. Memory that the plan does not allow
for cannot be taken by mistake: the allocator of the process is limited to the budget.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import PreTrainedModel

from moesaic.engine.expert_profile import ExpertProfile, shape_of
from moesaic.engine.gpu.causal_lm import attach_runner
from moesaic.engine.gpu.expert_cache import ExpertCache
from moesaic.engine.gpu.measured_costs import measure_costs
from moesaic.engine.gpu.runner import ModelRunner, RunnerOptions
from moesaic.engine.gpu.shares import ExpertShares
from moesaic.engine.gpu.slots import ExpertSlots
from moesaic.engine.gpu.staging import StagingBuffers
from moesaic.errors import PlanDoesNotFitError
from moesaic.kernels.experts import PackedExperts
from moesaic.modules.gpu.decoder import GpuDecoder
from moesaic.modules.gpu.experts import ResidentExperts, page_lock
from moesaic.placement import Plan
from moesaic.placement.vram import DRIVER_BYTES, KV_BLOCK, MAX_BATCH, MAX_STATES, VramBudget

__all__ = ["start_on_gpu"]


def start_on_gpu(
    model: PreTrainedModel, plan: Plan, budget: VramBudget, profile: ExpertProfile | None = None
) -> PreTrainedModel:
    """Put a model on the GPU as its plan says.

    Args:
        model: loaded, all its weights in DRAM; it is changed in place and gives back what it no longer needs.
        plan: says which layers and experts lie on the GPU.
        budget: of the VRAM.
        profile: of the model's experts, with whose busiest the cache begins.

    Returns:
        The model; `generate()` runs on the GPU.

    Raises:
        PlanDoesNotFitError: the VRAM does not suffice after all.
        UnsupportedModelError: parts of the model do not run on a GPU yet.
    """
    device = torch.device("cuda", torch.cuda.current_device())
    _limit_memory(budget, device)
    try:
        return _start(model, plan, budget, device, profile)
    except torch.cuda.OutOfMemoryError as error:
        raise PlanDoesNotFitError(
            f"plan '{plan.name}': {budget.total / 2**30:.2f} GiB of VRAM do not suffice: {error}. Use a smaller "
            "--context, or give more with --vram."
        ) from error


def _start(
    model: PreTrainedModel, plan: Plan, budget: VramBudget, device: torch.device, profile: ExpertProfile | None
) -> PreTrainedModel:
    num_blocks = budget.num_blocks
    total_layers = len(model.get_decoder().layers)
    num_layers = len(plan.gpu_layers)
    decoder = GpuDecoder(
        model,
        device,
        max_positions=num_blocks * KV_BLOCK,
        num_layers=None if num_layers == total_layers else num_layers,
    )
    resident: dict[int, ResidentExperts] = {}
    in_dram: list[PackedExperts] = []
    for layer, experts in enumerate(decoder.routed):
        assert experts is not None
        name, module = _owner(model, experts)
        if plan.of(name).device == "gpu":
            resident[layer] = ResidentExperts.of(experts, device)
            module.packed = None
            decoder.drop_routed(layer)
        else:
            page_lock(experts)
            in_dram.append(experts)
    cache = staging = shares = None
    if in_dram and not resident:
        if budget.cache_experts:
            cache = ExpertCache(in_dram, budget.cache_experts, device)
            if profile is None:
                cache.fill()
            else:
                cache.fill(profile.uses[: len(in_dram)], profile.num_tokens)
        if budget.staging_experts:
            staging = StagingBuffers(in_dram, budget.staging_experts, device)
            shares = ExpertShares(measure_costs(in_dram[0], staging))
    options = RunnerOptions(num_blocks, KV_BLOCK, max_batch=MAX_BATCH, num_states=MAX_STATES)
    runner = ModelRunner(decoder, options, ExpertSlots(resident, cache), staging, shares)
    return attach_runner(model, runner, shape_of(str(model.config.model_type), plan))


def _owner(model: PreTrainedModel, experts: PackedExperts) -> tuple[str, Any]:
    """The module that holds these routed experts, and its name."""
    return next((name, module) for name, module in model.named_modules() if getattr(module, "packed", None) is experts)


def _limit_memory(budget: VramBudget, device: torch.device) -> None:
    total = torch.cuda.get_device_properties(device).total_memory
    torch.cuda.set_per_process_memory_fraction(min(1.0, max(0, budget.total - DRIVER_BYTES) / total), device)
