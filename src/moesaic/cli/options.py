"""Options that several subcommands share, with numbers and sizes that are checked."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from moesaic.placement import Rules

__all__ = [
    "add_any_model_arguments",
    "add_budget_arguments",
    "add_deferral_argument",
    "add_model_arguments",
    "add_profile_arguments",
    "add_threads_argument",
    "byte_size",
    "list_presets",
    "natural_number",
    "plan_of",
    "positive_int",
]


def positive_int(text: str) -> int:
    """A whole number of at least 1, for argparse."""
    value = int(text) if text.isdecimal() else 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"'{text}' is not a whole number of at least 1")
    return value


def natural_number(text: str) -> int:
    """A whole number of at least 0, for argparse."""
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"'{text}' is not a whole number of at least 0")
    return int(text)


def byte_size(text: str) -> int:
    """A size such as 24GiB in bytes, for argparse."""
    from moesaic.placement.units import parse_size

    try:
        return parse_size(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


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
    _add_source_arguments(parser)
    add_budget_arguments(parser)


def add_budget_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what a plan may use: VRAM, and the context that its cache is for."""
    parser.add_argument(
        "--vram", type=byte_size, metavar="SIZE", help="GPU memory to use, e.g. 24GiB (default: what is free)"
    )
    parser.add_argument(
        "--context", type=positive_int, metavar="N", help="tokens of cache to leave room for (default: 4096)"
    )


def add_deferral_argument(parser: argparse._ActionsContainer) -> None:
    """Add what makes decode quicker by not quite computing the model."""
    parser.add_argument(
        "--defer-experts",
        type=natural_number,
        metavar="N",
        help="on a GPU with experts on the CPU: N experts of each token, those that count least, arrive one layer late "
        "in decode, so that CPU and GPU wait less for each other; answers differ slightly from the exact model's "
        "(default: 0)",
    )


def add_profile_arguments(parser: argparse._ActionsContainer) -> None:
    """Add what a run knows of experts from an earlier one, and what it leaves for the next."""
    parser.add_argument(
        "--expert-profile",
        metavar="FILE",
        help="begin with the experts on the GPU that an earlier run used most, as it saved them",
    )
    parser.add_argument(
        "--save-expert-profile", metavar="FILE", help="at the end, save how often each expert was used in decode"
    )


def add_any_model_arguments(parser: argparse.ArgumentParser) -> None:
    """Add an optional MODEL, a synthetic model in its place, and the threads."""
    parser.add_argument("model", metavar="MODEL", nargs="?", help="a model as for 'moesaic run'")
    parser.set_defaults(optional_positional="model")
    parser.add_argument("--synthetic", metavar="PRESET", help="random weights of these dimensions; 'list' shows all")
    parser.add_argument(
        "--format",
        default="Q4_K",
        metavar="F",
        help="weight format of a synthetic model (Q4_K); IQ1_S+Q4_K: experts and the rest",
    )
    parser.add_argument("--layers", type=positive_int, metavar="N", help="layers of a synthetic model (default: all)")
    add_threads_argument(parser)
    _add_source_arguments(parser)


def _add_source_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--gguf", metavar="FILE", help="take MODEL's weights from this GGUF file instead")
    parser.add_argument(
        "--plan",
        default="auto",
        metavar="PLAN",
        help="auto, cpu, hybrid (routed experts on the CPU, the rest on the GPU), layers (the first layers on the "
        "GPU), gpu, or a YAML file of placement rules",
    )
    parser.add_argument(
        "--ternary",
        choices=("auto", "always", "never"),
        default="auto",
        help="hold IQ1_S and IQ1_M as ternary digits, which takes a sixth more DRAM and is faster on the CPU (default: "
        "if there is room)",
    )
    parser.add_argument("--offline", action="store_true", help="use only what is on this computer already")


def plan_of(arguments: argparse.Namespace) -> str | Rules:
    """What `--plan` names, with what `--ternary` says if it says anything.

    Raises:
        PlanError, RuleError: as `load_plan`.
    """
    if arguments.ternary == "auto":
        return str(arguments.plan)
    from dataclasses import replace

    from moesaic.placement import load_plan

    return replace(load_plan(arguments.plan), ternary=arguments.ternary)


def list_presets() -> str:
    """What `--synthetic list` prints."""
    from moesaic.engine.presets import PRESETS

    return "\n".join(f"{name:<18} {preset.description}" for name, preset in PRESETS.items())
