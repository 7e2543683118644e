"""Renders a plan as a table: modules of the same kind over all layers in one line."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from moesaic.placement.units import format_bytes

if TYPE_CHECKING:
    from moesaic.placement.plan import Placement, Plan

__all__ = ["format_bytes", "render"]

_HEADER = ("module", "count", "role", "implementation", "device", "format", "bytes", "read per token")
_LEFT_ALIGNED = frozenset({0, 2, 3, 4, 5})


@dataclass(slots=True)
class _Group:
    """Placements that differ only in their layer."""

    layers: list[int] = field(default_factory=list)
    count: int = 0
    nbytes: int = 0
    bytes_per_token: int = 0


def render(plan: Plan) -> str:
    """The table of `plan.table()`, with totals and warnings below it."""
    groups: dict[tuple[str, ...], _Group] = {}
    for entry in plan.entries:
        if not entry.formats:
            continue  # a block without tensors of its own: its parts have lines
        name, layer = _split_layer(entry.module)
        group = groups.setdefault((name, *_cells(entry)), _Group())
        group.count += 1
        group.nbytes += entry.nbytes
        group.bytes_per_token += entry.bytes_per_token
        if layer is not None:
            group.layers.append(layer)
    rows: list[tuple[str, ...]] = [_HEADER]
    for (name, *cells), group in groups.items():
        module = name.replace("{}", f"[{_ranges(group.layers)}]") if group.layers else name
        sizes = (format_bytes(group.nbytes), format_bytes(group.bytes_per_token))
        rows.append((module, str(group.count), *cells, *sizes))
    totals = (
        f"total: {format_bytes(plan.nbytes)} of weights in DRAM, {format_bytes(plan.bytes_per_token)} read per token, "
        f"cache {format_bytes(plan.kv_bytes_per_position)} per token of context (plan: {plan.source})"
    )
    return "\n".join([*_align(rows), "", totals, *(f"warning: {text}" for text in plan.warnings)])


def _cells(entry: Placement) -> tuple[str, str, str, str]:
    return entry.role, entry.implementation, entry.device, _formats(entry.formats)


def _formats(formats: Mapping[str, str]) -> str:
    """One format, or "gate Q4_K, up Q4_K, down Q6_K" where matrices differ; biases are not worth a column."""
    matrices = {key: fmt for key, fmt in formats.items() if not key.endswith("bias")} or dict(formats)
    if len(set(matrices.values())) == 1:
        return next(iter(matrices.values()))
    return ", ".join(f"{key} {fmt}" for key, fmt in matrices.items())


def _split_layer(name: str) -> tuple[str, int | None]:
    found = re.search(r"\.(\d+)(?=\.|$)", name)
    if found is None:
        return name, None
    return f"{name[: found.start()]}.{{}}{name[found.end() :]}", int(found[1])


def _ranges(layers: list[int]) -> str:
    """Layers in the shortest form: "0-2,5" of [0, 1, 2, 5]."""
    runs: list[list[int]] = []
    for layer in sorted(layers):
        if runs and layer == runs[-1][1] + 1:
            runs[-1][1] = layer
        else:
            runs.append([layer, layer])
    return ",".join(str(first) if first == last else f"{first}-{last}" for first, last in runs)


def _align(rows: list[tuple[str, ...]]) -> list[str]:
    widths = [max(len(row[column]) for row in rows) for column in range(len(_HEADER))]
    lines = []
    for row in rows:
        cells = (
            cell.ljust(width) if column in _LEFT_ALIGNED else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        lines.append("  ".join(cells).rstrip())
    lines.insert(1, "  ".join("-" * width for width in widths))
    return lines
