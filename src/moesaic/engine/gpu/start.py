"""From a loaded model and its plan to a model that runs on the GPU: uploads, budgets, page-locked experts, a runner.

It carries out what the plan's budget of the VRAM says and decides nothing of it: the allocator of the process is
limited to the budget (`allocator_limit`), less what is moved between borrowers (`lending`).
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import PreTrainedModel

from moesaic.engine.expert_profile import ExpertProfile, shape_of
from moesaic.engine.gpu.allocator_limit import AllocatorLimit
from moesaic.engine.gpu.causal_lm import attach_runner
from moesaic.engine.gpu.cuda_memory import CudaMemory
from moesaic.engine.gpu.expert_cache import ExpertCache
from moesaic.engine.gpu.lending import VramLending
from moesaic.engine.gpu.measured_costs import measure_costs
from moesaic.engine.gpu.rehearsal import compile_kernels
from moesaic.engine.gpu.runner import ModelRunner, RunnerOptions
from moesaic.engine.gpu.shares import ExpertShares
from moesaic.engine.gpu.slots import ExpertSlots
from moesaic.engine.gpu.staging import StagingBuffers
from moesaic.engine.gpu.uploads import MissUploads, start_uploads
from moesaic.engine.packing import Progress
from moesaic.errors import KernelError, PlanDoesNotFitError
from moesaic.kernels.experts import PackedExperts
from moesaic.modules.gpu.decoder import GpuDecoder
from moesaic.modules.gpu.experts import ResidentExperts, page_lock
from moesaic.placement import Plan, detect_hardware
from moesaic.placement.lots import VramLots
from moesaic.placement.vram import KV_BLOCK, MAX_BATCH, MAX_STATES, VramBudget

__all__ = ["start_on_gpu"]

_COMPILER_BYTES = 512 * 1024**2
"""What a thread takes that compiles a large kernel."""


def start_on_gpu(
    model: PreTrainedModel,
    plan: Plan,
    budget: VramBudget,
    profile: ExpertProfile | None = None,
    progress: Progress = True,
) -> PreTrainedModel:
    """Put a model on the GPU as its plan says.

    Args:
        model: loaded, all its weights in DRAM; it is changed in place and gives back what it no longer needs.
        plan: says which layers and experts lie on the GPU.
        budget: of the VRAM.
        profile: of the model's experts, with whose busiest the cache begins.
        progress: whether to show how far kernels are compiled.

    Returns:
        The model; `generate()` runs on the GPU.

    Raises:
        PlanDoesNotFitError: the VRAM does not suffice after all.
        UnsupportedModelError: parts of the model do not run on a GPU yet.
    """
    device = torch.device("cuda", torch.cuda.current_device())
    limit = AllocatorLimit(budget.total, device)
    try:
        started = _start(model, plan, budget, limit, device, profile)
        compile_kernels(started.runner, _compilers(), progress)
        return started
    except torch.cuda.OutOfMemoryError as error:
        raise PlanDoesNotFitError(
            f"plan '{plan.name}': {budget.total / 2**30:.2f} GiB of VRAM do not suffice: {error}. Use a smaller "
            "--context, or give more with --vram."
        ) from error


def _start(
    model: PreTrainedModel,
    plan: Plan,
    budget: VramBudget,
    limit: AllocatorLimit,
    device: torch.device,
    profile: ExpertProfile | None,
) -> PreTrainedModel:
    lots = budget.lots
    max_positions = budget.num_blocks * KV_BLOCK if lots is None else lots.rotary_positions
    total_layers, num_layers = len(model.get_decoder().layers), len(plan.gpu_layers)
    of_first = None if num_layers == total_layers else num_layers
    decoder = GpuDecoder(model, device, max_positions=max_positions, num_layers=of_first)
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
    lending = cache = staging = shares = None
    uploads: MissUploads | str = "some layers' experts are all on the GPU" if resident else "there is no expert in DRAM"
    if in_dram and not resident:
        uploads = "there is no VRAM for experts to pass through"
        if budget.cache_experts == budget.num_experts:
            uploads = "the cache has room for all experts"
        lending = None if lots is None else _lending(lots, limit, device)
        if budget.staging_experts:
            memory = None if lending is None else lending.staging
            staging = StagingBuffers(in_dram, budget.staging_experts, device, memory)
            costs = measure_costs(in_dram[0], staging)
            shares = ExpertShares(costs)
            if budget.upload_experts:
                uploads = start_uploads(in_dram, budget.upload_experts, decoder.top_k, device, costs)
        not_passing = budget.upload_experts if isinstance(uploads, str) else 0
        cache = _cache(in_dram, budget, limit, device, lending, not_passing)
        if cache is not None and profile is not None:
            cache.fill(profile.uses[: len(in_dram)], profile.num_tokens)
        elif cache is not None:
            cache.fill()
    options = RunnerOptions(
        budget.num_blocks,
        KV_BLOCK,
        max_batch=MAX_BATCH,
        num_states=MAX_STATES,
        max_positions=max_positions,
        max_chunk=budget.max_chunk,
    )
    runner = ModelRunner(decoder, options, ExpertSlots(resident, cache), staging, shares, uploads, lending)
    note = f"VRAM is divided once, and nothing of it can be lent: {budget.fixed}." if budget.fixed else ""
    return attach_runner(model, runner, shape_of(str(model.config.model_type), plan), note)


def _compilers() -> int:
    """Threads that compile kernels: each takes a core, and memory."""
    hardware = detect_hardware()
    return max(1, min(hardware.num_cores, hardware.dram_available // 2 // _COMPILER_BYTES))


def _lending(lots: VramLots, limit: AllocatorLimit, device: torch.device) -> VramLending:
    """The memory that moves; PyTorch's allocator has no more than the rest from now on."""
    torch.cuda.empty_cache()  # what loading took beside the weights
    torch.cuda.reset_peak_memory_stats(device)  # lots come on top of what is there from now on
    limit.leave(lots.nbytes)
    try:
        return VramLending(CudaMemory(device), lots, allow=limit.allow)
    except KernelError as error:
        raise PlanDoesNotFitError(
            f"{lots.nbytes / 2**30:.2f} GiB of VRAM for experts, keys and values cannot be had: {error} Give less with "
            "--vram, or free memory of the card."
        ) from error


def _cache(
    in_dram: list[PackedExperts],
    budget: VramBudget,
    limit: AllocatorLimit,
    device: torch.device,
    lending: VramLending | None,
    not_passing: int,
) -> ExpertCache | None:
    """The cache, with the memory of so many experts that were to pass through VRAM in decode and do not."""
    if lending is None:
        num_slots = min(budget.num_experts, budget.cache_experts + not_passing)
        return ExpertCache(in_dram, num_slots, device) if budget.cache_experts else None
    if not_passing:
        torch.cuda.empty_cache()
    limit.leave(lending.take_over(not_passing * budget.expert_bytes))
    cache = ExpertCache(in_dram, lending.num_slots, device, arena=lending.experts)
    lending.lend_from(cache)
    return cache


def _owner(model: PreTrainedModel, experts: PackedExperts) -> tuple[str, Any]:
    """The module that holds these routed experts, and its name."""
    return next((name, module) for name, module in model.named_modules() if getattr(module, "packed", None) is experts)
