"""An engine to measure: of MODEL, or of a preset's dimensions with random weights; token ids in, token ids out.

It knows how models are loaded, and nothing of what is asked.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from moesaic.engine.deferral import deferral_note
from moesaic.engine.loader import Prepared, load
from moesaic.engine.serving.bench.bound import ExpertBytes, StepBytes
from moesaic.engine.serving.cache_room import BLOCK_SIZE
from moesaic.engine.serving.core import Engine
from moesaic.engine.serving.start import ServingOptions, engine_of
from moesaic.engine.subjects import expert_formats, num_layers_of, prepare_subject
from moesaic.errors import GenerationError
from moesaic.kernels import active_isa, num_threads, set_num_threads
from moesaic.placement import DEFAULT_CONTEXT, Plan, Rules

__all__ = ["Subject", "make_subject", "step_bytes"]

_SPARE_BLOCKS = 8


@dataclass(frozen=True, slots=True)
class Subject:
    """A model under load.

    Attributes:
        name: preset or MODEL.
        engine: answers.
        model: that it runs.
        prepared: what it was loaded from.
        total_layers: of the real model.
        defer_experts: experts of each token that arrive one layer late.
    """

    name: str
    engine: Engine
    model: Any
    prepared: Prepared
    total_layers: int
    defer_experts: int = 0

    @property
    def expert_modules(self) -> list[str]:
        """Names of the modules of routed experts, in order."""
        return [entry.module for entry in self.prepared.plan.entries if entry.role == "experts"]

    def describe(self) -> str:
        """The model and what runs it, on one line."""
        layers = num_layers_of(self.prepared)
        late = f"; {deferral_note(self.prepared.plan, self.defer_experts)}" if self.defer_experts else ""
        return (
            f"{self.name}, {expert_formats(self.prepared.plan)}, {layers} of {self.total_layers} layers, "
            f"{num_threads()} threads, {active_isa()}{late}"
        )


def make_subject(
    *,
    model: str | None = None,
    preset: str | None = None,
    weight_format: str = "Q4_K",
    num_layers: int | None = None,
    users: int,
    positions: int,
    cache_positions: int,
    threads: int | None = None,
    gguf: str | None = None,
    plan: str | Rules = "auto",
    vram: int | None = None,
    offline: bool = False,
    progress: bool = False,
    defer_experts: int = 0,
) -> Subject:
    """Load or build a model, with a cache for a load.

    Args:
        model: MODEL as for `AutoModelForCausalLM.from_pretrained`; or
        preset: name of one of `presets.PRESETS`.
        weight_format: of a synthetic model's matrices.
        num_layers: layers of a synthetic model; all if None.
        users: most answers at once.
        positions: tokens of prompt and answer together, of the longest request.
        cache_positions: tokens that the cache has room for, of all requests at a time.
        threads: worker threads; the default if None.
        gguf: as for `from_pretrained`.
        plan: as for `from_pretrained`.
        vram: bytes, as for `from_pretrained`.
        offline: as for `from_pretrained`.
        progress: as for `from_pretrained`.
        defer_experts: as for `from_pretrained`.

    Raises:
        MoesaicError: as for `bench.measure`.
    """
    if threads is not None:
        set_num_threads(threads)
    needed = cache_positions + (users + _SPARE_BLOCKS) * BLOCK_SIZE
    prepared, total = prepare_subject(
        model,
        preset,
        weight_format,
        num_layers,
        gguf,
        plan,
        offline,
        vram=vram,
        context=max(DEFAULT_CONTEXT, needed),
    )
    longest = getattr(prepared.config.get_text_config(), "max_position_embeddings", None)
    if longest is not None and positions > longest:
        raise GenerationError(
            f"a request of {positions} tokens with its answer, but the model's context is {longest}: use shorter ones."
        )
    loaded = load(prepared, progress=progress, defer_experts=defer_experts)
    states = users * prepared.plan.state_bytes_on("cpu")  # which get at most half
    cache = states + max(states, needed * max(1, prepared.plan.kv_bytes_per_position))
    options = ServingOptions(max_batch=users, kv_cache=cache)
    engine = engine_of(loaded, prepared, None, options)
    return Subject(preset or str(model), engine, loaded, prepared, total, defer_experts)


def step_bytes(plan: Plan, cache_positions: float) -> StepBytes:
    """What a decode step of a model reads, from its plan.

    Args:
        plan: of the model.
        cache_positions: mean number of positions that a token looks back on.
    """
    experts = [entry for entry in plan.entries if entry.role == "experts"]
    layers = []
    for entry in experts:
        top_k = max(1, round(entry.num_experts * entry.bytes_per_token / entry.nbytes))
        layers.append(ExpertBytes(entry.num_experts, top_k, entry.bytes_per_token / top_k))
    shared = plan.bytes_per_token - sum(entry.bytes_per_token for entry in experts)
    return StepBytes(shared, tuple(layers), cache_positions * plan.kv_bytes_per_position)
