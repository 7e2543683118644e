"""`moesaic serve`: answer over HTTP, in the forms of OpenAI's, Anthropic's and Ollama's APIs."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from moesaic.cli.options import (
    add_deferral_argument,
    add_model_arguments,
    add_profile_arguments,
    add_threads_argument,
    byte_size,
    plan_of,
    positive_int,
)
from moesaic.cli.terminal import printable
from moesaic.config import read_settings
from moesaic.errors import ConfigError

if TYPE_CHECKING:
    from moesaic.server.options import ServerOptions

__all__ = ["DESCRIPTION", "HELP", "add_arguments", "read_keys", "run"]

HELP = "answer over HTTP as OpenAI, Anthropic and Ollama do"
DESCRIPTION = (
    "Serve MODEL to many clients at a time: /v1/chat/completions, /v1/completions, /v1/responses, /v1/messages, "
    "/api/chat, /api/generate and what belongs to them; /health, /metrics, /openapi.json. Only this computer is served "
    "unless --host and a key are given."
)
_SERVING = (
    "gguf",
    "tokenizer",
    "vram",
    "context",
    "threads",
    "offline",
    "kv_cache",
    "max_batch",
    "expert_profile",
    "save_expert_profile",
    "defer_experts",
)
_DEFAULT_PORT = 8671
_DRAIN_SECONDS = 30


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `moesaic serve`."""
    add_model_arguments(parser)
    parser.add_argument("--tokenizer", metavar="FOLDER", help="take the tokenizer from this folder (for a GGUF)")
    add_threads_argument(parser)
    parser.add_argument("--served-name", metavar="NAME", help="name that clients ask for (default: MODEL's)")
    parser.add_argument("--alias", action="append", default=[], metavar="NAME", help="a further name; may be repeated")
    engine = parser.add_argument_group("engine")
    engine.add_argument("--max-batch", type=positive_int, metavar="N", help="most answers at a time (default: 64)")
    engine.add_argument("--max-waiting", type=positive_int, metavar="N", help="most that wait for them (default: 256)")
    engine.add_argument("--kv-cache", type=byte_size, metavar="SIZE", help="DRAM for what requests have read so far")
    add_profile_arguments(engine)
    add_deferral_argument(engine)
    engine.add_argument(
        "--on-engine-failure",
        choices=("exit", "restart"),
        default="exit",
        help="end with an error (default), or load the model again, at most three times in ten minutes",
    )
    network = parser.add_argument_group("network")
    network.add_argument("--host", default="127.0.0.1", metavar="ADDRESS", help="listen there (default: 127.0.0.1)")
    network.add_argument("--port", type=int, default=_DEFAULT_PORT, metavar="N", help=f"default: {_DEFAULT_PORT}")
    network.add_argument(
        "--api-key",
        action="append",
        default=[],
        metavar="KEY",
        help="clients must show it; may be repeated. Other users of this computer can see it: a file or "
        "MOESAIC_API_KEY is better",
    )
    network.add_argument("--api-key-file", metavar="FILE", help="keys, a line each; # begins a comment")
    network.add_argument(
        "--allow-host", action="append", default=[], metavar="NAME", help="a name of this server in requests; * for any"
    )
    network.add_argument(
        "--allow-origin", action="append", default=[], metavar="URL", help="a web page that may ask; * for any"
    )
    network.add_argument("--public-metrics", action="store_true", help="/metrics needs no key")
    network.add_argument(
        "--drain",
        type=positive_int,
        default=_DRAIN_SECONDS,
        metavar="SECONDS",
        help=f"that running requests get when the server ends (default: {_DRAIN_SECONDS})",
    )
    parser.add_argument("--json-log", action="store_true", help="write the log as JSON, an object per line")


def run(arguments: argparse.Namespace) -> int:
    """Serve until a signal comes."""
    keys = read_keys(arguments.api_key, arguments.api_key_file, read_settings().api_key)
    options = _server_options(arguments, tuple(key for key, _ in keys))  # checked before anything is loaded
    from moesaic.server.lifecycle import serve
    from moesaic.server.loading import ModelOptions, loader
    from moesaic.server.logs import start_logging

    model = ModelOptions(
        arguments.model,
        name=arguments.served_name,
        aliases=tuple(arguments.alias),
        max_waiting=arguments.max_waiting,
        progress=sys.stderr.isatty(),
        serving=(
            ("plan", plan_of(arguments)),
            *((name, getattr(arguments, name)) for name in _SERVING if getattr(arguments, name) is not None),
        ),
    )
    start_logging(arguments.json_log)
    address = ""

    def listening(url: str) -> None:
        nonlocal address
        address = url
        _say(f"listening on {url}, loading {model.model} ...")

    def ready() -> None:
        _say(f"ready. Keys: {_where(keys)}. Try:\n  {_example(address, model.served_name, bool(keys))}")

    return serve(loader(model), options, listening, ready)


def read_keys(given: list[str], file: str | None, environment: str | None) -> list[tuple[str, str]]:
    """All keys, each with where it comes from.

    Raises:
        ConfigError: the file cannot be read or has no key.
    """
    keys = [(key, "--api-key") for key in given]
    if file is not None:
        try:
            lines = [line.strip() for line in Path(file).expanduser().read_text(encoding="utf-8").splitlines()]
        except (OSError, UnicodeDecodeError) as error:
            reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
            raise ConfigError(f"the keys in {file} cannot be read: {reason}.") from None
        found = [(line, file) for line in lines if line and not line.startswith("#")]
        if not found:
            raise ConfigError(f"{file} has no key: expected one or more, a line each.")
        keys += found
    if environment is not None:
        keys.append((environment, "MOESAIC_API_KEY"))
    return keys


def _server_options(arguments: argparse.Namespace, keys: tuple[str, ...]) -> ServerOptions:
    from moesaic.server.options import ServerOptions

    return ServerOptions(
        host=arguments.host,
        port=arguments.port,
        api_keys=keys,
        allow_hosts=tuple(arguments.allow_host),
        allow_origins=tuple(arguments.allow_origin),
        public_metrics=arguments.public_metrics,
        drain_seconds=arguments.drain,
        on_engine_failure=arguments.on_engine_failure,
        json_log=arguments.json_log,
    )


def _where(keys: list[tuple[str, str]]) -> str:
    """Where clients' keys come from; never a key."""
    places = list(dict.fromkeys(place for _, place in keys))
    return f"from {' and '.join(places)}" if places else "none needed, as only this computer is served"


def _example(address: str, name: str, keyed: bool) -> str:
    key = ' -H "Authorization: Bearer $MOESAIC_API_KEY"' if keyed else ""
    body = f'{{"model": "{name}", "messages": [{{"role": "user", "content": "Hello"}}]}}'
    return f"curl {address}/v1/chat/completions{key} -H 'Content-Type: application/json' -d '{body}'"


def _say(text: str) -> None:
    print(f"moesaic: {printable(text)}", file=sys.stderr, flush=True)
