"""Options that several subcommands share, and what they lead to: numbers that are checked, a model that is prepared."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from moesaic.engine.loader import Prepared

__all__ = ["add_model_arguments", "add_threads_argument", "positive_int", "prepare_model"]


def positive_int(text: str) -> int:
    """A whole number of at least 1, for argparse."""
    value = int(text) if text.isdecimal() else 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"'{text}' is not a whole number of at least 1")
    return value


def add_threads_argument(parser: argparse.ArgumentParser) -> None:
    """Add `--threads`."""
    parser.add_argument("--threads", type=positive_int, metavar="N", help="worker threads (default: physical cores)")


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """Add MODEL and what says where it comes from and how it is placed."""
    parser.add_argument(
        "model",
        metavar="MODEL",
        help="demo, a folder with safetensors, a .gguf file (a split one by its first part), org/name or "
        "org/name:QUANT from the Hugging Face hub",
    )
    parser.add_argument("--gguf", metavar="FILE", help="take the weights from this GGUF file instead")
    parser.add_argument("--plan", default="auto", metavar="PLAN", help="auto, cpu, or a YAML file of placement rules")
    parser.add_argument("--offline", action="store_true", help="use only what is on this computer already")


def prepare_model(arguments: argparse.Namespace) -> Prepared:
    """Open the model that the arguments name and make its plan; reads no weight."""
    from moesaic.engine.loader import prepare

    return prepare(arguments.model, gguf=arguments.gguf, plan=arguments.plan, offline=arguments.offline)
