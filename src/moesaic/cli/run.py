"""`moesaic run`: answer one prompt, or hold a conversation in the terminal."""

from __future__ import annotations

import argparse
import json
import sys
import time
import warnings
from typing import TYPE_CHECKING

from moesaic.cli.options import (
    add_deferral_argument,
    add_model_arguments,
    add_profile_arguments,
    add_threads_argument,
    plan_of,
    positive_int,
)
from moesaic.cli.terminal import given_text, printable, stream
from moesaic.errors import ConfigError

if TYPE_CHECKING:
    from moesaic.engine.answer import Answer, Sampling
    from moesaic.engine.session import Session

__all__ = ["DESCRIPTION", "HELP", "add_arguments", "rates", "run"]

HELP = "talk to a model"
DESCRIPTION = (
    "Answer PROMPT and print how fast it went; without PROMPT hold a conversation (or answer what comes through a "
    "pipe). The answer goes to standard output, everything else to standard error."
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `moesaic run`."""
    add_model_arguments(parser)
    parser.add_argument("prompt", metavar="PROMPT", nargs="?", help="what to answer; - reads standard input")
    parser.set_defaults(optional_positional="prompt")
    parser.add_argument("--tokenizer", metavar="FOLDER", help="take the tokenizer from this folder (for a GGUF)")
    parser.add_argument("--system", metavar="TEXT", help="system message of the conversation")
    parser.add_argument("--raw", action="store_true", help="continue the text as it is, without the chat template")
    add_threads_argument(parser)
    sampling = parser.add_argument_group("sampling", "what is not given is taken from the model's generation config")
    sampling.add_argument("--max-tokens", type=positive_int, metavar="N", help="stop after N tokens")
    sampling.add_argument("--temperature", type=float, metavar="T", help="0 always takes the likeliest token")
    sampling.add_argument(
        "--top-p", type=float, metavar="P", help="keep the likeliest tokens of this total probability"
    )
    sampling.add_argument("--top-k", type=int, metavar="K", help="keep the K likeliest tokens; 0 keeps all")
    sampling.add_argument("--seed", type=int, metavar="S", help="for the same answer again")
    add_profile_arguments(parser)
    add_deferral_argument(parser)
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of streaming")


def run(arguments: argparse.Namespace) -> int:
    """Load the model and answer."""
    if arguments.raw and arguments.system is not None:
        raise ConfigError("--system needs the chat template, which --raw leaves out: give one of the two.")
    if arguments.system is not None:
        arguments.system = given_text(arguments.system, "--system")
    prompt = _prompt(arguments)
    sampling = _sampling(arguments)  # checked before anything is loaded
    started = time.perf_counter()
    session = _load(arguments)
    load_seconds = time.perf_counter() - started
    code = _converse(session, arguments, prompt, sampling, load_seconds)
    if arguments.save_expert_profile is not None:
        session.model.save_expert_profile(arguments.save_expert_profile)
    return code


def _converse(
    session: Session, arguments: argparse.Namespace, prompt: str | None, sampling: Sampling, load_seconds: float
) -> int:
    """One answer, or a conversation; the exit code."""
    if prompt is None:
        from moesaic.cli.chat import chat

        return chat(session, sampling, system=arguments.system, raw=arguments.raw, title=arguments.model)
    messages = [{"role": "system", "content": arguments.system}] if arguments.system else []
    messages.append({"role": "user", "content": prompt})
    ids = session.encode_raw(prompt) if arguments.raw else session.encode_chat(messages)
    if arguments.json:
        answer = session.answer(ids, sampling)
        report = _report(arguments.model, answer, load_seconds) | {"defer_experts": arguments.defer_experts or 0}
        print(json.dumps(report, ensure_ascii=not _takes_utf8(sys.stdout.encoding)))
    else:
        answer = session.answer(ids, sampling, on_text=stream)
        print(flush=True)
        print(rates(answer), file=sys.stderr)
    return 130 if answer.finish_reason == "interrupted" else 0


def rates(answer: Answer) -> str:
    """One line for people: how many tokens, how fast."""

    def rate(value: float | None) -> str:
        return "" if value is None else f" at {value:.1f} tok/s"

    cached = f" ({answer.cached_tokens} more cached)" if answer.cached_tokens else ""
    ending = {"stop": "", "length": ", length limit reached", "interrupted": ", interrupted"}[answer.finish_reason]
    return (
        f"[prefill {answer.prompt_tokens - answer.cached_tokens} tokens{rate(answer.prefill_rate)}{cached}, "
        f"decode {answer.generated_tokens} tokens{rate(answer.decode_rate)}{ending}]"
    )


def _prompt(arguments: argparse.Namespace) -> str | None:
    """The prompt, or None for a conversation."""
    if arguments.prompt == "-" or (arguments.prompt is None and not sys.stdin.isatty()):
        return given_text(_read_input(), "standard input").removesuffix("\n")
    return None if arguments.prompt is None else given_text(arguments.prompt, "PROMPT")


def _read_input() -> str:
    try:
        return sys.stdin.read()
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"standard input is not {error.encoding} text ({error.reason} at position {error.start}): convert it, for "
            "example with iconv, or set a locale with its encoding."
        ) from None


def _takes_utf8(encoding: str | None) -> bool:
    return (encoding or "").lower().replace("-", "").replace("_", "") == "utf8"


def _sampling(arguments: argparse.Namespace) -> Sampling:
    from moesaic.engine.answer import Sampling

    return Sampling(arguments.max_tokens, arguments.temperature, arguments.top_p, arguments.top_k, arguments.seed)


def _load(arguments: argparse.Namespace) -> Session:
    """Load model and tokenizer; progress and notes go to standard error."""
    from moesaic.engine.auto import AutoTokenizer
    from moesaic.engine.expert_profile import check_profile_target, check_profile_use
    from moesaic.engine.loader import load, prepare
    from moesaic.engine.session import Session
    from moesaic.kernels import set_num_threads
    from moesaic.placement import DEFAULT_CONTEXT

    if arguments.threads is not None:
        set_num_threads(arguments.threads)

    with warnings.catch_warnings(record=True) as notes:  # says when a tokenizer may be inexact
        warnings.simplefilter("always", UserWarning)
        tokenizer = AutoTokenizer.from_pretrained(
            arguments.model, gguf=arguments.gguf, tokenizer=arguments.tokenizer, offline=arguments.offline
        )
    for note in notes:
        print(f"note: {printable(str(note.message))}", file=sys.stderr)
    prepared = prepare(
        arguments.model,
        gguf=arguments.gguf,
        plan=plan_of(arguments),
        vram=arguments.vram,
        context=arguments.context or DEFAULT_CONTEXT,
        offline=arguments.offline,
    )
    if arguments.save_expert_profile is not None:
        check_profile_use(prepared.plan, "--save-expert-profile")
        check_profile_target(arguments.save_expert_profile, "--save-expert-profile")
    model = load(
        prepared,
        progress=sys.stderr.isatty(),
        expert_profile=arguments.expert_profile,
        defer_experts=arguments.defer_experts or 0,
    )
    how = str(getattr(model, "_moesaic_note", ""))
    if how:
        print(f"note: {printable(how)}", file=sys.stderr)
    return Session(model, tokenizer)


def _report(model: str, answer: Answer, load_seconds: float) -> dict[str, object]:
    return {
        "model": model,
        "text": answer.text,
        "finish_reason": answer.finish_reason,
        "prompt_tokens": answer.prompt_tokens,
        "generated_tokens": answer.generated_tokens,
        "prefill_tokens_per_second": answer.prefill_rate,
        "decode_tokens_per_second": answer.decode_rate,
        "load_seconds": load_seconds,
        "seed": answer.seed,
    }
