"""`moesaic plan`: where every module would go and what it takes, before any weight is loaded."""

from __future__ import annotations

import argparse

from moesaic.cli.options import add_model_arguments, positive_int, prepare_model

__all__ = ["DESCRIPTION", "HELP", "add_arguments", "run"]

HELP = "show where every module would go and what it takes"
DESCRIPTION = (
    "Print the placement of a model (module, count, implementation, device, format, bytes), the DRAM that it takes and "
    "the bytes that one token reads. No weight is loaded. Exit code 1 if it does not fit."
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `moesaic plan`."""
    add_model_arguments(parser)
    parser.add_argument("--context", type=positive_int, default=4096, metavar="N", help="tokens of cache (4096)")
    parser.add_argument("--json", action="store_true", help="print the plan as JSON")


def run(arguments: argparse.Namespace) -> int:
    """Print the plan; raises PlanDoesNotFitError after that if there is too little memory."""
    from moesaic.placement import detect_hardware
    from moesaic.placement.table import format_bytes

    prepared = prepare_model(arguments)
    plan, hardware = prepared.plan, detect_hardware()
    prepared.checkpoint.close()
    print(plan.to_json() if arguments.json else plan.table())
    plan.check_fits(hardware, arguments.context)
    if not arguments.json:
        print(
            f"fits: with a cache for {arguments.context} tokens it takes "
            f"{format_bytes(plan.required_bytes(arguments.context))} of the {format_bytes(hardware.dram_available)} "
            "available"
        )
    return 0
