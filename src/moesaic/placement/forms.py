"""Whether weights are held in another form than their file's: the same values, faster to multiply, larger in memory.

IQ1_S and IQ1_M are such formats: their codebook is too large for registers, and looking weights up takes longer than
reading them, while ternary digits are decoded by arithmetic (`csrc/formats/ternary.h`). What is on a GPU stays as it is
in the file, for VRAM is dear. This module knows no model; what a module takes in its other form, a placement says.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from moesaic.errors import PlanDoesNotFitError
from moesaic.kernels import active_isa, binds_memory
from moesaic.placement import fits
from moesaic.placement.hardware import Hardware
from moesaic.placement.plan import Placement, Plan
from moesaic.placement.units import format_gib
from moesaic.quant import FORMATS, get_format

__all__ = ["COMFORT", "choose_forms"]

COMFORT = 0.9
"""Share of the available memory that a plan takes without a warning; other forms are not chosen above it."""


def choose_forms(plan: Plan, forms: Mapping[str, Placement], ternary: str, hardware: Hardware) -> Plan:
    """The plan with other forms where they are wanted, and a note that says why or why not.

    Args:
        plan: with all modules in the forms of the file, unless it was told otherwise.
        forms: qualified name -> placement on the CPU in another form, of modules that have one.
        ternary: "always", "never", or "auto": where it is faster and the DRAM suffices with some to spare.
        hardware: what the plan is made for.
    """
    changed = {entry.module for entry in plan.entries if entry.device == "cpu" and entry.module in forms}
    if not changed or ternary == "never":
        return plan
    entries = tuple(forms[entry.module] if entry.module in changed else entry for entry in plan.entries)
    recoded = replace(plan, entries=entries)
    names = _names([forms[name] for name in changed])
    more = format_gib(recoded.nbytes_on("cpu") - plan.nbytes_on("cpu"))
    reason = "" if ternary == "always" else _obstacle(recoded, hardware)
    if reason:
        note = f"{names} held as in the file: {reason} (--ternary always: anyway)"
        return replace(plan, notes=(*plan.notes, note))
    note = f"{names} held as ternary digits, which takes {more} more and is faster on the CPU (--ternary never: not)"
    return replace(recoded, notes=(*plan.notes, note))


def _obstacle(recoded: Plan, hardware: Hardware) -> str:
    """Why other forms are not chosen, "" if nothing speaks against it."""
    if active_isa() == "generic":
        return "portable code is no faster with ternary digits"
    needed, available = recoded.required_bytes(), hardware.dram_available
    if needed > COMFORT * available:
        return (
            f"with ternary digits the plan would take {format_gib(needed)}, more than {COMFORT:.0%} of the "
            f"{format_gib(available)} of DRAM that are available"
        )
    if binds_memory():
        try:
            fits.check_nodes(recoded, hardware)
        except PlanDoesNotFitError:
            return "with ternary digits a memory node would not hold its share"
    return ""


def _names(placements: list[Placement]) -> str:
    """The file's formats that have another form among these placements, and the verb."""
    found = {get_format(name) for placement in placements for name in placement.formats.values()}
    numbers = {fmt.recodes for fmt in found if fmt.recodes is not None}
    names = sorted(name for name, fmt in FORMATS.items() if fmt.ggml_type in numbers)
    return f"{' and '.join(names)} {'is' if len(names) == 1 else 'are'}"
