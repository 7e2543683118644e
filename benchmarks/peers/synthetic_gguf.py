"""Writes a GGUF of a published model's dimensions with random weights and no tokenizer, for side-by-side runs.

It knows no engine: any program that reads GGUF files can run what it writes.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from random_blocks import random_blocks

from moesaic.engine.format_mix import FormatMix
from moesaic.engine.loader import Prepared
from moesaic.engine.subjects import prepare_synthetic
from moesaic.models.families import family_for
from moesaic.models.gguf_export import gguf_metadata, gguf_tensors
from moesaic.quant.quantize import WRITABLE_FORMATS
from moesaic.weights.gguf_writer import GgufWriter
from moesaic.weights.synthetic import SyntheticCheckpoint

__all__ = ["Recipe", "recipe", "write_gguf"]

_NUM_BLOCKS = 1 << 12


@dataclass(frozen=True)
class Recipe:
    """What a file will hold: bytes of all its weights and of those that one token reads."""

    prepared: Prepared
    num_layers: int

    @property
    def nbytes(self) -> int:
        """Bytes of all weights."""
        return self.prepared.plan.nbytes

    @property
    def bytes_per_token(self) -> int:
        """Bytes of weights that one token reads."""
        return self.prepared.plan.bytes_per_token


def recipe(preset: str, weight_format: str, num_layers: int) -> Recipe:
    """The first `num_layers` MoE layers of `preset` with matrices as `FormatMix.parse` says.

    Raises:
        MoesaicError: the format or the preset is unknown, or they do not go together.
    """
    mix = FormatMix.parse(weight_format)
    prepared = prepare_synthetic(preset, mix, num_layers, "cpu")
    for chosen in {mix.experts, mix.others} - set(WRITABLE_FORMATS):
        # There is no quantiser: random bytes that stand for weights of a usual size.
        checkpoint = prepared.checkpoint
        assert isinstance(checkpoint, SyntheticCheckpoint)
        checkpoint._pools[chosen.name] = random_blocks(chosen.name, _NUM_BLOCKS)
    return Recipe(prepared, num_layers)


def write_gguf(path: Path, chosen: Recipe) -> None:
    """Write the file."""
    prepared = chosen.prepared
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
