"""From a loaded model and its plan to a model that runs on the GPU: uploads, budgets, page-locked experts, a runner.

It carries out what the plan's budget of the VRAM says and decides nothing of it. Memory that the plan does not allow
for cannot be taken by mistake: the allocator of the process is limited to the budget.
"""

from __future__ import annotations

import torch
from transformers import PreTrainedModel

from moesaic.engine.gpu.causal_lm import attach_runner
from moesaic.engine.gpu.expert_cache import ExpertCache
from moesaic.engine.gpu.runner import ModelRunner, RunnerOptions
from moesaic.engine.gpu.shares import Costs, ExpertShares
from moesaic.engine.gpu.slots import ExpertSlots
from moesaic.engine.gpu.streaming import StagingBuffers
from moesaic.errors import PlanDoesNotFitError, PlanError
from moesaic.kernels.experts import PackedExperts
from moesaic.modules.gpu.decoder import GpuDecoder
from moesaic.modules.gpu.experts import ResidentExperts, page_lock
from moesaic.placement import Plan
from moesaic.placement.vram import DRIVER_BYTES, KV_BLOCK, MAX_BATCH, VramBudget

__all__ = ["start_on_gpu"]

# Where the first chunk begins; the times of its layers correct them (see `shares`).
_UPLOAD_RATE, _READ_RATE, _CPU_RATE = 20e9, 50e9, 1e12


def start_on_gpu(model: PreTrainedModel, plan: Plan, budget: VramBudget) -> PreTrainedModel:
    """Put a model on the GPU as its plan says.

    Args:
        model: loaded, all its weights in DRAM; it is changed in place and gives back what it no longer needs.
        plan: says which layers and experts lie on the GPU.
        budget: of the VRAM.

    Returns:
        The model; `generate()` runs on the GPU.

    Raises:
        PlanDoesNotFitError: the VRAM does not suffice after all.
        UnsupportedModelError: parts of the model do not run on a GPU yet.
    """
    device = torch.device("cuda", torch.cuda.current_device())
    _limit_memory(budget, device)
    try:
        return _start(model, plan, budget, device)
    except torch.cuda.OutOfMemoryError as error:
        raise PlanDoesNotFitError(
            f"plan '{plan.name}': {budget.total / 2**30:.2f} GiB of VRAM do not suffice: {error}. Use a smaller "
            "--context, or give more with --vram."
        ) from error


def _start(model: PreTrainedModel, plan: Plan, budget: VramBudget, device: torch.device) -> PreTrainedModel:
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
    in_dram: list[int] = []
    for layer, experts in enumerate(decoder.routed):
        if _on_gpu(plan, model, experts):
            resident[layer] = ResidentExperts.of(experts, device)
        else:
            in_dram.append(layer)
    cache = staging = shares = None
    if in_dram:
        for layer in in_dram:
            page_lock(decoder.routed[layer])
        if len(in_dram) == len(decoder.routed) and budget.cache_experts:
            cache = ExpertCache(decoder.routed, budget.cache_experts, device)
        if len(in_dram) == len(decoder.routed) and budget.staging_experts:
            staging = StagingBuffers(decoder.routed, budget.staging_experts // 2, device)
            shares = ExpertShares(_first_costs(decoder.routed[in_dram[0]]))
    options = RunnerOptions(num_blocks, KV_BLOCK, max_batch=MAX_BATCH)
    runner = ModelRunner(decoder, options, ExpertSlots(resident, cache), staging, shares)
    return attach_runner(model, runner)


def _on_gpu(plan: Plan, model: PreTrainedModel, experts: PackedExperts) -> bool:
    """Whether the plan has these routed experts on the GPU."""
    for name, module in model.named_modules():
        if getattr(module, "packed", None) is experts:
            return plan.of(name).device == "gpu"
    raise PlanError(f"plan '{plan.name}' has no entry for some routed experts.")


def _limit_memory(budget: VramBudget, device: torch.device) -> None:
    total = torch.cuda.get_device_properties(device).total_memory
    torch.cuda.set_per_process_memory_fraction(min(1.0, max(0, budget.total - DRIVER_BYTES) / total), device)


def _first_costs(experts: PackedExperts) -> Costs:
    parts = (experts.gate, experts.up, experts.down)
    expert_bytes = sum(part.nbytes for part in parts if part is not None) / experts.num_experts
    products = len([part for part in parts if part is not None]) * experts.hidden * experts.intermediate
    return Costs(expert_bytes / _UPLOAD_RATE, expert_bytes / _READ_RATE, products / _CPU_RATE)
