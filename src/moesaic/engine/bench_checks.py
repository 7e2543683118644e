"""What a bench refuses before a model is built for it."""

from __future__ import annotations

from pathlib import Path

from transformers import PretrainedConfig

from moesaic.engine.timed_runs import What
from moesaic.errors import ConfigError, GenerationError
from moesaic.placement import Plan
from moesaic.placement.vram import MAX_BATCH, MAX_STATES

__all__ = ["check_batch", "check_context", "check_trace"]


def check_context(config: PretrainedConfig, num_tokens: int) -> None:
    """Refuse more positions than the model has.

    Raises:
        GenerationError: naming both.
    """
    context = getattr(config.get_text_config(), "max_position_embeddings", None)
    if isinstance(context, int) and num_tokens > context:
        raise GenerationError(f"the bench needs {num_tokens} positions, but the model's context is {context}.")


def check_batch(batch: int, plan: Plan) -> None:
    """Refuse several sequences without a GPU, and more than a step has.

    Raises:
        ConfigError: there is none in the plan, or they are too many.
    """
    if batch > 1 and not plan.uses_gpu:
        raise ConfigError("several sequences at once (--batch) are measured on a GPU only: leave it out.")
    most = MAX_STATES if plan.state_bytes_on("gpu") else MAX_BATCH
    if batch > most:
        raise ConfigError(f"--batch {batch}: a decode step of this model has at most {most} sequences.")


def check_trace(trace: Path | None, what: What, plan: Plan) -> None:
    """Refuse a trace that would show nothing, or could not be written.

    Args:
        trace: the file, or None.
        what: is measured.
        plan: of the model.

    Raises:
        ConfigError: naming what is wrong.
    """
    if trace is None:
        return
    if what != "decode":
        raise ConfigError("--trace shows decode steps: use it with 'bench decode'.")
    if not plan.uses_gpu:
        raise ConfigError(
            f"--trace shows GPU and CPU side by side, but plan '{plan.name}' puts nothing on a GPU: leave it out, or "
            "choose the plan 'hybrid'."
        )
    if not trace.parent.is_dir() or trace.is_dir():
        raise ConfigError(f"--trace {trace}: expected a file in a folder that exists.")
