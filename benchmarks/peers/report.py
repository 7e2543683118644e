"""The result file for people: tables in Markdown from what compare.py stored as JSON."""

from __future__ import annotations

from typing import Any

__all__ = ["markdown"]

_FEW_TOKENS = 16  # up to here weights are what is waited for, above it is arithmetic
_NOT_RUN = {"state": "not run"}  # cells that an earlier command did not ask for
Unit = dict[str, Any]


def markdown(stored: dict[str, Any]) -> str:
    """All of it as one document."""
    lines = ["# Side by side with other programs", "", *_machine(stored["machine"]), ""]
    lines += [*(f"Command: `{command}`\n" for command in stored["commands"])]
    for title, part, table in (
        ("Routed experts of one layer", "experts", _expert_table),
        ("Whole models on the CPU", "models", _model_table),
    ):
        units = [unit for unit in stored["units"] if unit["part"] == part]
        for model in dict.fromkeys(unit["model"] for unit in units):
            lines += [f"## {title}: {model}", "", *table([u for u in units if u["model"] == model], stored), ""]
    return "\n".join(lines).rstrip() + "\n"


def _machine(machine: dict[str, Any]) -> list[str]:
    bandwidth = machine["read_bandwidth_gb_s"]
    kind = "virtual machine" if machine["virtual"] else "machine"
    lines = [
        f"{machine['date']}: {machine['cores']} cores of {machine['cpu']} ({kind}, {machine['numa_nodes']} memory "
        f"node(s)), {machine['memory_gib']} GiB, last-level cache {machine['last_level_cache_mib']} MiB, "
        f"{machine['threads']} threads, our instruction set {machine['isa']}. {machine['system']}, Python "
        f"{machine['python']}, moesaic {machine['moesaic']}.",
        "",
        f"Measured at the start: reading {bandwidth['best']} GB/s (median {bandwidth['median']}), 8-bit dot products "
        f"{machine['peak_dot_i8_gmac_s']} GMAC/s, float32 multiply-adds {machine['peak_fma_f32_gmac_s']} GMAC/s, "
        f"load average {machine['load_average']:.1f}.",
        "",
        "Processor features: " + ", ".join(machine["features"]) + ".",
        "",
    ]
    for name, versions in machine["versions"].items():
        if versions:
            lines.append(f"- environment of {name}: " + ", ".join(f"{k} {v}" for k, v in versions.items()))
    if machine["note"]:
        lines += ["", machine["note"]]
    return lines


def _expert_table(units: list[Unit], stored: dict[str, Any]) -> list[str]:
    tokens = stored["arguments"]["tokens"]
    head = [f"{count} tok" + (" ms (share)" if count <= _FEW_TOKENS else " ms (GMAC/s)") for count in tokens]
    lines = ["Share: weights of the experts touched per second over the read bandwidth measured between the turns.", ""]
    lines += _row(["format", "program", *head]) + _row(["---"] * (2 + len(head)))
    notes = []
    for unit in units:
        if unit["state"] != "ok":
            lines += _row([unit["format"], unit["state"], *[""] * len(head)])
            continue
        for label, row in unit["programs"].items():
            shown = label if row["format"] in (unit["format"], None) else f"{label} {row['format']}"
            lines += _row([unit["format"], shown, *_expert_cells(row["cells"], tokens)])
        lines += _row([unit["format"], "times kt-kernel", *_ratios(unit, tokens)])
        size = f"{unit['num_layers']} x {unit['num_experts']} experts"
        notes.append(f"- {unit['format']}: {size}, {unit['note'] or 'complete'}; {_details(unit)}")
    return [*lines, "", *notes]


def _expert_cells(cells: dict[str, Any], tokens: list[int]) -> list[str]:
    shown: list[str] = []
    state = None
    for count in tokens:
        cell = cells.get(str(count), _NOT_RUN)
        if "state" in cell:
            shown.append("as left" if cell["state"] == state else str(cell["state"]))
        elif count <= _FEW_TOKENS:
            shown.append(f"{cell['ms']:.2f} ({cell['share']:.0%}, {cell['gb_s']:.1f} GB/s)")
        else:
            shown.append(f"{cell['ms']:.1f} ({cell['gmac_s']:.0f})")
        state = cell.get("state")
    return shown


def _ratios(unit: Unit, tokens: list[int]) -> list[str]:
    """How many times as fast as the fastest kt-kernel ours is."""
    shown = []
    for count in tokens:
        cells = {label: row["cells"].get(str(count), _NOT_RUN) for label, row in unit["programs"].items()}
        theirs = [cell["ms"] for label, cell in cells.items() if label != "moesaic" and "ms" in cell]
        ours = cells["moesaic"].get("ms")
        shown.append(f"**{min(theirs) / ours:.2f}**" if theirs and ours else "")
    return shown


def _details(unit: Unit) -> str:
    said = [f"{label}: {row['detail']}" for label, row in unit["programs"].items() if row.get("detail")]
    return "; ".join([*said, f"reading {unit['read_bandwidth_gb_s']['median']:.1f} GB/s"])


def _model_table(units: list[Unit], stored: dict[str, Any]) -> list[str]:
    prompt, decode = stored["arguments"]["prompt"], stored["arguments"]["decode"]
    head = ["format", "program", f"decode tok/s ({decode} tokens)", "share", f"prefill-{prompt} tok/s", "peak memory"]
    lines = _row(head) + _row(["---"] * len(head))
    notes = []
    for unit in units:
        if unit["state"] != "ok":
            lines += _row([unit["format"], unit["state"], "", "", "", ""])
            continue
        for label, row in unit["programs"].items():
            lines += _row([unit["format"], label, *_model_cells(row)])
        lines += _row([unit["format"], "times the best other", *_model_ratios(unit["programs"]), ""])
        size = f"{unit['num_layers']} layers, {unit['file_bytes'] / 1e9:.2f} GB, {unit['bytes_per_token'] / 1e9:.3f} GB"
        bandwidth = unit["read_bandwidth_gb_s"]["median"]
        notes.append(
            f"- {unit['format']}: {size} read per token; reading {bandwidth:.1f} GB/s. {unit['note']}".rstrip()
        )
    return [*lines, "", *notes]


def _model_cells(row: dict[str, Any]) -> list[str]:
    if "state" in row:
        return [str(row["state"]), "", "", ""]
    peaks = [turn["peak_bytes"] for turn in row["turns"] if "peak_bytes" in turn]
    peak = f"{max(peaks) / 1e9:.1f} GB" if peaks else ""
    later = f" ({row['later']})" if "later" in row else ""
    return [f"{row['decode']:.1f}{later}", f"{row['share']:.0%}", f"{row['prefill']:.0f}", peak]


def _model_ratios(programs: dict[str, Any]) -> list[str]:
    ours = programs["moesaic"]
    others = [row for label, row in programs.items() if label != "moesaic" and "decode" in row]
    if "decode" not in ours or not others:
        return ["", "", ""]
    decode, prefill = (ours[what] / max(row[what] for row in others) for what in ("decode", "prefill"))
    return [f"**{decode:.2f}**", "", f"**{prefill:.2f}**"]


def _row(cells: list[str]) -> list[str]:
    return ["| " + " | ".join(cell.replace("|", "/") for cell in cells) + " |"]
