"""Writes a GGUF of a published model's dimensions with random weights and no tokenizer, for side-by-side runs.

It knows no engine: any program that reads GGUF files can run what it writes.
"""

from __future__ import annotations

from pathlib import Path

from moesaic.engine.bench import prepare_synthetic
from moesaic.models.families import family_for
from moesaic.models.gguf_export import gguf_metadata, gguf_tensors
from moesaic.quant import get_format
from moesaic.weights.gguf_writer import GgufWriter

__all__ = ["write_synthetic_gguf"]


def write_synthetic_gguf(path: Path, preset: str, weight_format: str, num_layers: int) -> None:
    """Write the first `num_layers` MoE layers of `preset` with all matrices (but routers) in `weight_format`."""
    prepared = prepare_synthetic(preset, get_format(weight_format), num_layers, "auto")
    outputs = gguf_tensors(prepared.model, prepared.weight_map)
    config = prepared.config
    with GgufWriter(path, family_for(config.model_type).architecture) as writer:
        writer.add_metadata(gguf_metadata(config))
        writer.add_metadata({"tokenizer.ggml.model": "none"})
        for output in outputs:
            writer.declare(output.name, output.parts[0].format, output.shape)
        for output in outputs:
            for ref in output.parts:
                writer.write(output.name, ref.read_raw(prepared.checkpoint))
