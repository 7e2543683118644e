"""From MODEL to a running model: `prepare` decides everything without reading a weight, `load` reads and connects.

Between the two lies the plan, which `moesaic plan` prints and which refuses a model that does not fit. This module
knows the order of the steps and no detail of any of them.
"""

from __future__ import annotations

import importlib.util
import logging
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from transformers import PretrainedConfig, PreTrainedModel

from moesaic.engine.build import build_modules, check_no_meta_tensors, initialise_buffers
from moesaic.engine.causal_lm import finish_model
from moesaic.engine.deferral import check_deferral, deferral_note
from moesaic.engine.expert_profile import ExpertProfile, check_profile_use, read_profile, shape_of
from moesaic.engine.gpu.cuda_memory import why_not
from moesaic.engine.packing import Progress, run_jobs
from moesaic.errors import CheckpointError
from moesaic.kernels import binds_memory, num_threads
from moesaic.models import WeightMap, build_meta_model, build_weight_map, config_for, generation_config_for
from moesaic.placement import (
    DEFAULT_CONTEXT,
    Hardware,
    Plan,
    Rules,
    detect_gpus,
    detect_hardware,
    load_plan,
    make_plan,
)
from moesaic.weights import Checkpoint, open_checkpoint, resolve

__all__ = ["Prepared", "load", "prepare", "prepare_checkpoint", "this_computer"]

_LOG = logging.getLogger("moesaic.plan")


@dataclass(frozen=True, slots=True)
class Prepared:
    """A model that is ready to be loaded; nothing of its weights has been read.

    Attributes:
        checkpoint: the open files; `load` closes them.
        config: the model's configuration.
        model: the stock model on the meta device.
        weight_map: which tensor feeds which module.
        plan: what becomes of every module.
    """

    checkpoint: Checkpoint
    config: PretrainedConfig
    model: PreTrainedModel
    weight_map: WeightMap
    plan: Plan


def prepare(
    model: str,
    *,
    gguf: str | Path | None = None,
    plan: str | Path | Rules | Plan = "auto",
    vram: int | None = None,
    context: int = DEFAULT_CONTEXT,
    offline: bool = False,
    hardware: Hardware | None = None,
) -> Prepared:
    """Find a model, open it and plan where its modules go; no weight is read.

    Args:
        model: `demo`, a folder, a `.gguf`, `org/name` or `org/name:QUANT`.
        gguf: a GGUF to take the weights and the configuration from instead.
        plan: a template's name, a placement file, rules, or a plan that was made before.
        vram: bytes of the GPU's memory to use at most; what is free, less a margin, if None.
        context: tokens of cache to leave room for.
        offline: take from the hub only what is on this computer.
        hardware: what to plan for; this computer if None.

    Raises:
        ModelNotFoundError: there is no such model.
        CheckpointError: a file is damaged, hostile or incomplete.
        UnsupportedModelError: the architecture cannot be run.
        PlanError: the plan cannot be made.
    """
    checkpoint = open_checkpoint(resolve(model, gguf, offline).checkpoint)
    try:
        return prepare_checkpoint(checkpoint, plan, vram=vram, context=context, hardware=hardware)
    except BaseException:
        checkpoint.close()
        raise


def prepare_checkpoint(
    checkpoint: Checkpoint,
    plan: str | Path | Rules | Plan = "auto",
    *,
    config: PretrainedConfig | None = None,
    vram: int | None = None,
    context: int = DEFAULT_CONTEXT,
    hardware: Hardware | None = None,
) -> Prepared:
    """Everything up to the plan, for an open checkpoint.

    Args:
        checkpoint: where the weights are.
        plan: a template's name, a placement file, rules, or a plan that was made before.
        vram: bytes of the GPU's memory to use at most; what is free, less a margin, if None.
        context: tokens of cache to leave room for.
        config: the model's configuration, if it is not the checkpoint's.
        vram: as for `prepare`.
        context: as for `prepare`.
        hardware: what to plan for; this computer if None.

    Raises:
        CheckpointError: the checkpoint lacks tensors of the model.
        PlanError: the plan cannot be made.
    """
    config = config_for(checkpoint) if config is None else config
    model = build_meta_model(config)
    weight_map = build_weight_map(model, checkpoint)
    if weight_map.missing:
        names = ", ".join(weight_map.missing[:5])
        raise CheckpointError(
            checkpoint.path,
            f"lacks {len(weight_map.missing)} tensors of {type(model).__name__}, among them {names}: the file is "
            "incomplete or belongs to another model.",
        )
    if not isinstance(plan, Plan):
        rules = plan if isinstance(plan, Rules) else load_plan(str(plan))
        hardware = this_computer(rules.may_use_gpu) if hardware is None else hardware
        plan = make_plan(model, weight_map, rules, hardware, vram=vram, context=context)
    return Prepared(checkpoint, config, model, weight_map, plan)


