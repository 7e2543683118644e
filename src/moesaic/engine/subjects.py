"""What benches and estimates are of: a model, or a preset's dimensions with random weights. It measures nothing."""

from __future__ import annotations

from moesaic.engine.format_mix import FormatMix
from moesaic.engine.loader import Prepared, prepare, prepare_checkpoint
from moesaic.engine.presets import get_preset
from moesaic.models import build_meta_model, synthetic_checkpoint
from moesaic.placement import DEFAULT_CONTEXT, Hardware, Plan, Rules
from moesaic.quant import WeightFormat

__all__ = ["expert_formats", "num_layers_of", "prepare_subject", "prepare_synthetic"]

_SEED = 0


def prepare_subject(
    model: str | None,
    preset: str | None,
    weight_format: str,
    num_layers: int | None,
    gguf: str | None,
    plan: str | Rules,
    offline: bool,
    *,
    vram: int | None = None,
    context: int = DEFAULT_CONTEXT,
    hardware: Hardware | None = None,
) -> tuple[Prepared, int]:
    """What a bench or an estimate is of, a preset's synthetic weights or a model, and how many layers all of it has."""
    if preset is not None:
        mix = FormatMix.parse(weight_format)
        made = prepare_synthetic(preset, mix, num_layers, plan, vram=vram, context=context, hardware=hardware)
        return made, get_preset(preset).num_layers
    assert model is not None
    prepared = prepare(model, gguf=gguf, plan=plan, vram=vram, context=context, offline=offline, hardware=hardware)
    return prepared, num_layers_of(prepared)


def prepare_synthetic(
    preset: str,
    weight_format: WeightFormat | FormatMix,
    num_layers: int | None,
    plan: str | Rules,
    *,
    vram: int | None = None,
    context: int = DEFAULT_CONTEXT,
    hardware: Hardware | None = None,
) -> Prepared:
    """A model of a preset's dimensions with random weights, ready to load; every expert gets memory of its own.

    All matrices have `weight_format`, or what a mix says of them, apart from routers (F32).

    Raises:
        ConfigError, UnsupportedFormatError: as for `measure`.
    """
    config = get_preset(preset).config(num_layers)
    mix = weight_format if isinstance(weight_format, FormatMix) else FormatMix(weight_format, weight_format)
    checkpoint = synthetic_checkpoint(build_meta_model(config), mix.of, name=preset, seed=_SEED)
    return prepare_checkpoint(checkpoint, plan, config=config, vram=vram, context=context, hardware=hardware)


def num_layers_of(prepared: Prepared) -> int:
    """Layers of a prepared model."""
    return int(prepared.config.get_text_config().num_hidden_layers)


def expert_formats(plan: Plan) -> str:
    """Formats of the routed experts' matrices, e.g. "Q4_K" or "Q4_K, Q6_K"."""
    formats = {
        fmt
        for entry in plan.entries
        if entry.role == "experts"
        for key, fmt in entry.formats.items()
        if not key.endswith("_bias")
    }
    return ", ".join(sorted(formats))
