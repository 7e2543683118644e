"""Compiling grammars beside an event loop, with a deadline that also holds for those that would never be compiled.

Each worker has a process in which a grammar is tried first (grammar_trial.py); only what went well there in time is
compiled in this one. So a hostile grammar costs its own request the deadline, and nobody else anything that lasts.
"""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
import threading
import time
from collections import OrderedDict
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import moesaic
from moesaic.engine.serving.grammar import CompiledGrammar, GrammarVocabulary, compile_grammar
from moesaic.engine.serving.grammar_checks import PARAM, check_grammar
from moesaic.engine.serving.grammar_trial import TokenizerSource
from moesaic.engine.serving.params import Grammar
from moesaic.errors import OverloadedError, RequestError

__all__ = ["GrammarCompiler"]

_WARM_SECONDS = 120.0
_MARGIN = 1.0
"""Seconds after the deadline in which a worker may still say why it was missed."""


class GrammarCompiler:
    """Compiles grammars of requests, and keeps those that were used last.

    Args:
        vocabulary: of the model.
        deadline: seconds for one grammar, waiting for a worker included.
        workers: grammars that are compiled at once.
        waiting: grammars that may wait for a worker.
        kept: grammars that are kept compiled.
    """

    def __init__(
        self,
        vocabulary: GrammarVocabulary,
        *,
        deadline: float = 10.0,
        workers: int = 2,
        waiting: int = 32,
        kept: int = 64,
    ) -> None:
        self._vocabulary, self._deadline = vocabulary, deadline
        self._most, self._kept = workers + waiting, kept
        self._pool = ThreadPoolExecutor(workers, thread_name_prefix="grammar")
        self._trials = [_Trial(vocabulary.source) for _ in range(workers)]
        self._lock = threading.Lock()  # over the four below
        self._idle = list(self._trials)
        self._compiled: OrderedDict[Grammar, CompiledGrammar] = OrderedDict()
        self._pending = 0
        self._closed = False

    def warm(self) -> None:
        """Start what the first grammars would wait for, some seconds with a large vocabulary; returns at once."""
        for _ in self._trials:
            self._pool.submit(self._warm)

    async def compile(self, grammar: Grammar) -> CompiledGrammar:
        """A grammar, compiled off the event loop.

        Raises:
            RequestError: it is wrong, too large, nothing fits it, or it takes too long.
            OverloadedError: too many grammars wait.
            TokenizerError: the tokenizer takes no grammars.
        """
        check_grammar(grammar)
        found = self._find(grammar)
        if found is not None:
            return found
        with self._lock:
            if self._pending >= self._most:
                raise self._busy()
            self._pending += 1
        end = time.monotonic() + self._deadline
        try:
            future = self._pool.submit(self._work, grammar, end)
        except RuntimeError:
            self._done(None)
            raise OverloadedError("the engine is closing.", self._deadline) from None
        future.add_done_callback(self._done)
        try:
            return await asyncio.wait_for(asyncio.wrap_future(future), self._deadline + _MARGIN)
        except TimeoutError:
            raise (self._busy() if future.cancelled() else _too_late(self._deadline)) from None

    def close(self) -> None:
        """End workers and their processes; what they do is lost."""
        with self._lock:
            self._closed = True
            idle = [self._idle.pop() for _ in range(len(self._idle))]
        self._pool.shutdown(wait=False, cancel_futures=True)
        for trial in self._trials:
            trial.kill()
        for trial in idle:
            trial.close()  # the others are closed by their workers

    def _find(self, grammar: Grammar) -> CompiledGrammar | None:
        with self._lock:
            found = self._compiled.get(grammar)
            if found is not None:
                self._compiled.move_to_end(grammar)
            return found

    def _busy(self) -> OverloadedError:
        return OverloadedError("too many grammars wait to be compiled.", self._deadline)

    def _done(self, future: Future[CompiledGrammar] | None) -> None:
        with self._lock:
            self._pending -= 1

    def _warm(self) -> None:
        """In a worker: start its process, and make the tokenizer of this one."""
        with self._trial() as trial:
            trial.is_ready(time.monotonic() + _WARM_SECONDS)
        self._vocabulary.tokenizer()

    @contextmanager
    def _trial(self) -> Iterator[_Trial]:
        """One that nobody uses; there is one for each worker."""
        with self._lock:
            if self._closed:
                raise OverloadedError("the engine is closing.", self._deadline)
            trial = self._idle.pop(0)
        try:
            yield trial
        finally:
            with self._lock:
                if self._closed:
                    trial.close()
                else:
                    self._idle.append(trial)

    def _work(self, grammar: Grammar, end: float) -> CompiledGrammar:
        """In a worker: try, then compile."""
        found = self._find(grammar)  # somebody else's, in the meantime
        if found is not None:
            return found
        if time.monotonic() >= end:
            raise self._busy()
        with self._trial() as trial:
            if not trial.run(grammar, end):
                raise _too_late(self._deadline)
        compiled = compile_grammar(grammar, self._vocabulary)
        with self._lock:
            self._compiled[grammar] = compiled
            while len(self._compiled) > self._kept:
                self._compiled.popitem(last=False)
        return compiled


class _Trial:
    """A process that tries grammars; it is started when it is needed, and again after it was ended."""

    def __init__(self, source: TokenizerSource) -> None:
        self._source = source
        self._process: subprocess.Popen[str] | None = None

    def is_ready(self, end: float) -> bool:
        """Whether the process runs and has read the tokenizer; it is started if need be, and ended at `end`."""
        if self._process is not None and self._process.poll() is None:
            return True
        self.close()
        self._process = self._start()
        if self._ask(self._source.to_json(), end) is None:
            self.close()
            return False
        return True

    def run(self, grammar: Grammar, end: float) -> bool:
        """Whether the grammar was compiled before `end`, by the monotonic clock.

        Raises:
            RequestError: it was refused.
        """
        if not self.is_ready(end):
            return False
        asked = {"kind": grammar.kind, "text": grammar.text, "seconds": max(end - time.monotonic(), 1e-3)}
        answer = self._ask(json.dumps(asked), end)
        if answer is None:
            self.close()
            return False
        error = json.loads(answer)["error"]
        if error is not None:
            raise RequestError(error, PARAM)
        return True

    def kill(self) -> None:
        """End the process from another thread; whoever uses it finds it ended."""
        process = self._process
        if process is not None:
            process.kill()

    def close(self) -> None:
        """End the process."""
        process, self._process = self._process, None
        if process is not None:
            process.kill()
            process.communicate()

    @staticmethod
    def _start() -> subprocess.Popen[str]:
        root = str(Path(moesaic.__file__).parent.parent)
        path = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))
        return subprocess.Popen(
            [sys.executable, "-P", "-m", "moesaic.engine.serving.grammar_trial"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            encoding="utf-8",
            env=os.environ | {"PYTHONPATH": path},
        )

    def _ask(self, line: str, end: float) -> str | None:
        """Send a line and wait for one; None if the process ended, which it does at `end` at the latest."""
        process = self._process
        if process is None or process.stdin is None or process.stdout is None:
            return None
        timer = threading.Timer(max(end - time.monotonic(), 0), process.kill)
        timer.daemon = True
        timer.start()
        try:
            process.stdin.write(line + "\n")
            process.stdin.flush()
            return process.stdout.readline() or None
        except OSError:  # it has ended
            return None
        finally:
            timer.cancel()


def _too_late(seconds: float) -> RequestError:
    return RequestError(
        f"the grammar needs more than {seconds:g} seconds or too much memory: it is too complex.", PARAM
    )
