"""Many people at once: rates against the bound of bytes, what HTTP adds, a long prompt beside others, known beginnings.

    python benchmarks/serving.py --name NAME [--synthetic qwen3-30b-a3b] [--format Q4_K] [--layers 12]
        [--users 1,8,32] [--long-prompt 32768] [--parts load,latency,fairness,prefix,demo] [--plan hybrid --vram 8GiB]

One model is loaded for all parts; `demo` asks the built-in model. Writes benchmarks/results/serving-NAME.md, part by
part.
"""

from __future__ import annotations

import argparse
import asyncio
import datetime
import shlex
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

from moesaic.cli.bench_serve import render
from moesaic.engine.serving.async_engine import AsyncEngine
from moesaic.engine.serving.bench.drive import EngineTarget
from moesaic.engine.serving.bench.load import Lengths
from moesaic.engine.serving.bench.scenarios import Fairness, Prefix, measure_fairness, measure_prefix
from moesaic.engine.serving.bench.subject import Subject, make_subject
from moesaic.errors import MoesaicError
from moesaic.kernels import active_isa, num_threads, read_bandwidth
from moesaic.placement import detect_hardware
from moesaic.placement.units import parse_size
from moesaic.server.bench.latency import Latency, measure_latency
from moesaic.server.bench.measure import Load, measure_running, started

PARTS = ("load", "latency", "fairness", "prefix", "demo")
RESULTS = Path(__file__).parent / "results"
Say = Callable[[str], None]


@dataclass
class Model:
    """What parts ask: one engine, loaded when the first of them needs it."""

    subject: Subject
    engine: AsyncEngine

    @property
    def vocab_size(self) -> int:
        return self.subject.engine.runner.vocab_size


async def load_part(model: Model, args: argparse.Namespace, say: Say) -> list[str]:
    load = Load(users=args.users, requests=2, prompt=args.prompt_tokens, answer=args.tokens)
    result = await measure_running(load, model.subject, model.engine, http=True, say=say)
    return ["```", render(result), "```"]