def this_computer(with_gpus: bool) -> Hardware:
    """The hardware, with GPUs only where a plan could use one: asking for them takes a while.

    A GPU that this installation cannot use is listed with that problem.
    """
    hardware = detect_hardware()
    gpus = detect_gpus() if with_gpus else ()
    problem = _gpu_problem() if gpus else ""
    known = [gpu if gpu.problem or problem else replace(gpu, fixed_memory=why_not(gpu.index)) for gpu in gpus]
    return replace(hardware, gpus=tuple(replace(gpu, problem=gpu.problem or problem) for gpu in known))


def _gpu_problem() -> str:
    """What this installation lacks to use a GPU; "" if nothing."""
    if not torch.cuda.is_available():
        return f"PyTorch {torch.__version__} finds no GPU (is it a build for the CPU?)"
    if importlib.util.find_spec("triton") is None:
        return "Triton, which builds of PyTorch for GPUs bring, is not installed (pip install triton)"
    return ""


def load(
    prepared: Prepared,
    *,
    progress: Progress = True,
    expert_profile: str | Path | None = None,
    defer_experts: int = 0,
    lends: bool = True,
) -> PreTrainedModel:
    """Read and pack the weights of a prepared model and connect it to the kernels.

    Peak memory is the plan's bytes plus the pages of the tensors being read: nothing is expanded, and every page of the
    file is given back when it has been packed. What the plan warns of goes to the log "moesaic.plan".

    Args:
        prepared: from `prepare`; its checkpoint is closed, so it can be loaded once.
        progress: see `packing.Progress`.
        expert_profile: a file with whose busiest experts the cache on a GPU begins.
        defer_experts: so many experts of each token, of those that the CPU computes for a GPU in decode, arrive one
            layer late: quicker, and not quite the model.
        lends: whether that cache lends memory, if the GPU's can be moved.

    Returns:
        The model in eval mode, float32 activations, its `generation_config` that of the checkpoint if it has one.

    Raises:
        PlanDoesNotFitError: the plan needs more memory than this computer, or one of its memory nodes, has.
        PlanError: the plan needs a GPU and there is none that can be used.
        CheckpointError: a tensor is damaged.
        UnsupportedModelError: the model needs something that the kernels do not have.
        ConfigError: the profile is none of this model, or the plan uses no GPU; or there is nothing to defer.
    """
    check_deferral(prepared.plan, defer_experts)
    profile = None if expert_profile is None else _profile(prepared, expert_profile)
    hardware = this_computer(prepared.plan.uses_gpu)
    prepared.plan.check_fits(hardware)
    budget = prepared.plan.vram_budget(hardware)
    if binds_memory():
        prepared.plan.check_fits_nodes(hardware)
    model, checkpoint = prepared.model, prepared.checkpoint
    for warning in prepared.plan.warnings:
        _LOG.warning("plan '%s': %s", prepared.plan.name, warning)
    if progress is True:
        for note in prepared.plan.notes:
            print(f"note: {note}", file=sys.stderr)
    try:
        jobs = build_modules(model, prepared.weight_map, prepared.plan, checkpoint)
        initialise_buffers(model)
        run_jobs(jobs, checkpoint, progress, num_threads())
    finally:
        checkpoint.close()
    check_no_meta_tensors(model)
    model = finish_model(model, prepared.plan)
    model.generation_config = generation_config_for(checkpoint, model.generation_config)
    if budget is None:
        return model
    if not lends:
        budget = replace(budget, lots=None, fixed="that was not wanted")
    from moesaic.engine.gpu.start import start_on_gpu  # needs Triton, which a computer without a GPU may lack

    model = start_on_gpu(model, prepared.plan, budget, profile, progress)
    if defer_experts:
        model._moesaic_defer(defer_experts, deferral_note(prepared.plan, defer_experts))
    return model


def _profile(prepared: Prepared, path: str | Path) -> ExpertProfile:
    check_profile_use(prepared.plan, "expert profile")
    return read_profile(path, shape_of(str(prepared.config.model_type), prepared.plan))
