"""Compiling beside an event loop: the deadline holds, others go on, nothing is left behind."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator

import pytest
from tests.engine.serving.tokenizers_for_tests import tiny_tokenizer

from moesaic.engine.serving.grammar import CompiledGrammar, GrammarVocabulary
from moesaic.engine.serving.grammar_compiler import GrammarCompiler
from moesaic.engine.serving.params import Grammar
from moesaic.errors import OverloadedError, RequestError

# llguidance works on this for longer than anybody has waited.
HANGS = Grammar("json_schema", '{"type": "integer", "multipleOf": 123456789}')


@pytest.fixture(scope="module")
def vocabulary() -> GrammarVocabulary:
    return GrammarVocabulary(tiny_tokenizer(), 259)


@pytest.fixture
def compiler(vocabulary: GrammarVocabulary) -> Iterator[GrammarCompiler]:
    compiler = GrammarCompiler(vocabulary, deadline=20.0, workers=1, kept=2)
    yield compiler
    compiler.close()


def processes(compiler: GrammarCompiler) -> list[int | None]:
    """How the trial processes ended; None for those that run."""
    return [trial._process.poll() for trial in compiler._trials if trial._process is not None]


def test_grammars_are_kept_while_they_are_used(compiler: GrammarCompiler) -> None:
    grammars = [Grammar("regex", text) for text in ("a", "b", "c")]

    async def run() -> None:
        first, second = await compiler.compile(grammars[0]), await compiler.compile(grammars[1])
        assert await compiler.compile(grammars[0]) is first
        await compiler.compile(grammars[2])  # the second is the one that was used longest ago
        assert await compiler.compile(grammars[0]) is first
        assert await compiler.compile(grammars[1]) is not second

    asyncio.run(run())
    assert processes(compiler) == [None]
    compiler.close()
    assert processes(compiler) == []


def test_warm(vocabulary: GrammarVocabulary) -> None:
    compiler = GrammarCompiler(vocabulary, workers=2)
    compiler.warm()
    end = time.monotonic() + 60
    while processes(compiler) != [None, None] and time.monotonic() < end:
        time.sleep(0.02)
    assert processes(compiler) == [None, None]
    compiler.close()


def test_reasons_come_back(compiler: GrammarCompiler) -> None:
    for kind, text, reason in (("regex", "(", "unclosed group"), ("lark", "start: x", "unknown name")):
        with pytest.raises(RequestError, match=reason) as caught:
            asyncio.run(compiler.compile(Grammar(kind, text)))  # type: ignore[arg-type]
        assert caught.value.param == "response_format"
    assert processes(compiler) == [None]


def test_the_deadline_of_a_grammar_that_is_never_ready(vocabulary: GrammarVocabulary) -> None:
    compiler = GrammarCompiler(vocabulary, deadline=1.5, workers=1, waiting=1)

    async def run() -> tuple[list[object], int, float]:
        ticks, begin = 0, time.monotonic()
        asked = [HANGS, Grammar("regex", "a"), Grammar("regex", "b")]
        tasks = asyncio.gather(*(compiler.compile(grammar) for grammar in asked), return_exceptions=True)
        while not tasks.done():
            await asyncio.sleep(0.02)
            ticks += 1
        return await tasks, ticks, time.monotonic() - begin

    (hangs, waits, full), ticks, seconds = asyncio.run(run())
    assert isinstance(hangs, RequestError)
    assert "needs more than 1.5 seconds" in str(hangs)
    assert hangs.param == "response_format"
    assert isinstance(waits, OverloadedError)  # nothing is wrong with it: its turn did not come
    assert isinstance(full, OverloadedError)
    assert ticks > 10  # the event loop went on
    assert seconds < 4
    assert all(code is not None for code in processes(compiler))
    for _ in range(5):  # it starts again; on a busy machine not within the deadline
        try:
            compiled = asyncio.run(compiler.compile(Grammar("regex", "a")))
            break
        except (RequestError, OverloadedError):
            continue
    assert isinstance(compiled, CompiledGrammar)
    compiler.close()


def test_closing_ends_what_runs(vocabulary: GrammarVocabulary) -> None:
    compiler = GrammarCompiler(vocabulary, deadline=60.0, workers=1)

    async def run() -> object:
        task = asyncio.ensure_future(compiler.compile(HANGS))
        while not processes(compiler):
            await asyncio.sleep(0.02)
        await asyncio.sleep(0.3)
        compiler.close()
        return await asyncio.gather(task, return_exceptions=True)

    begin = time.monotonic()
    [result] = asyncio.run(run())
    assert isinstance(result, RequestError)
    assert time.monotonic() - begin < 30
    assert processes(compiler) == []
    with pytest.raises(OverloadedError, match="closing"):
        asyncio.run(compiler.compile(Grammar("regex", "a")))


def test_a_request_that_is_gone_does_not_disturb(compiler: GrammarCompiler) -> None:
    async def run() -> CompiledGrammar:
        task = asyncio.ensure_future(compiler.compile(Grammar("regex", "gone")))
        await asyncio.sleep(0.01)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        return await compiler.compile(Grammar("regex", "here"))

    assert asyncio.run(run()).grammar.text == "here"
    assert compiler._pending == 0
