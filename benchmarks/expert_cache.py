"""What a cache of experts would hit: routing replayed through the policy, beside other ways to fill the same slots.

    python benchmarks/expert_cache.py [--out benchmarks/results/expert-cache.md] [--tokens 4096] [--tune]

Traces: the demo model on its own tasks, and a Zipf router with exponents 0.6 to 1.2, its ranking another one in each
layer and drifting slowly. The policy is asked and its copies arrive as in `engine.gpu.expert_cache`: decided every few
steps, in the table two steps later. Beside it: LRU, which copies every miss; the experts that were the busiest in the
first quarter, held for ever; and a bound, which knows what the next 256 tokens will choose and copies for nothing.
Rates are those of the last three quarters. Copies are per 100 experts chosen; *saved* are hits less copies, as a share
of what a token chooses: what the CPU's memory is spared, since a copy reads an expert as well.
`--tune` tries other parameters of the policy. How fast a GPU gets by it, `benchmarks/expert_cache_gpu.py` measures.
"""

from __future__ import annotations

import argparse
import itertools
import time
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from moesaic.engine.gpu.promotion import Move, PromotionPolicy
from routing import demo_trace, zipf_trace

SIZES = (0.03, 0.06, 0.12, 0.25)
EXPONENTS = (0.6, 0.8, 1.0, 1.2)
STEPS_PER_DECISION = 8  # as `ExpertCache`'s default
ARRIVAL = 2  # steps from a decision to the first one that finds the expert
WINDOW = 256  # tokens that the bound looks ahead


@dataclass(frozen=True)
class Trace:
    """Choices int64 `[tokens, layers, top_k]`."""

    name: str
    choices: np.ndarray
    num_experts: int

    @property
    def per_token(self) -> int:
        """Experts that a token chooses, over all layers."""
        return self.choices.shape[1] * self.choices.shape[2]

    def flat(self) -> np.ndarray:
        """Experts of all layers numbered through, `[tokens, per_token]`."""
        layers = np.arange(self.choices.shape[1])[:, None]
        return (layers * self.num_experts + self.choices).reshape(len(self.choices), -1)

    def slots(self, size: float) -> int:
        """Slots that are this share of the experts."""
        return max(1, round(size * self.choices.shape[1] * self.num_experts))


@dataclass(frozen=True)
class Outcome:
    """Hits as a share of choices, and copies per choice, both after the first quarter."""

    hits: float
    copies: float

    @property
    def saved(self) -> float:
        """Reads that memory is spared, as a share of choices."""
        return self.hits - self.copies


def _outcome(hits: np.ndarray, copies: np.ndarray, per_token: int) -> Outcome:
    first = len(hits) // 4
    choices = per_token * (len(hits) - first)
    return Outcome(float(hits[first:].sum()) / choices, float(copies[first:].sum()) / choices)


def replay_policy(trace: Trace, num_slots: int, **options: float) -> Outcome:
    """The cache as it is."""
    num_layers = trace.choices.shape[1]
    policy = PromotionPolicy(num_layers, trace.num_experts, num_slots, **options)
    flat = trace.flat()
    hits, copies = np.zeros(len(flat)), np.zeros(len(flat))
    under_way: list[tuple[int, Move]] = []
    uses = np.zeros(num_layers * trace.num_experts, np.int64)
    for step, chosen in enumerate(flat):
        arrived = [move for arrival, move in under_way if arrival <= step]
        if arrived:
            under_way = [(arrival, move) for arrival, move in under_way if arrival > step]
            for move in arrived:
                policy.complete(move)
        hits[step] = np.count_nonzero(policy.slot_of.ravel()[chosen] >= 0)
        uses[chosen] += 1
        if (step + 1) % STEPS_PER_DECISION == 0:
            policy.record(uses.reshape(num_layers, -1), STEPS_PER_DECISION)
            uses[:] = 0
            moves = policy.moves({move.slot for _, move in under_way})
            under_way += [(step + ARRIVAL, move) for move in moves]
            copies[step] = len(moves)
    return _outcome(hits, copies, trace.per_token)


def replay_lru(trace: Trace, num_slots: int) -> Outcome:
    """Every miss is copied at once, in place of what was used longest ago."""
    held: OrderedDict[int, None] = OrderedDict()
    flat = trace.flat()
    hits, copies = np.zeros(len(flat)), np.zeros(len(flat))
    for step, chosen in enumerate(flat.tolist()):
        for expert in chosen:
            if expert in held:
                hits[step] += 1
                held.move_to_end(expert)
                continue
            copies[step] += 1
            held[expert] = None
            if len(held) > num_slots:
                held.popitem(last=False)
    return _outcome(hits, copies, trace.per_token)


