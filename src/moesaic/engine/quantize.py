"""Quantises a whole model into a GGUF file, tensor by tensor, in memory far below the model's size.

Weights stream from the mapped checkpoint in pieces of a few MiB: dequantised or converted to float32, rounded to the
format chosen, appended to the file. It knows neither how blocks are made (`quant`), nor how tensors are called
(`models`), nor how files are laid out (`weights`).
"""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from moesaic.engine.packing import LoadProgress, Progress
from moesaic.engine.quantize_plan import QuantizePlan, make_quantize_plan
from moesaic.errors import CheckpointError, ConfigError, QuantizationError, UnsupportedFormatError
from moesaic.models import TensorRef
from moesaic.models.tensor_ref import JoinedRef
from moesaic.placement import Rules
from moesaic.placement.table import format_bytes
from moesaic.quant import WeightFormat, dequantize, get_format, quantize, why_not_writable
from moesaic.weights import Checkpoint
from moesaic.weights.gguf_writer import GgufWriter

__all__ = ["QuantizeResult", "quantize_checkpoint"]

_PIECE_BYTES = 16 * 1024**2
"""Float32 bytes that exist at a time."""


@dataclass(frozen=True, slots=True)
class QuantizeResult:
    """What was written.

    Attributes:
        path: the GGUF file.
        nbytes: bytes of its tensors.
        source_nbytes: bytes of the checkpoint's tensors.
        num_weights: weights in all.
        formats: format -> (number of tensors, bytes).
        notes: tensors whose rows did not fit the format wanted, rules that match nothing, tensors copied unknown.
    """

    path: Path
    nbytes: int
    source_nbytes: int
    num_weights: int
    formats: Mapping[str, tuple[int, int]]
    notes: tuple[str, ...]

    @property
    def bits_per_weight(self) -> float:
        """Mean over all tensors."""
        return 8 * self.nbytes / max(1, self.num_weights)


def quantize_checkpoint(
    checkpoint: Checkpoint,
    output: Path,
    fmt: WeightFormat,
    *,
    rules: Rules | None = None,
    progress: Progress = False,
) -> QuantizeResult:
    """Write `checkpoint` as a GGUF in which matrices have the format asked for.

    Args:
        checkpoint: an open GGUF or safetensors checkpoint of a model whose GGUF form is known.
        output: the file to write. It appears, or is replaced, only when it is complete.
        fmt: format of all matrices that neither a rule nor `engine.format_choice` gives another one.
        rules: a placement file's rules; only their formats are used.
        progress: called with bytes of the checkpoint that have been read, see `engine.packing.Progress`.

    Raises:
        UnsupportedFormatError: `fmt`, or a format that a rule asks for, cannot be written.
        ConfigError: the output is part of the checkpoint, its folder does not exist or has too little room.
        CheckpointError: the checkpoint lacks tensors of the model, or holds weights that the format cannot.
        UnsupportedModelError: the architecture, or its form in GGUF, is not known.
        OSError: the file system refuses a write.
    """
    plan = make_quantize_plan(checkpoint, fmt, rules)
    _check_formats(plan)
    _check_output(output, checkpoint, plan)
    with (
        LoadProgress(progress, plan.source_nbytes, "Quantising") as report,
        GgufWriter(output, plan.architecture) as writer,
    ):
        writer.add_metadata(plan.metadata)
        for tensor in plan.tensors:
            writer.declare(tensor.name, tensor.format, tensor.shape)
        for tensor in plan.tensors:
            for part in tensor.parts:
                for blocks in _stream(checkpoint, part, tensor.format):
                    writer.write(tensor.name, blocks)
                report.add(part.nbytes)
    return _result(output, plan)


def _stream(checkpoint: Checkpoint, part: TensorRef, wanted: WeightFormat) -> Iterator[np.ndarray]:
    """The blocks of one matrix in the format wanted, uint8 `[some rows, row_bytes]` at a time."""
    cols = part.shape[-1] if part.shape else 1
    step = max(1, _PIECE_BYTES // (4 * cols))
    if _is_computed(part):  # read as float32: encoding computed values in BF16 again would round them
        source_format, source = get_format("F32"), part.read_float(checkpoint).numpy().reshape(-1, cols)
    else:
        source_format, source = part.format, part.read_raw(checkpoint)
    for start in range(0, len(source), step):
        piece = source[start : start + step]
        if source.dtype == np.uint8 and source_format == wanted:
            yield piece
        else:
            values = piece if source.dtype == np.float32 else dequantize(piece, source_format, cols)
            yield _blocks(checkpoint, part, values, wanted, start)
        for name in part.sources:
            checkpoint.release(name)


def _is_computed(part: TensorRef) -> bool:
    """Whether values are rearranged or computed on the way, so that the stored bytes are not those wanted."""
    return part.transform is not None or (isinstance(part, JoinedRef) and part.join is not None)


def _blocks(
    checkpoint: Checkpoint, part: TensorRef, values: np.ndarray, wanted: WeightFormat, first_row: int
) -> np.ndarray:
    """Quantise some rows; an error names the file, the tensor and where in it the rows lie."""
    try:
        return quantize(values, wanted, name=f"rows from {first_row} on")
    except QuantizationError as error:
        matrix = "" if part.index is None else f"matrix {part.index}, "
        file = checkpoint.tensors[part.sources[0]].file
        raise CheckpointError(file, f"{matrix}{error}", tensor=part.name) from error


def _check_formats(plan: QuantizePlan) -> None:
    """Refuse formats that GGUF files lack, and those without a quantiser unless a tensor only keeps what it has."""
    for tensor in plan.tensors:
        if not tensor.format.in_gguf:
            raise UnsupportedFormatError(
                f"{tensor.name}: {tensor.format.name} is a format of safetensors that GGUF files do not have: run the "
                "model from its folder as it is, or choose a format for this tensor, for example Q8_0 or Q4_K."
            )
        kept = all(part.format == tensor.format and not _is_computed(part) for part in tensor.parts)
        problem = why_not_writable(tensor.format)
        if problem and not kept:
            raise UnsupportedFormatError(f"{tensor.name}: {problem}.")


def _check_output(output: Path, checkpoint: Checkpoint, plan: QuantizePlan) -> None:
    """Refuse before any work what would fail after it."""
    folder = output.absolute().parent
    if not folder.is_dir():
        raise ConfigError(f"{output}: the folder {folder} does not exist: make it first.")
    if output.exists() and any(output.samefile(file) for file in {info.file for info in checkpoint.tensors.values()}):
        raise ConfigError(f"{output}: this file is read from: choose another name for the output.")
    free = shutil.disk_usage(folder).free
    if free < plan.nbytes:
        raise ConfigError(
            f"{output}: the file takes {format_bytes(plan.nbytes)} but its disk has {format_bytes(free)} free, "
            f"{format_bytes(plan.nbytes - free)} too little."
        )


def _result(output: Path, plan: QuantizePlan) -> QuantizeResult:
    counts: Counter[str] = Counter()
    sizes: Counter[str] = Counter()
    for tensor in plan.tensors:
        counts[tensor.format.name] += 1
        sizes[tensor.format.name] += tensor.nbytes
    formats = {name: (counts[name], size) for name, size in sizes.most_common()}
    return QuantizeResult(output, plan.nbytes, plan.source_nbytes, plan.num_weights, formats, plan.notes)
