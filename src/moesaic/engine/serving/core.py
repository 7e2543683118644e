"""The engine: one step after the other, each a token for everybody who decodes and some layers for new prompts.

It joins scheduler, runner, sampler and text. It runs in the thread of who calls `step`, and knows neither event loops
nor how a model was loaded. A request that fails takes nobody with it: what failed is tried once more, then it ends.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch

from moesaic.engine.serving.answer import Answer
from moesaic.engine.serving.defaults import GenerationDefaults
from moesaic.engine.serving.facts import ModelFacts
from moesaic.engine.serving.intake import Intake
from moesaic.engine.serving.interface import EngineStats
from moesaic.engine.serving.outputs import Chunk, FinishReason, TokenLogprob
from moesaic.engine.serving.pace import Pace
from moesaic.engine.serving.params import SamplingParams
from moesaic.engine.serving.runner import StepRunner
from moesaic.engine.serving.sampler import sample
from moesaic.engine.serving.scheduler import Filling, Scheduler, Step, Task
from moesaic.engine.torch_threads import one_torch_thread
from moesaic.errors import MoesaicError
from moesaic.kvcache.prefix_cache import PrefixCache

if TYPE_CHECKING:
    from moesaic.engine.serving.grammar import GrammarVocabulary

__all__ = ["Engine", "EngineOptions"]

_LOG = logging.getLogger("moesaic.serving")
_LENT_SECONDS = 120.0
"""That contents stay in memory that was lent for them, when nobody uses them."""


@dataclass(frozen=True, slots=True)
class EngineOptions:
    """How an engine shares itself out.

    Attributes:
        max_running: most answers at once.
        prefix_cache: whether blocks are kept for their contents.
        slowdown: a step with prefill takes at most about so many times a step without.
    """

    max_running: int = 64
    prefix_cache: bool = True
    slowdown: float = 2.0


class Engine:
    """Answers requests with one runner.

    Args:
        runner: who computes; closed with the engine.
        tokenizer: of the model library; None: tokens without text.
        defaults: what holds where a request says nothing.
        context_length: most tokens of prompt and answer; what fits into the cache, if that is less.
        options: how it shares itself out.
        facts: of the model, for people.
        one_torch_thread: keep torch's threads off the kernels' cores, while it is `running`.
        clock: seconds from any start.

    Attributes:
        runner, tokenizer, defaults, context_length, facts: as given.
    """

    def __init__(
        self,
        runner: StepRunner,
        tokenizer: Any,
        defaults: GenerationDefaults | None = None,
        context_length: int | None = None,
        options: EngineOptions | None = None,
        *,
        facts: ModelFacts | None = None,
        one_torch_thread: bool = False,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        options = options or EngineOptions()
        self.runner, self.tokenizer, self.defaults = runner, tokenizer, defaults or GenerationDefaults()
        self.facts, self._one_torch_thread = facts, one_torch_thread
        room = runner.pool.num_blocks * runner.pool.block_size
        self.context_length = room if context_length is None else min(context_length, room)
        self._clock = clock
        self._cache = PrefixCache(runner.pool, clock) if options.prefix_cache and runner.shares_prefixes else None
        self._pace = Pace(runner.num_layers, runner.max_chunk, options.slowdown)
        self._scheduler = Scheduler(runner, options.max_running, self._pace, self._cache)
        self._answers: dict[str, list[Answer]] = {}
        self._out: list[tuple[str, Chunk]] = []
        self._finished: Counter[str] = Counter()
        self._prompt_tokens = self._cached_tokens = self._generated_tokens = 0
        self._intake = Intake(tokenizer, self.defaults, runner.vocab_size, self.context_length)
        self._last_step = clock()
        self._prepares = True

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """Around calls of `step`, in the same thread."""
        with one_torch_thread() if self._one_torch_thread else contextlib.nullcontext():
            yield

    @property
    def has_work(self) -> bool:
        """Whether a step would do anything."""
        return bool(self._answers or self._out)

    @property
    def num_waiting(self) -> int:
        """Answers that wait for their first step; may be read from any thread."""
        return self._scheduler.num_waiting

    def grammar_vocabulary(self) -> GrammarVocabulary:
        """As `Intake.grammar_vocabulary`."""
        return self._intake.grammar_vocabulary()

    def check(self, prompt_ids: Sequence[int], params: SamplingParams) -> None:
        """As `Intake.check`; may be called from any thread."""
        self._intake.check(prompt_ids, params)

    def add(
        self, request_id: str, prompt_ids: Sequence[int], params: SamplingParams, matchers: Sequence[Any] = ()
    ) -> None:
        """Take a request; its answers begin with one of the next steps.

        Args:
            request_id: that its pieces come back with; unique among the running ones.
            prompt_ids: tokens of the prompt.
            params: how it is answered.
            matchers: one of `CompiledGrammar.matcher` for each answer, if there is a grammar.

        Raises:
            RequestError: see `check`.
        """
        self.check(prompt_ids, params)
        answers = self._intake.answers(request_id, prompt_ids, params, matchers, self._clock())
        self._answers[request_id] = answers
        self._prompt_tokens += len(prompt_ids) * params.n
        self._scheduler.add(answers)

    def cancel(self, request_id: str) -> None:
        """End a request; its slot and its blocks are free at once. Nothing happens if it has ended."""
        for answer in list(self._answers.get(request_id, ())):
            self._end(answer, "cancelled")

    def step(self) -> list[tuple[str, Chunk]]:
        """Compute, and return what is new of each request."""
        if self._cache is not None and self.runner.pool.num_backed > self.runner.pool.num_own:
            self._cache.forget_lent(_LENT_SECONDS)
        step = self._scheduler.next()
        for refused in step.refused:
            _LOG.error("request %s does not fit into the cache although nothing else runs", _owner(refused).request_id)
            self._end(_owner(refused), "error")
        if step.decode:
            self._decode([_owner(task) for task in step.decode], step.chunk is None)
        self.runner.on_launch()  # if no step of decode was launched
        if step.chunk is not None:
            self._fill_in(step, step.chunk)
        self._last_step = self._clock()
        out, self._out = self._out, []
        return out

    def prepare(self) -> bool:
        """Without work: do a piece of what later steps would have to do first. Whether there was one."""
        if not self._prepares:
            return False
        try:
            return self.runner.prepare(self._scheduler.max_running)
        except Exception:  # who needs it will see
            _LOG.exception("what later steps need cannot be prepared")
            self._prepares = False
            return False

    def stats(self) -> EngineStats:
        """What it does now, and has done; not for other threads than the one that steps."""
        pool = self.runner.pool
        hits, lookups = self.runner.expert_uses()
        return EngineStats(
            running=len(self._scheduler.running),
            waiting=self.num_waiting,
            blocks=pool.num_blocks,
            blocks_free=pool.num_free,
            blocks_cached=0 if self._cache is None else self._cache.num_idle,
            prompt_tokens=self._prompt_tokens,
            cached_tokens=self._cached_tokens,
            generated_tokens=self._generated_tokens,
            preemptions=self._scheduler.preemptions,
            finished=tuple(sorted(self._finished.items())),
            expert_hits=hits,
            expert_lookups=lookups,
            last_step=self._clock() - self._last_step if self._answers else 0.0,
        )

    def close(self) -> None:
        """Cancel everything and give memory back."""
        for request_id in list(self._answers):
            self.cancel(request_id)
        if self._cache is not None:
            self._cache.clear()
        self.runner.close()

    def _decode(self, answers: list[Answer], alone: bool) -> None:
        before = self._clock()
        self._start(answers, before)
        # Where nobody wants more than the likeliest token, logits need not leave the device that made them.
        greedy = all(each.limit and each.sampler.takes_likeliest for each in answers)
        step: Callable[..., Any] = self.runner.decode_likeliest if greedy else self.runner.decode
        try:
            found = step([_sequence(each) for each in answers], [each.ids[-1] for each in answers])
        except MoesaicError as error:
            self._failed(answers, error)
            return
        self._pace.decoded(self._clock() - before, len(answers), alone)
        (self._take_all if greedy else self._choose)(answers, found)

    def _fill_in(self, step: Step, chunk: Filling) -> None:
        before, answers = self._clock(), [_owner(task) for task, _ in chunk.parts]
        self._start(answers, before)
        try:
            if chunk.work is None:
                parts = [(_sequence(task), _next_tokens(task, count)) for task, count in chunk.parts]
                chunk.work = self.runner.start_prefill(parts)
            num_layers = min(step.num_layers, chunk.work.num_layers_left)
            chunk.work.advance(num_layers)
            # The last layer says little of others: most tokens only leave their keys and values there.
            short = not chunk.work.num_layers_left and self.runner.num_layers > 1
            if counted := num_layers - short:
                self._pace.advanced(chunk.num_tokens, counted, self._clock() - before)
            if chunk.work.num_layers_left:
                return
            logits = chunk.work.logits()
        except MoesaicError as error:
            self._scheduler.drop_chunk()
            self._failed(answers, error)
            return
        self._scheduler.filled()
        rows = [row for row, answer in enumerate(answers) if answer.missing == 0]
        if rows:
            self._choose([answers[row] for row in rows], logits if len(rows) == len(answers) else logits[rows])

    def _start(self, answers: list[Answer], now: float) -> None:
        """Remember when answers begin."""
        new = [answer for answer in answers if not answer.has_begun]
        uses = self.runner.expert_uses() if new else (0, 0)
        for answer in new:
            answer.begin(now, uses)
            self._cached_tokens += answer.stats.cached_tokens

    def _choose(self, answers: list[Answer], logits: torch.Tensor) -> None:
        """The next token of each answer, from float32 `[answers, vocab_size]`."""
        if any(answer.limit == 0 for answer in answers):
            kept = [row for row, answer in enumerate(answers) if answer.limit]
            for answer in [each for each in answers if each.limit == 0]:
                self._end(answer, "length")
            answers, logits = [answers[row] for row in kept], logits[kept]
        try:
            tokens, logprobs = sample(logits, [answer.sampler for answer in answers])
        except Exception:
            if len(answers) > 1:  # one of them failed; which one shows when each is asked alone
                for row, answer in enumerate(answers):
                    self._choose([answer], logits[row : row + 1])
                return
            _LOG.exception("request %s: no token can be chosen", answers[0].request_id)
            self._end(answers[0], "error")
            return
        now = self._clock()
        for answer, token, logprob in zip(answers, tokens, logprobs, strict=True):
            self._take(answer, token, logprob, now)

    def _take_all(self, answers: list[Answer], tokens: list[int]) -> None:
        """The likeliest token of each answer; -1: its logits are no numbers."""
        now = self._clock()
        for answer, token in zip(answers, tokens, strict=True):
            if token < 0:
                _LOG.error("request %s: the model's logits are no numbers", answer.request_id)
                self._end(answer, "error")
            else:
                self._take(answer, token, None, now)

    def _take(self, answer: Answer, token: int, logprob: TokenLogprob | None, now: float) -> None:
        try:
            chunk = answer.take(token, logprob, now)
        except Exception:
            _LOG.exception("request %s: token %d cannot be taken", answer.request_id, token)
            self._end(answer, "error")
            return
        self._generated_tokens += 1
        if chunk.finish_reason is None:
            self._out.append((answer.request_id, chunk))
        else:
            self._close(answer, chunk)

    def _end(self, answer: Answer, reason: FinishReason) -> None:
        """End an answer without another token."""
        self._close(answer, answer.end(reason))

    def _close(self, answer: Answer, chunk: Chunk) -> None:
        """An answer's last piece; what it holds is free."""
        self._scheduler.remove(answer)
        others = self._answers[answer.request_id]
        others.remove(answer)
        if not others:
            del self._answers[answer.request_id]
        assert chunk.finish_reason is not None
        self._finished[chunk.finish_reason] += 1
        stats = answer.close(self._clock(), self.runner.expert_uses())
        self._out.append((answer.request_id, replace(chunk, stats=stats)))

    def _failed(self, answers: list[Answer], error: MoesaicError) -> None:
        """A step of these answers is lost: it is tried once more."""
        _LOG.error("a step of %d answers failed: %s", len(answers), error)
        for answer in answers:
            answer.failures += 1
            if answer.failures > 1:
                self._end(answer, "error")


def _owner(task: Task) -> Answer:
    assert isinstance(task, Answer)
    return task


def _sequence(task: Task) -> Any:
    assert task.sequence is not None, "a task that runs has a sequence"
    return task.sequence


def _next_tokens(task: Task, count: int) -> torch.Tensor:
    return torch.tensor(task.ids[task.computed : task.computed + count], dtype=torch.int64)
