"""`moesaic plan`: where every module would go and what it takes, before any weight is loaded."""

from __future__ import annotations

import argparse
from dataclasses import asdict
from typing import TYPE_CHECKING

from moesaic.cli.options import (
    add_any_model_arguments,
    add_budget_arguments,
    add_deferral_argument,
    list_presets,
    plan_of,
)
from moesaic.errors import ConfigError, PlanDoesNotFitError, PlanError

if TYPE_CHECKING:
    from moesaic.placement import Hardware, Plan, VramBudget
    from moesaic.placement.roofline import Bandwidths, Roofline

__all__ = ["DESCRIPTION", "HELP", "add_arguments", "run"]

HELP = "show where every module would go and what it takes"
DESCRIPTION = (
    "Print the placement of a model (module, count, implementation, device, format, bytes), the DRAM and VRAM that it "
    "takes, how the VRAM is divided, the bytes that one token reads, and the decode speed that this computer's memory "
    "allows. No weight is loaded. Exit code 1 if it does not fit."
)

_PROBE_SECONDS = 0.5


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `moesaic plan`."""
    add_any_model_arguments(parser)
    add_budget_arguments(parser)
    add_deferral_argument(parser)
    parser.add_argument(
        "--bandwidth",
        type=_bandwidths,
        metavar="dram=R,vram=R",
        help="how fast memory is read, e.g. dram=97GB/s,vram=3350GB/s, for the decode speed that this allows (default: "
        "as measured here)",
    )
    parser.add_argument(
        "--measure",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="measure how fast memory is read whose bandwidth is not given, which takes a second or two (default)",
    )
    parser.add_argument("--json", action="store_true", help="print the plan as JSON")


def run(arguments: argparse.Namespace) -> int:
    """Print the plan; raises PlanDoesNotFitError after that if there is too little memory."""
    if arguments.synthetic == "list":
        print(list_presets())
        return 0
    if (arguments.model is None) == (arguments.synthetic is None):
        raise ConfigError("plan needs either MODEL or --synthetic PRESET ('--synthetic list' shows the presets).")
    from moesaic.engine.deferral import check_deferral, deferral_note
    from moesaic.engine.loader import this_computer

    plan, late = _plan(arguments), arguments.defer_experts or 0
    check_deferral(plan, late)
    hardware = this_computer(plan.uses_gpu)
    budget = plan.vram_budget(hardware)
    bandwidths = _known_bandwidths(arguments, plan, hardware)
    print(_json(plan, budget, bandwidths) if arguments.json else _render(plan, budget, bandwidths))
    if late and not arguments.json:
        print(f"in decode {deferral_note(plan, late)}")
    try:
        plan.check_fits(hardware)
    except PlanDoesNotFitError:
        raise
    except PlanError:  # all that is missing is the GPU
        if not arguments.json:
            print(f"but for the GPU it {_fits(plan, budget, hardware)}")
        raise
    if not arguments.json:
        print(_fits(plan, budget, hardware))
    return 0


def _plan(arguments: argparse.Namespace) -> Plan:
    from moesaic.engine.subjects import prepare_subject
    from moesaic.placement import DEFAULT_CONTEXT

    prepared, _ = prepare_subject(
        arguments.model,
        arguments.synthetic,
        arguments.format,
        arguments.layers,
        arguments.gguf,
        plan_of(arguments),
        arguments.offline,
        vram=arguments.vram,
        context=arguments.context or DEFAULT_CONTEXT,
    )
    prepared.checkpoint.close()
    return prepared.plan


def _bandwidths(text: str) -> Bandwidths:
    """For argparse: "dram=97GB/s,vram=3350GB/s", or one of the two."""
    from moesaic.placement.roofline import Bandwidths
    from moesaic.placement.units import parse_bandwidth

    found: dict[str, float] = {}
    for part in text.split(","):
        name, _, rate = part.partition("=")
        if name.strip() not in ("dram", "vram") or name.strip() in found:
            raise argparse.ArgumentTypeError(f"'{part}': expected dram=RATE, vram=RATE or both, such as dram=97GB/s")
        try:
            found[name.strip()] = parse_bandwidth(rate)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from None
    return Bandwidths(**found)


def _known_bandwidths(arguments: argparse.Namespace, plan: Plan, hardware: Hardware) -> Bandwidths:
    """Those given, and this computer's where they are not, if they may be measured."""
    from moesaic.placement.roofline import Bandwidths

    given: Bandwidths = arguments.bandwidth or Bandwidths()
    if not arguments.measure:
        return given
    dram, vram = given.dram, given.vram
    if plan.uses_gpu and vram is None:  # first, as PyTorch's CUDA comes before the extension
        vram = _vram_rate()
    if dram is None:
        from moesaic.kernels import read_bandwidth, set_num_threads

        if arguments.threads is not None:
            set_num_threads(arguments.threads)
        dram = read_bandwidth(hardware.probe_bytes, _PROBE_SECONDS).median
    return Bandwidths(dram, vram)


