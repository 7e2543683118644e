"""`moesaic quantize`: write a model as a GGUF file in another weight format."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from moesaic.cli.options import add_threads_argument

if TYPE_CHECKING:
    from moesaic.engine.quantize import QuantizeResult

__all__ = ["DESCRIPTION", "HELP", "add_arguments", "run"]

HELP = "write a model as a GGUF file in another weight format"
DESCRIPTION = (
    "Quantise MODEL (safetensors or GGUF) into OUT.gguf, tensor by tensor, in memory far below the model's size. The "
    "file appears only when it is complete."
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `moesaic quantize`."""
    parser.add_argument("model", metavar="MODEL", help="a model as for 'moesaic run'")
    parser.add_argument("output", metavar="OUT.gguf", type=Path, help="the file to write")
    parser.add_argument("--format", required=True, metavar="F", help="weight format, for example Q4_K or Q8_0")
    parser.add_argument("--rules", metavar="FILE", help="YAML placement rules whose formats overrule --format")
    parser.add_argument("--offline", action="store_true", help="use only what is on this computer already")
    add_threads_argument(parser)
    parser.add_argument("--json", action="store_true", help="print the result as JSON")


def run(arguments: argparse.Namespace) -> int:
    """Quantise and print what was written."""
    from moesaic.engine.quantize import quantize_checkpoint
    from moesaic.kernels import set_num_threads
    from moesaic.placement import load_plan
    from moesaic.quant import WRITABLE_FORMATS, get_format
    from moesaic.weights import open_checkpoint, resolve

    weight_format = get_format(arguments.format, WRITABLE_FORMATS)
    rules = None if arguments.rules is None else load_plan(arguments.rules)
    if arguments.threads is not None:
        set_num_threads(arguments.threads)
    checkpoint = open_checkpoint(resolve(arguments.model, offline=arguments.offline).checkpoint)
    try:
        progress = sys.stderr.isatty()
        result = quantize_checkpoint(checkpoint, arguments.output, weight_format, rules=rules, progress=progress)
    finally:
        checkpoint.close()
    print(json.dumps(_report(result), indent=2) if arguments.json else _render(result))
    return 0


def _report(result: QuantizeResult) -> dict[str, object]:
    return {
        "path": str(result.path),
        "nbytes": result.nbytes,
        "source_nbytes": result.source_nbytes,
        "num_weights": result.num_weights,
        "bits_per_weight": result.bits_per_weight,
        "formats": {name: {"tensors": count, "nbytes": size} for name, (count, size) in result.formats.items()},
        "notes": list(result.notes),
    }


def _render(result: QuantizeResult) -> str:
    from moesaic.placement.table import format_bytes

    lines = [
        f"{name:<6} {count:>6} tensors  {format_bytes(size):>10}" for name, (count, size) in result.formats.items()
    ]
    lines += [f"note: {note}" for note in result.notes]
    lines.append(
        f"wrote {result.path}: {format_bytes(result.nbytes)} of weights from {format_bytes(result.source_nbytes)}, "
        f"{result.bits_per_weight:.2f} bits per weight"
    )
    lines.append(f"next: moesaic run {result.path}")
    return "\n".join(lines)
