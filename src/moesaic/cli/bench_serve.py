"""`moesaic bench serve`: many requests at once, on a server or on a model of this process."""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict
from typing import TYPE_CHECKING

from moesaic.cli.options import (
    add_any_model_arguments,
    add_deferral_argument,
    byte_size,
    list_presets,
    plan_of,
    positive_int,
)
from moesaic.cli.terminal import printable
from moesaic.config import read_settings
from moesaic.errors import ConfigError

if TYPE_CHECKING:
    from moesaic.engine.serving.bench.bound import Bound
    from moesaic.engine.serving.bench.figures import LoadFigures
    from moesaic.server.bench.measure import Load, ServeResult

__all__ = ["DESCRIPTION", "HELP", "add_arguments", "run"]

HELP = "measure many requests at once"
DESCRIPTION = (
    "Measure how many people can be served: time to the first token, time between tokens, requests and tokens per "
    "second. On a server (--url), on MODEL, or on a model of real dimensions with random weights (--synthetic); with "
    "users who ask again when they have their answer (--users), or with requests that come at a rate (--rate)."
)
_USERS = "1,8,32"
_OPEN_REQUESTS = 64
_USER_REQUESTS = 2


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `moesaic bench serve`."""
    add_any_model_arguments(parser)
    parser.add_argument("--vram", type=byte_size, metavar="SIZE", help="GPU memory to use (default: what is free)")
    add_deferral_argument(parser)
    server = parser.add_argument_group("a server instead of a model")
    server.add_argument("--url", metavar="URL", help="ask the server there, by OpenAI's /v1/completions")
    server.add_argument("--api-key", metavar="KEY", help="key to show it (default: MOESAIC_API_KEY)")
    server.add_argument("--served-name", metavar="NAME", help="model to ask for (default: the first that it has)")
    server.add_argument(
        "--vocab", type=positive_int, default=1000, metavar="N", help="prompts are random tokens below N (1000)"
    )
    load = parser.add_argument_group("load")
    load.add_argument("--users", type=_several, metavar="N,...", help=f"users at a time, in turns ({_USERS})")
    load.add_argument("--rate", type=_positive, metavar="R", help="requests per second instead, whatever answers take")
    load.add_argument("--arrivals", choices=("poisson", "fixed"), default="poisson", help="with --rate (poisson)")
    load.add_argument(
        "--requests",
        type=positive_int,
        metavar="N",
        help=f"of each user ({_USER_REQUESTS}), or in all with --rate ({_OPEN_REQUESTS})",
    )
    load.add_argument("--prompt-tokens", default="128", metavar="N[-M]", help="tokens of prompts, or a range (128)")
    load.add_argument("--tokens", default="64", metavar="N[-M]", help="tokens of answers, or a range (64)")
    load.add_argument(
        "--shared-prefix", type=int, default=0, metavar="N", help="tokens that all prompts begin with (0)"
    )
    load.add_argument("--temperature", type=float, default=0.0, metavar="T", help="of sampling (0)")
    load.add_argument("--seed", type=int, default=0, metavar="N", help="of prompts, lengths and arrivals (0)")
    parser.add_argument(
        "--http", action="store_true", help="also through a server, so that what it adds shows; not with --url"
    )
    parser.add_argument("--json", action="store_true", help="print the result as JSON")


def run(arguments: argparse.Namespace) -> int:
    """Ask, measure, print."""
    if arguments.synthetic == "list":
        print(list_presets())
        return 0
    if sum(given is not None for given in (arguments.url, arguments.model, arguments.synthetic)) != 1:
        raise ConfigError(
            "bench serve needs one of --url URL, MODEL and --synthetic PRESET ('list' shows the presets)."
        )
    if arguments.url is not None and arguments.http:
        raise ConfigError("--http starts a server for a model of this process; with --url there is one already.")
    load = _load(arguments)
    result = _measure_url(arguments, load) if arguments.url is not None else _measure_engine(arguments, load)
    print(json.dumps(asdict(result), indent=2) if arguments.json else render(result))
    return 0 if all(each.failed < each.requests for each in result.figures) else 1


def _load(arguments: argparse.Namespace) -> Load:
    from moesaic.engine.serving.bench.load import Lengths
    from moesaic.server.bench.measure import Load

    if arguments.users is not None and arguments.rate is not None:
        raise ConfigError("--users and --rate exclude each other: a closed or an open loop.")
    is_open = arguments.rate is not None
    return Load(
        users=() if is_open else arguments.users or _several(_USERS),
        rate=arguments.rate or 1.0,
        arrivals=arguments.arrivals,
        requests=arguments.requests or (_OPEN_REQUESTS if is_open else _USER_REQUESTS),
        prompt=Lengths.parse(arguments.prompt_tokens),
        answer=Lengths.parse(arguments.tokens),
        shared_prefix=arguments.shared_prefix,
        seed=arguments.seed,
        temperature=arguments.temperature,
    )


def _measure_url(arguments: argparse.Namespace, load: Load) -> ServeResult:
    from moesaic.server.bench.measure import measure_url

    return measure_url(
        load,
        arguments.url,
        model=arguments.served_name,
        api_key=arguments.api_key or read_settings().api_key,
        vocab_size=max(arguments.vocab, 16),
        say=_say,
    )


def _measure_engine(arguments: argparse.Namespace, load: Load) -> ServeResult:
    from moesaic.engine.serving.bench.subject import make_subject
    from moesaic.server.bench.measure import measure_engine

    subject = make_subject(
        model=arguments.model,
        preset=arguments.synthetic,
        weight_format=arguments.format,
        num_layers=arguments.layers,
        users=load.most_users,
        positions=load.positions,
        cache_positions=load.positions * load.most_users,
        threads=arguments.threads,
        gguf=arguments.gguf,
        plan=plan_of(arguments),
        vram=arguments.vram,
        offline=arguments.offline,
        progress=sys.stderr.isatty(),
        defer_experts=arguments.defer_experts or 0,
    )
    return measure_engine(load, subject, http=arguments.http, say=_say)


def render(result: ServeResult) -> str:
    """The table."""
    lines = [result.subject, f"prompts of {result.prompt} tokens, answers of {result.answer}; times in ms", ""]
    lines += _columns([_HEAD, *map(_row, result.figures)])
    for each in result.figures:
        lines += [f"failed {count} times: {printable(text)}" for text, count in each.errors]
    if result.bounds:
        lines += ["", *_bound_lines(result.bounds, result.figures)]
    return "\n".join(lines)


_HEAD = (
    "via",
    "load",
    "requests",
    "failed",
    "TTFT p50",
    "p99",
    "between tokens p50",
    "p99",
    "max",
    "requests/s",
    "tokens/s",
    "decode tok/s",
    "cached",
)


def _row(figures: LoadFigures) -> tuple[str, ...]:
    return (
        figures.via,
        _how(figures),
        str(figures.requests),
        str(figures.failed),
        *(
            "-" if value is None else f"{value:.1f}"
            for value in (figures.ttft_p50, figures.ttft_p99, figures.itl_p50, figures.itl_p99, figures.itl_max)
        ),
        f"{figures.requests_per_second:.2f}",
        f"{figures.tokens_per_second:.1f}",
        "-" if figures.decode_tokens_per_second is None else f"{figures.decode_tokens_per_second:.1f}",
        f"{figures.cached_tokens} of {figures.prompt_tokens}",
    )


def _how(figures: LoadFigures) -> str:
    if figures.users is None:
        return f"{figures.rate:g}/s"
    return "1 user" if figures.users == 1 else f"{figures.users} users"


def _columns(rows: list[tuple[str, ...]]) -> list[str]:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]


def _bound_lines(bounds: tuple[Bound, ...], figures: tuple[LoadFigures, ...]) -> list[str]:
    one = next(each.decode_tokens_per_second for each in figures if each.users == 1)
    lines = [f"bound of decode: bytes of a step at the rate at which one user reads them ({one or 0.0:.2f} tok/s)"]
    for bound in bounds:
        seen = "" if bound.distinct is None else f"{bound.distinct:.1f} different experts a layer, "
        lines.append(
            f"{bound.users:4} users: {seen}{bound.expected_distinct:.1f} if they were random; "
            f"{bound.step_bytes / 1e9:.3f} GB a step; bound {bound.tokens_per_second:.1f} tok/s "
            f"({bound.gain:.2f} x one user), reached {bound.measured:.1f} ({bound.share:.0%})"
        )
    return lines


def _several(text: str) -> tuple[int, ...]:
    return tuple(positive_int(part) for part in text.split(","))


def _tokens(text: str) -> int:
    return 0 if text == "0" else positive_int(text)


def _positive(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"'{text}' is not a number above 0")
    return value


def _say(text: str) -> None:
    print(f"moesaic: {text}", file=sys.stderr, flush=True)
