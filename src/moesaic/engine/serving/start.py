"""From MODEL to an engine: loads it, chooses who computes its steps, and how much memory the cache gets.

`moesaic serve` and `LLM` share it. It knows neither requests nor servers.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from moesaic.engine.auto import AutoTokenizer, parse_vram
from moesaic.engine.expert_profile import check_profile_target, check_profile_use
from moesaic.engine.loader import Prepared, load, prepare
from moesaic.engine.packing import Progress
from moesaic.engine.serving.cache_room import BLOCK_SIZE, default_cache_bytes, room_for_cache
from moesaic.engine.serving.core import Engine, EngineOptions
from moesaic.engine.serving.defaults import GenerationDefaults
from moesaic.engine.serving.facts import ModelFacts
from moesaic.engine.serving.paged_runner import PagedRunner, paged_runner_for
from moesaic.engine.serving.runner import StepRunner
from moesaic.engine.serving.solo_runner import SoloRunner
from moesaic.errors import ConfigError
from moesaic.kernels import set_num_threads
from moesaic.modules.rotary import longest_context
from moesaic.placement import DEFAULT_CONTEXT, Plan, Rules

__all__ = ["ServingOptions", "engine_of", "make_engine"]

_LOG = logging.getLogger("moesaic.serving")
_CACHE_SHARE = 4
"""The cache on the CPU gets one in so many bytes of the DRAM that is free beside the weights, unless told otherwise."""


@dataclass(frozen=True, slots=True)
class ServingOptions:
    """How a model is loaded and served.

    Attributes:
        gguf, tokenizer, plan, vram, threads, offline: as for `AutoModelForCausalLM` and `AutoTokenizer`.
        context: most tokens of prompt and answer; None: the model's, or what fits. On a GPU the cache begins with room
            for so many, of all requests together.
        kv_cache: bytes of the cache on the CPU; None: a quarter of what is free, and at least one `context`.
        max_batch: most answers at once.
        prefix_cache: whether beginnings that were computed are kept.
        expert_profile: as for `AutoModelForCausalLM`.
        save_expert_profile: file to which the use of experts is written when the engine is closed.
        defer_experts: as for `AutoModelForCausalLM`.
    """

    gguf: str | Path | None = None
    tokenizer: str | Path | None = None
    plan: str | Path | Rules | Plan = "auto"
    vram: int | str | None = None
    context: int | None = None
    threads: int | None = None
    offline: bool = False
    kv_cache: int | None = None
    max_batch: int = 64
    prefix_cache: bool = True
    expert_profile: str | Path | None = None
    save_expert_profile: str | Path | None = None
    defer_experts: int = 0


def make_engine(model: str, options: ServingOptions | None = None, progress: Progress = True) -> Engine:
    """Load a model and its tokenizer.

    Args:
        model: `demo`, a folder with safetensors, a `.gguf`, `org/name` or `org/name:QUANT` on the hub.
        options: how it is loaded and served.
        progress: of the load; see `AutoModelForCausalLM.from_pretrained`.

    Returns:
        An engine with `tokenizer` and `facts`.

    Raises:
        MoesaicError: the model cannot be found, read, placed or run; see `moesaic.errors`.
    """
    options = options or ServingOptions()
    if options.threads is not None:
        set_num_threads(options.threads)
    tokenizer = AutoTokenizer.from_pretrained(
        model, gguf=options.gguf, tokenizer=options.tokenizer, offline=options.offline
    )
    prepared = prepare(
        model,
        gguf=options.gguf,
        plan=options.plan,
        vram=parse_vram(options.vram),
        context=options.context or DEFAULT_CONTEXT,
        offline=options.offline,
    )
    if options.save_expert_profile is not None:
        check_profile_use(prepared.plan, "save expert profile")
        check_profile_target(options.save_expert_profile, "save expert profile")
    if options.kv_cache is not None and prepared.plan.uses_gpu:
        raise ConfigError(
            "kv cache: the size is that of a cache in DRAM, and this one is on the GPU, which shares its memory out by "
            "itself: leave it out. --context says for how many tokens there is room at first."
        )
    facts = ModelFacts.of(model, prepared)
    loaded = load(
        prepared,
        progress=progress,
        expert_profile=options.expert_profile,
        defer_experts=options.defer_experts,
    )
    return engine_of(loaded, prepared, tokenizer, options, facts)


def engine_of(
    model: PreTrainedModel,
    prepared: Prepared,
    tokenizer: Any,
    options: ServingOptions,
    facts: ModelFacts | None = None,
) -> Engine:
    """An engine for a model that is loaded.

    Args:
        model: from `load`.
        prepared: what it was loaded from.
        tokenizer: the model's; None: tokens without text.
        options: how it is served.
        facts: what is known of it.

    Raises:
        PlanDoesNotFitError: the DRAM does not suffice for the cache.
        ConfigError: `kv_cache` does not suffice for `context`.
    """
    runner, note = _runner(model, prepared.plan, options)
    if note:
        _LOG.warning(note)
        facts = None if facts is None else replace(facts, notes=(*facts.notes, note))
    room = runner.pool.num_blocks * runner.pool.block_size
    if options.context is not None and room < options.context:
        raise ConfigError(
            f"the cache holds {room} tokens, but the context is to be {options.context}: give the cache more memory, "
            "or leave its size out."
        )
    longest = _longest(model)
    context = longest if options.context is None else min(options.context, longest or options.context)
    return Engine(
        runner,
        tokenizer,
        GenerationDefaults.of(model.generation_config, tokenizer),
        context,
        EngineOptions(max_running=options.max_batch, prefix_cache=options.prefix_cache),
        facts=facts,
        one_torch_thread=not isinstance(runner, SoloRunner),
    )


def _runner(model: PreTrainedModel, plan: Plan, options: ServingOptions) -> tuple[StepRunner, str]:
    """Who computes the steps, and what to say of it."""
    if hasattr(model, "runner"):
        from moesaic.engine.serving.gpu_runner import GpuStepRunner  # needs Triton

        path = options.save_expert_profile
        on_close = None if path is None else partial(model.save_expert_profile, path)
        gpu = GpuStepRunner(model.runner, options.max_batch, on_close)
        return gpu, model._moesaic_note
    nbytes = _cache_bytes(model, plan, options)
    room = room_for_cache(model, nbytes, max_batch=options.max_batch, context=options.context or DEFAULT_CONTEXT)
    if room is not None:
        paged = paged_runner_for(model, room.num_blocks, max_batch=options.max_batch, num_states=room.num_states)
        if paged is not None:
            return paged, _states_note(paged)
    position = max(1, plan.kv_bytes_per_position)
    solo = SoloRunner(model, max(1, nbytes // (position * BLOCK_SIZE)), BLOCK_SIZE, options.max_batch)
    return solo, (
        f"{type(model).__name__} has no paged cache on the CPU: requests take turns at every token, and beginnings of "
        "prompts are not kept."
    )


def _states_note(runner: PagedRunner) -> str:
    """What to say of recurrent states, of which there may be few."""
    if runner.states is None or runner.states.num_slots >= runner.max_batch:
        return ""
    return (
        f"the cache has room for {runner.states.num_slots} recurrent states: so many answers run at once. Give the "
        "cache more memory for more."
    )


def _cache_bytes(model: PreTrainedModel, plan: Plan, options: ServingOptions) -> int:
    """Bytes of the cache on the CPU.

    Raises:
        PlanDoesNotFitError: the context that was asked for does not fit.
    """
    if options.kv_cache is not None:
        return options.kv_cache
    return default_cache_bytes(
        model,
        max(1, plan.kv_bytes_per_position),
        plan.state_bytes_on("cpu"),
        share=_CACHE_SHARE,
        context=options.context,
        max_batch=options.max_batch,
    )


def _longest(model: PreTrainedModel) -> int | None:
    return longest_context(model.config.get_text_config())