def _busiest(flat: np.ndarray, num_all: int, num_slots: int) -> np.ndarray:
    held = np.zeros(num_all, bool)
    held[np.argsort(-np.bincount(flat.ravel(), minlength=num_all), kind="stable")[:num_slots]] = True
    return held


def replay_static(trace: Trace, num_slots: int) -> Outcome:
    """The busiest of the first quarter."""
    flat, num_all = trace.flat(), trace.choices.shape[1] * trace.num_experts
    held = _busiest(flat[: len(flat) // 4], num_all, num_slots)
    return _outcome(held[flat].sum(1), np.zeros(len(flat)), trace.per_token)


def replay_bound(trace: Trace, num_slots: int) -> Outcome:
    """The busiest of each window, known before it."""
    flat, num_all = trace.flat(), trace.choices.shape[1] * trace.num_experts
    hits = np.zeros(len(flat))
    for start in range(0, len(flat), WINDOW):
        window = flat[start : start + WINDOW]
        hits[start : start + WINDOW] = _busiest(window, num_all, num_slots)[window].sum(1)
    return _outcome(hits, np.zeros(len(flat)), trace.per_token)


def traces(num_tokens: int, num_layers: int) -> list[Trace]:
    """All of them."""
    choices, num_experts = demo_trace(num_tokens)
    found = [Trace(f"demo, {choices.shape[1]} x {num_experts}, top-{choices.shape[2]}", choices, num_experts)]
    for num_experts, exponent in itertools.product((128, 256), EXPONENTS):
        choices = zipf_trace(num_tokens, num_layers, num_experts, 8, exponent)
        found.append(Trace(f"Zipf {exponent}, {num_experts}, top-8", choices, num_experts))
    return found


def table(found: list[Trace]) -> list[str]:
    """Rows: a trace and a size."""
    lines = [
        "| routing | slots | policy: hits | copies per 100 | saved | LRU: hits | copies per 100 | saved "
        "| busiest at first | bound |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for trace, size in itertools.product(found, SIZES):
        slots = trace.slots(size)
        policy, lru = replay_policy(trace, slots), replay_lru(trace, slots)
        static, bound = replay_static(trace, slots), replay_bound(trace, slots)
        cells = [trace.name, f"{size:.0%} ({slots})"]
        for outcome in (policy, lru):
            cells += [f"{outcome.hits:.1%}", f"{100 * outcome.copies:.2f}", f"{outcome.saved:.1%}"]
        lines.append("| " + " | ".join([*cells, f"{static.hits:.1%}", f"{bound.hits:.1%}"]) + " |")
        print(lines[-1], flush=True)
    return lines


def tune(found: list[Trace]) -> list[str]:
    """Mean of what is saved over all traces and sizes, and over the demo's alone, best first."""
    grid: dict[str, tuple[float, ...]] = {
        "half_life": (64.0, 96.0, 128.0, 192.0, 256.0, 512.0),
        "advantage": (1.0, 2.0, 4.0, 8.0),
        "share": (0.025,),
    }
    rows: list[tuple[float, float, dict[str, Any]]] = []
    for values in itertools.product(*grid.values()):
        options = dict(zip(grid, values, strict=True))
        saved = [[replay_policy(trace, trace.slots(size), **options).saved for size in SIZES] for trace in found]
        rows.append((float(np.mean(saved)), float(np.mean(saved[0])), options))
        print(f"{rows[-1][0]:.4f} {rows[-1][1]:.4f} {options}", flush=True)
    rows.sort(key=lambda row: -row[0])
    lines = ["| half life | advantage | share | saved, all traces | saved, demo |", "|---|---|---|---|---|"]
    for mean, of_demo, options in rows[:8]:
        cells = [f"{options[name]:g}" for name in grid]
        lines.append("| " + " | ".join([*cells, f"{mean:.2%}", f"{of_demo:.2%}"]) + " |")
    return lines


def main(argv: list[str] | None = None) -> None:
    """Replay, store, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="a Markdown file")
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--layers", type=int, default=4, help="of the Zipf routers")
    parser.add_argument("--tune", action="store_true")
    arguments = parser.parse_args(argv)
    found = traces(arguments.tokens, arguments.layers)
    lines = tune(found) if arguments.tune else table(found)
    if arguments.out is not None:
        head = (
            f"# Hit rates of expert caches\n\n`python benchmarks/expert_cache.py`, {arguments.tokens} tokens, "
            f"{arguments.layers} layers of the Zipf routers, {time.strftime('%d %B %Y')}. A replay, so no "
            "machine's speed is in it.\n\n"
        )
        arguments.out.write_text(head + "\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
