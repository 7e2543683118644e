"""Renders a plan as a table, modules of the same kind over all layers in one line, and its budget of VRAM."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from moesaic.placement.units import format_bytes
from moesaic.placement.vram import KV_BLOCK, MAX_BATCH, MAX_STATES, PREFILL_CHUNK

if TYPE_CHECKING:
    from moesaic.placement.lots import VramLots
    from moesaic.placement.plan import Device, Placement, Plan
    from moesaic.placement.vram import VramBudget

__all__ = ["format_bytes", "render", "render_budget"]

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
    return "\n".join([*_align(rows), "", *_totals(plan), *_remarks(plan)])


def _remarks(plan: Plan) -> list[str]:
    return [f"note: {text}" for text in plan.notes] + [f"warning: {text}" for text in plan.warnings]


def render_budget(budget: VramBudget) -> str:
    """How a plan divides the VRAM, a line per part, and what can be lent of it."""
    if budget.lots is not None:
        return _render_lots(budget, budget.lots)
    expert, share = format_bytes(budget.expert_bytes), budget.cached_share
    parts = [
        *_fixed_parts(budget),
        ("prefill staging", budget.staging, f"{budget.staging_experts} experts of {expert}"),
        ("expert cache", budget.cache, f"{budget.cache_experts} experts of {expert}, {share:.1%} of all in DRAM"),
    ]
    lines = _render_parts(budget, parts)
    return "\n".join([*lines, f"  nothing of it can be lent: {budget.fixed}"] if budget.fixed else lines)


def _render_lots(budget: VramBudget, lots: VramLots) -> str:
    """The same where the experts lend memory."""
    expert, share = format_bytes(budget.expert_bytes), budget.cached_share
    keys = lots.keys * lots.lot_bytes
    experts = min(lots.most_experts, lots.total - lots.keys) * lots.lot_bytes
    angles = (lots.rotary_positions - lots.first_blocks * KV_BLOCK) * lots.rotary_bytes
    parts = [
        *_fixed_parts(budget),
        ("rotary angles", angles, f"of positions up to {lots.rotary_positions}"),
        ("KV cache", keys, f"{budget.context} tokens at first, BF16"),
        ("expert cache", experts, f"{lots.first_slots} experts of {expert}, {share:.1%} of all in DRAM"),
    ]
    reach = max(0, lots.num_blocks - MAX_BATCH) * KV_BLOCK
    lines = [
        *_render_parts(budget, parts),
        f"  the experts lend, {format_bytes(lots.lot_bytes)} at a time: room for {reach} tokens in all, and for "
        f"{budget.staging_experts} experts on their way in prefill",
    ]
    if lots.long_chunk:
        size = format_bytes(lots.long * lots.lot_bytes)
        lines.append(f"  and {size} while longer prompts go through the layers, {lots.long_chunk} tokens at once")
    return "\n".join(lines)


def _fixed_parts(budget: VramBudget) -> list[tuple[str, int, str]]:
    chunk = min(PREFILL_CHUNK, budget.context)
    keys, expert = 0 if budget.lots is not None else budget.kv_cache, format_bytes(budget.expert_bytes)
    return [
        ("weights", budget.weights, ""),
        ("absorbed kv_b_proj", budget.absorbed, "BF16, a matrix per head"),
        ("KV cache", keys, f"{budget.context} tokens, BF16"),
        ("recurrent states", budget.states, f"{MAX_STATES} sequences, F32"),
        ("working memory", budget.working, f"activations of {chunk} tokens, logits"),
        ("driver", budget.driver, ""),
        ("uploads", budget.uploads, f"{budget.upload_experts} experts of {expert}, in decode"),
    ]


def _render_parts(budget: VramBudget, parts: list[tuple[str, int, str]]) -> list[str]:
    lines = [f"VRAM: {format_bytes(budget.total)} to use"]
    lines += [f"  {name:<18}  {format_bytes(size):>10}  {note}".rstrip() for name, size, note in parts if size]
    missing = budget.total - sum(size for _, size, _ in parts)
    name = "not used" if missing >= 0 else "too little"
    return [*lines, f"  {name:<18}  {format_bytes(abs(missing)):>10}"]


def _totals(plan: Plan) -> list[str]:
    strategy = f", as {plan.strategy}" if plan.strategy not in ("", plan.name) else ""
    lines: list[str] = []
    memories: tuple[tuple[Device, str], ...] = (("cpu", "DRAM"), ("gpu", "VRAM"))
    for device, memory in memories:
        if device == "cpu" or plan.uses_gpu:
            size, read, cache = plan.nbytes_on(device), plan.bytes_per_token_on(device), plan.kv_bytes_on(device)
            lines.append(
                f"{'total:' if not lines else '      '} {format_bytes(size)} of weights in {memory}, "
                f"{format_bytes(read)} read per token, cache {format_bytes(cache)} per token of context"
            )
    lines[0] += f" (plan: {plan.name}{strategy})"
    return lines


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