def _vram_rate() -> float | None:
    """GB/s; None where there is no GPU, or others have its memory."""
    from moesaic.engine import bench

    try:
        return bench.vram_rate() or None
    except RuntimeError:  # PyTorch's for a full card, and for a broken one
        return None


def _json(plan: Plan, budget: VramBudget | None, bandwidths: Bandwidths) -> str:
    from moesaic.placement.roofline import decode_roofline

    more: dict[str, object] = {"vram_budget": None, "bandwidths": asdict(bandwidths), "roofline": None}
    more["roofline_with_cache"] = None
    if budget is not None:
        derived = ("num_blocks", "required", "shortfall", "staging_experts", "staging", "cache_experts", "cache")
        more["vram_budget"] = asdict(budget) | {name: getattr(budget, name) for name in (*derived, "uploads")}
    hit_rate = _hit_rate(budget, bandwidths)
    for name, hits in (("roofline", 0.0), *((("roofline_with_cache", hit_rate),) if hit_rate else ())):
        roofline = decode_roofline(plan, bandwidths, hits)
        if roofline is not None:
            speed = {"hit_rate": hits, "tokens_per_second": roofline.tokens_per_second}
            more[name] = asdict(roofline) | speed
    return plan.to_json(more)


def _render(plan: Plan, budget: VramBudget | None, bandwidths: Bandwidths) -> str:
    from moesaic.placement.roofline import decode_roofline
    from moesaic.placement.table import format_bytes, render_budget

    parts = [plan.table(), ""]
    if budget is not None:
        pinned = format_bytes(plan.pinned_bytes())
        parts += [render_budget(budget), f"pinned DRAM: {pinned} to hand over between GPU and CPU", ""]
    parts.append(_render_roofline(plan, bandwidths, decode_roofline(plan, bandwidths)))
    hit_rate = _hit_rate(budget, bandwidths)
    cached = decode_roofline(plan, bandwidths, hit_rate) if hit_rate else None
    if cached is not None:
        parts.append(
            f"with {hit_rate:.1%} of the chosen experts in the expert cache, as if routers chose all equally often: at "
            f"most {cached.tokens_per_second:.2f} tok/s; routers with favourites find more of them there"
        )
    return "\n".join(parts)


def _hit_rate(budget: VramBudget | None, bandwidths: Bandwidths) -> float:
    """Of routers that choose all experts equally often; 0 where it would say nothing of the speed."""
    return 0.0 if budget is None or bandwidths.vram is None else budget.cached_share


def _render_roofline(plan: Plan, bandwidths: Bandwidths, roofline: Roofline | None) -> str:
    from moesaic.placement.table import format_bytes

    dram, vram = format_bytes(plan.bytes_per_token_on("cpu")), format_bytes(plan.bytes_per_token_on("gpu"))
    read = f"a token reads {dram} from DRAM" + (f" and {vram} from VRAM" if plan.uses_gpu else "")
    if roofline is None:
        wanted = "dram=97GB/s,vram=3350GB/s" if plan.uses_gpu else "dram=97GB/s"
        return f"{read}; for the decode speed that this allows: --measure, or --bandwidth {wanted}"
    times = [f"{roofline.dram_seconds * 1e3:.2f} ms for DRAM at {bandwidths.dram or 0:.1f} GB/s"]
    if roofline.vram_seconds is None:
        times.append("VRAM left out: its bandwidth is not known (--bandwidth vram=3350GB/s)")
    elif plan.uses_gpu:
        times.append(f"{roofline.vram_seconds * 1e3:.2f} ms for VRAM at {bandwidths.vram or 0:.1f} GB/s")
        times.append(f"{roofline.overlap_seconds * 1e3:.2f} ms of both at once")
    if roofline.handoff_seconds:
        times.append(f"{roofline.handoff_seconds * 1e3:.2f} ms for hand-overs")
    without = ", without hits in the expert cache" if plan.uses_gpu else ""
    return f"{read}: at most {roofline.tokens_per_second:.2f} tok/s ({', '.join(times)}; short context{without})"


def _fits(plan: Plan, budget: VramBudget | None, hardware: Hardware) -> str:
    from moesaic.placement.table import format_bytes

    needed, available = format_bytes(plan.required_bytes()), format_bytes(hardware.dram_available)
    text = f"fits: with a cache for {plan.context} tokens it takes {needed} of the {available} available"
    if budget is None:
        return text
    return f"{text} in DRAM, and at least {format_bytes(budget.required)} of VRAM"