def latency_lines(rows: list[Latency]) -> list[str]:
    """What HTTP adds, a row per number of streams."""
    lines = [
        "Milliseconds from the end of a step to its token at the client; steps of a given time, no model. Target: HTTP "
        "adds at most 5 ms at 64 streams. The last column is processor time of the server's event loop per token, in "
        "which no waiting counts.",
        "",
        "| streams | step | tokens | direct p50 | p99 | HTTP p50 | p99 | added p50 | added p99 | µs of the loop |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        figures = (row.direct_p50, row.direct_p99, row.http_p50, row.http_p99, row.added_p50, row.added_p99)
        cells = " | ".join(f"{figure:.2f}" for figure in figures)
        lines.append(f"| {row.streams} | {row.step:.0f} | {row.tokens} | {cells} | {row.loop_microseconds:.0f} |")
    return lines


def fairness_lines(fair: Fairness) -> list[str]:
    """Times between tokens without and with a long prompt."""
    return [
        f"{fair.users} users decode; then a prompt of {fair.prompt_tokens} tokens comes, whose first token takes "
        f"{fair.prompt_seconds:.1f} s. Target: times between the others' tokens stay below 3 x their median.",
        "",
        "| ms between tokens | p50 | p99 | max | measured |",
        "|---|---|---|---|---|",
        f"| without | {fair.before_p50:.1f} | {fair.before_p99:.1f} | {fair.before_max:.1f} | {fair.gaps[0]} |",
        f"| with | {fair.during_p50:.1f} | {fair.during_p99:.1f} | {fair.during_max:.1f} | {fair.gaps[1]} |",
        f"| over the median without | {fair.during_p50 / fair.before_p50:.2f} | {fair.ratio_p99:.2f} | "
        f"{fair.ratio_max:.2f} | |",
    ]


def prefix_lines(prefix: Prefix) -> list[str]:
    """Times to the first token."""
    return [
        f"Prompts of {prefix.prompt_tokens} tokens in pairs that share {prefix.shared_tokens}: the first token took "
        f"{prefix.first:.0f} ms, then {prefix.second:.0f} ms with {prefix.cached_tokens} tokens from the cache: "
        f"{prefix.ratio:.1%} (medians of {prefix.pairs} pairs). Target: at most 10%.",
    ]


async def latency_part(args: argparse.Namespace) -> list[str]:
    return latency_lines([await measure_latency(streams) for streams in (1, 8, 64)])


async def fairness_part(model: Model, args: argparse.Namespace) -> list[str]:
    target = EngineTarget(model.engine)
    return fairness_lines(
        await measure_fairness(
            target, model.vocab_size, long_prompt=args.long_prompt, users=args.decoding, seconds_alone=args.alone
        )
    )


async def prefix_part(model: Model, args: argparse.Namespace) -> list[str]:
    return prefix_lines(await measure_prefix(EngineTarget(model.engine), model.vocab_size, shared=args.shared))


@asynccontextmanager
async def opened(args: argparse.Namespace, demo: bool) -> AsyncIterator[Model]:
    """The model of all parts, or the built-in one."""
    loads = max(args.users) * (args.prompt_tokens.high + args.tokens.high)
    beside = args.decoding * (128 + 4096) + max(args.long_prompt, args.shared + 64)
    subject = make_subject(
        model="demo" if demo else None,
        preset=None if demo else args.synthetic,
        weight_format=args.format,
        num_layers=args.layers,
        users=max(args.users),
        positions=1,
        cache_positions=loads if demo else max(loads, beside),
        threads=args.threads,
        plan=args.plan,
        vram=args.vram,
    )
    async with started(subject, 1024) as engine:
        yield Model(subject, engine)


async def run(args: argparse.Namespace, write: Callable[[str, list[str]], None], say: Say) -> None:
    async def part(title: str, lines: Awaitable[list[str]]) -> None:
        try:
            write(title, await lines)
        except MoesaicError as error:
            write(title, [f"Not measured: {error}"])

    if "latency" in args.parts:
        await part("What HTTP adds to a token", latency_part(args))
    if {"load", "fairness", "prefix"} & set(args.parts):
        async with opened(args, demo=False) as model:
            if "load" in args.parts:
                await part("Load", load_part(model, args, say))
            if "prefix" in args.parts:
                await part("A known beginning", prefix_part(model, args))
            if "fairness" in args.parts:
                await part("A long prompt beside others", fairness_part(model, args))
    if "demo" in args.parts:
        async with opened(args, demo=True) as model:
            await part("Load on the demo model", load_part(model, args, say))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--name", required=True, help="of the machine, for the results' file")
    parser.add_argument("--synthetic", default="qwen3-30b-a3b", metavar="PRESET")
    parser.add_argument("--format", default="Q4_K")
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--plan", default="cpu", help="where the model's parts lie")
    parser.add_argument("--vram", type=parse_size, help="of a GPU that may be used")
    parser.add_argument("--users", default="1,8,32")
    parser.add_argument("--prompt-tokens", default="128")
    parser.add_argument("--tokens", default="64")
    parser.add_argument("--long-prompt", type=int, default=32768, help="tokens")
    parser.add_argument("--decoding", type=int, default=4, help="users who decode beside it")
    parser.add_argument("--alone", type=float, default=10.0, help="seconds that they are measured before it")
    parser.add_argument("--shared", type=int, default=4096, help="tokens of the known beginning")
    parser.add_argument("--parts", default=",".join(PARTS))
    args = parser.parse_args()
    args.users = tuple(int(count) for count in args.users.split(","))
    args.prompt_tokens, args.tokens = Lengths.parse(args.prompt_tokens), Lengths.parse(args.tokens)
    args.parts = args.parts.split(",")
    if unknown := set(args.parts) - set(PARTS):
        parser.error(f"no part: {', '.join(sorted(unknown))}; there are {', '.join(PARTS)}")
    bandwidth = read_bandwidth(detect_hardware().probe_bytes).median
    path = RESULTS / f"serving-{args.name}.md"
    command = shlex.join(["python", "benchmarks/serving.py", *sys.argv[1:]])
    sections = [
        f"# Serving: {args.name}\n\n{datetime.date.today()}, {active_isa()}, {num_threads()} threads, "
        f"{bandwidth:.1f} GB/s read. `{command}`\n"
    ]

    def write(title: str, lines: list[str]) -> None:
        sections.append("\n".join([f"## {title}", "", *lines, ""]))
        path.write_text("\n".join(sections), encoding="utf-8")
        print(sections[-1], flush=True)

    asyncio.run(run(args, write, lambda text: print(text, file=sys.stderr, flush=True)))
    print(f"written to {path}")


if __name__ == "__main__":
    main()
