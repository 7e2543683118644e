"""Compiling a grammar, and a process in which it is tried first.

A grammar comes from anybody, and llguidance has inputs that it works on for hours (`multipleOf` a large number).
A thread cannot be stopped, but a process can: `python -m moesaic.engine.serving.grammar_trial` compiles what it reads,
takes some steps, and answers whether all went well; whoever started it ends it when its time is over, and it ends
itself where the system can. It knows neither torch nor transformers, so that it starts in a moment.

It reads lines of JSON: first what `TokenizerSource` holds, then grammars with `kind`, `text` and `seconds`; it
answers each, the first one too, with `{"error": null}` or the reason.
"""

from __future__ import annotations

import json
import signal
import sys
from dataclasses import asdict, dataclass
from itertools import chain
from random import Random
from typing import Any

import llguidance

from moesaic.engine.serving.grammar_checks import PARAM, check_grammar
from moesaic.engine.serving.params import Grammar
from moesaic.errors import RequestError

__all__ = ["TokenizerSource", "build_matcher"]

_TRIAL_STEPS = 24
_MAX_MEMORY = 4 << 30


@dataclass(frozen=True, slots=True)
class TokenizerSource:
    """What llguidance needs to know of a tokenizer.

    Attributes:
        description: as in tokenizer.json.
        vocab_size: of the logits, or more.
        eos_ids: tokens that end an answer, at least one.
    """

    description: str
    vocab_size: int
    eos_ids: list[int]

    def make(self) -> llguidance.LLTokenizer:
        """The tokenizer of llguidance; takes about a second for large vocabularies."""
        return llguidance.LLTokenizer(self.description, n_vocab=self.vocab_size, eos_token=self.eos_ids)

    def to_json(self) -> str:
        """One line."""
        return json.dumps(asdict(self))


def build_matcher(grammar: Grammar, tokenizer: llguidance.LLTokenizer) -> llguidance.LLMatcher:
    """A matcher at the beginning of a grammar, after some steps with a copy of it went well.

    Raises:
        RequestError: the grammar is wrong, too large, or nothing fits it.
    """
    check_grammar(grammar)
    try:
        limits = llguidance.LLParserLimits(verbose_errors=False)
        matcher = llguidance.LLMatcher(tokenizer, _text(grammar), limits=limits, log_level=0)
        _check(matcher, grammar)
        _walk(matcher.deep_copy(), grammar)
    except ValueError as error:
        raise _refusal(grammar, str(error)) from error
    return matcher


def _text(grammar: Grammar) -> str:
    """The grammar in llguidance's own form."""
    if grammar.kind == "regex":
        return llguidance.LLMatcher.grammar_from_regex(grammar.text)
    if grammar.kind == "lark":
        return llguidance.LLMatcher.grammar_from_lark(grammar.text)
    schema = '{"type": "object"}' if grammar.kind == "json_object" else grammar.text
    if schema.strip() in ("true", "false"):
        schema = f'{{"allOf": [{schema}]}}'  # options go into an object
    return llguidance.LLMatcher.grammar_from_json_schema(
        schema,
        # Room for any indentation, but not for a model that has nothing to say and goes on with blanks for ever.
        defaults={"whitespace_pattern": r"[\x20\x0A\x0D\x09]{1,80}"},
        # It would leave out what is not implemented, and the text would not be what was asked for.
        overrides={"lenient": False},
    )


def _walk(matcher: llguidance.LLMatcher, grammar: Grammar) -> None:
    """Some tokens at random: errors and long computations often come only with the first ones."""
    random = Random(0)
    for _ in range(_TRIAL_STEPS):
        if matcher.is_stopped():
            break
        mask = matcher.compute_bitmask()
        _check(matcher, grammar)
        token = _any_token(mask, random)
        if token is None:
            raise _refusal(grammar, "no text fits it")
        matcher.consume_token(token)
        _check(matcher, grammar)


def _any_token(mask: bytes, random: Random) -> int | None:
    """The first token whose bit is set, from a random place on."""
    start = random.randrange(len(mask))
    for byte in chain(range(start, len(mask)), range(start)):
        if mask[byte]:
            return 8 * byte + random.choice([bit for bit in range(8) if mask[byte] >> bit & 1])
    return None


def _check(matcher: llguidance.LLMatcher, grammar: Grammar) -> None:
    if matcher.is_error():
        raise _refusal(grammar, matcher.get_error())


def _refusal(grammar: Grammar, reason: str) -> RequestError:
    reason = " ".join(reason.replace("<non-verbose/>", "").split())
    return RequestError(f"the {grammar.kind} cannot be used: {reason[:300]}", PARAM)


def main() -> None:
    """Try the grammars that come, until the input ends."""
    _limit_memory()
    tokenizer = TokenizerSource(**json.loads(sys.stdin.readline())).make()
    _answer(None)
    for line in sys.stdin:
        asked: dict[str, Any] = json.loads(line)
        if hasattr(signal, "SIGALRM"):
            signal.setitimer(signal.ITIMER_REAL, asked["seconds"])  # ends the process, in the middle of anything
        try:
            build_matcher(Grammar(asked["kind"], asked["text"]), tokenizer)
        except RequestError as error:
            _answer(str(error))
        else:
            _answer(None)
        if hasattr(signal, "SIGALRM"):
            signal.setitimer(signal.ITIMER_REAL, 0)


def _answer(error: str | None) -> None:
    print(json.dumps({"error": error}), flush=True)


def _limit_memory() -> None:
    try:
        import resource
    except ImportError:  # not on Windows
        return
    resource.setrlimit(resource.RLIMIT_AS, (_MAX_MEMORY, _MAX_MEMORY))


if __name__ == "__main__":
    main()
