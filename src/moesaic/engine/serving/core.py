"""The engine: one step after the other, each a token for everybody who decodes and some layers for new prompts.

It joins scheduler, runner, sampler and text. It runs in the thread of who calls `step`, and knows neither event loops
nor how a model was loaded. A request that fails takes nobody with it: what failed is tried once more, then it ends.
"""

from __future__ import annotations

import logging
import secrets
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from moesaic.engine.serving.defaults import GenerationDefaults
from moesaic.engine.serving.greedy import Detokenizer, RequestSampler, sample
from moesaic.engine.serving.interface import EngineStats
from moesaic.engine.serving.outputs import Chunk, FinishReason, RequestStats, TokenLogprob
from moesaic.engine.serving.pace import Pace
from moesaic.engine.serving.params import SamplingParams
from moesaic.engine.serving.runner import StepRunner
from moesaic.engine.serving.scheduler import Filling, Scheduler, Step, Task
from moesaic.errors import MoesaicError, RequestError
from moesaic.kvcache.prefix_cache import PrefixCache

__all__ = ["Engine", "EngineOptions"]

_LOG = logging.getLogger("moesaic.serving")
_PROMPT_TAIL = 8
"""Last tokens of a prompt, whose text the first of the answer may depend on."""


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


@dataclass(slots=True, eq=False, kw_only=True)
class _Answer(Task):
    """A task with all that makes text of its tokens."""

    request_id: str
    index: int
    params: SamplingParams
    sampler: Any
    text: Any
    stop_ids: frozenset[int]
    limit: int
    stats: RequestStats
    added: float
    started: float | None = None
    first: float | None = None
    uses: tuple[int, int] = (0, 0)
    failures: int = 0


class Engine:
    """Answers requests with one runner.

    Args:
        runner: who computes; closed with the engine.
        tokenizer: of the model library; None: tokens without text.
        defaults: what holds where a request says nothing.
        context_length: most tokens of prompt and answer; what fits into the cache, if that is less.
        options: how it shares itself out.
        clock: seconds from any start.

    Attributes:
        runner, tokenizer, defaults, context_length: as given.
    """

    def __init__(
        self,
        runner: StepRunner,
        tokenizer: Any,
        defaults: GenerationDefaults | None = None,
        context_length: int | None = None,
        options: EngineOptions | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        options = options or EngineOptions()
        self.runner, self.tokenizer, self.defaults = runner, tokenizer, defaults or GenerationDefaults()
        room = runner.pool.num_blocks * runner.pool.block_size
        self.context_length = room if context_length is None else min(context_length, room)
        self._clock = clock
        self._cache = PrefixCache(runner.pool) if options.prefix_cache and runner.shares_prefixes else None
        self._pace = Pace(runner.num_layers, runner.max_chunk, options.slowdown)
        self._scheduler = Scheduler(runner, options.max_running, self._pace, self._cache)
        self._answers: dict[str, list[_Answer]] = {}
        self._out: list[tuple[str, Chunk]] = []
        self._finished: Counter[str] = Counter()
        self._prompt_tokens = self._cached_tokens = self._generated_tokens = 0
        self._last_step = clock()

    @property
    def has_work(self) -> bool:
        """Whether a step would do anything."""
        return bool(self._answers or self._out)

    @property
    def num_waiting(self) -> int:
        """Answers that wait for their first step; may be read from any thread."""
        return len(self._scheduler.waiting)

    def check(self, prompt_ids: Sequence[int], params: SamplingParams) -> None:
        """Refuse what cannot be answered; may be called from any thread.

        Raises:
            RequestError: the prompt is empty or too long, or something names a token that the model does not have.
        """
        if not prompt_ids:
            raise RequestError("the prompt is empty: nothing to continue.", "prompt")
        least = 0 if params.max_tokens == 0 else 1
        if len(prompt_ids) + least > self.context_length:
            raise RequestError(
                f"the prompt has {len(prompt_ids)} tokens, but the context is {self.context_length} for prompt and "
                "answer together: shorten it.",
                "prompt",
            )
        vocab_size = self.runner.vocab_size
        for name, ids in (
            ("prompt", prompt_ids),
            ("stop_token_ids", params.stop_token_ids),
            ("logit_bias", params.logit_bias),
        ):
            if ids and not (min(ids) >= 0 and max(ids) < vocab_size):
                wrong = min(ids) if min(ids) < 0 else max(ids)
                raise RequestError(f"{name} has token {wrong}: expected 0 to {vocab_size - 1}.", name)

    def add(
        self, request_id: str, prompt_ids: Sequence[int], params: SamplingParams, matchers: Sequence[Any] = ()
    ) -> None:
        """Take a request; its answers begin with one of the next steps.

        Args:
            request_id: that its pieces come back with; unique among the running ones.
            prompt_ids: tokens of the prompt.
            params: how it is answered.
            matchers: one of `grammar.compile_grammar` per answer, if there is a grammar.

        Raises:
            RequestError: see `check`.
        """
        self.check(prompt_ids, params)
        ids, now = list(prompt_ids), self._clock()
        room = self.context_length - len(ids)
        limit = room if params.max_tokens is None else min(params.max_tokens, room)
        seed = secrets.randbits(31) if params.seed is None else params.seed
        stop_ids = frozenset(params.stop_token_ids) | (frozenset() if params.ignore_eos else self.defaults.stop_ids)
        answers = []
        for index in range(params.n):
            matcher = matchers[index] if matchers else None
            sampler = RequestSampler(params, self.defaults.sampling, self.runner.vocab_size, ids, seed + index, matcher)
            text = None if self.tokenizer is None else Detokenizer(self.tokenizer, params, ids[-_PROMPT_TAIL:])
            answers.append(
                _Answer(
                    ids=ids.copy(),
                    request_id=request_id,
                    index=index,
                    params=params,
                    sampler=sampler,
                    text=text,
                    stop_ids=stop_ids,
                    limit=limit,
                    stats=RequestStats(prompt_tokens=len(ids), seed=getattr(sampler, "seed", None)),
                    added=now,
                )
            )
        self._answers[request_id] = answers
        self._prompt_tokens += len(ids) * params.n
        self._scheduler.add(answers)

    def cancel(self, request_id: str) -> None:
        """End a request; its slot and its blocks are free at once. Nothing happens if it has ended."""
        for answer in list(self._answers.get(request_id, ())):
            self._end(answer, "cancelled")

    def step(self) -> list[tuple[str, Chunk]]:
        """Compute, and return what is new of each request."""
        step = self._scheduler.next()
        for refused in step.refused:
            _LOG.error("request %s does not fit into the cache although nothing else runs", _owner(refused).request_id)
            self._end(_owner(refused), "error")
        if step.decode:
            self._decode([_owner(task) for task in step.decode])
        if step.chunk is not None:
            self._fill_in(step, step.chunk)
        self._last_step = self._clock()
        out, self._out = self._out, []
        return out

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

    def _decode(self, answers: list[_Answer]) -> None:
        before = self._clock()
        self._start(answers, before)
        try:
            logits = self.runner.decode([_sequence(each) for each in answers], [each.ids[-1] for each in answers])
        except MoesaicError as error:
            self._failed(answers, error)
            return
        self._pace.decoded(self._clock() - before)
        self._choose(answers, logits)

    def _fill_in(self, step: Step, chunk: Filling) -> None:
        before, answers = self._clock(), [_owner(task) for task, _ in chunk.parts]
        self._start(answers, before)
        try:
            if chunk.work is None:
                parts = [(_sequence(task), _next_tokens(task, count)) for task, count in chunk.parts]
                chunk.work = self.runner.start_prefill(parts)
            num_layers = min(step.num_layers, chunk.work.num_layers_left)
            chunk.work.advance(num_layers)
            self._pace.advanced(chunk.num_tokens, num_layers, self._clock() - before)
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

    def _start(self, answers: list[_Answer], now: float) -> None:
        """Remember when answers begin."""
        for answer in answers:
            if answer.started is None:
                answer.started, answer.uses = now, self.runner.expert_uses()
                answer.stats.queue_seconds = now - answer.added
                answer.stats.cached_tokens = answer.cached or 0
                self._cached_tokens += answer.stats.cached_tokens

    def _choose(self, answers: list[_Answer], logits: torch.Tensor) -> None:
        """The next token of each answer, from float32 `[answers, vocab_size]`."""
        over = [answer for answer in answers if answer.limit == 0]
        for answer in over:
            self._end(answer, "length")
        if over:
            kept = [row for row, answer in enumerate(answers) if answer.limit]
            answers, logits = [answers[row] for row in kept], logits[kept]
        for row, answer in enumerate(answers):
            if answer.stop_ids and answer.stats.generated_tokens < answer.params.min_tokens:
                logits[row, list(answer.stop_ids)] = float("-inf")
        try:
            chosen = zip(*sample(logits, [answer.sampler for answer in answers]), strict=True) if answers else ()
        except Exception:  # of one of them; which one shows when each is asked alone
            self._choose_one_by_one(answers, logits)
            return
        for answer, (token, logprob) in zip(answers, chosen, strict=True):
            self._append(answer, token, logprob)

    def _choose_one_by_one(self, answers: list[_Answer], logits: torch.Tensor) -> None:
        for row, answer in enumerate(answers):
            try:
                tokens, logprobs = sample(logits[row : row + 1], [answer.sampler])
            except Exception:
                _LOG.exception("request %s: no token can be chosen", answer.request_id)
                self._end(answer, "error")
            else:
                self._append(answer, tokens[0], logprobs[0])

    def _append(self, answer: _Answer, token: int, logprob: TokenLogprob | None) -> None:
        """One more token of an answer."""
        if answer.first is None:
            answer.first = self._clock()
        answer.failures = 0
        answer.ids.append(token)
        answer.stats.generated_tokens += 1
        self._generated_tokens += 1
        reason: FinishReason | None = None
        stop: str | int | None = None
        text = ""
        try:
            answer.sampler.accept(token)
            if token in answer.stop_ids:
                reason, stop = "stop", token if token in answer.params.stop_token_ids else None
            elif answer.text is not None:
                text = answer.text.push((token,))
                if answer.text.stopped is not None:
                    reason, stop = "stop", answer.text.stopped
            if reason is None and answer.stats.generated_tokens >= answer.limit:
                reason = "length"
        except Exception:
            _LOG.exception("request %s: token %d cannot be taken", answer.request_id, token)
            reason = "error"
        logprobs = () if logprob is None else (logprob,)
        if reason is None:
            self._out.append((answer.request_id, Chunk(answer.index, text, (token,), logprobs)))
        else:
            self._end(answer, reason, text, (token,), logprobs, stop)

    def _end(
        self,
        answer: _Answer,
        reason: FinishReason,
        text: str = "",
        token_ids: tuple[int, ...] = (),
        logprobs: tuple[TokenLogprob, ...] = (),
        stop: str | int | None = None,
    ) -> None:
        """The last piece of an answer; what it holds is free."""
        self._scheduler.remove(answer)
        others = self._answers[answer.request_id]
        others.remove(answer)
        if not others:
            del self._answers[answer.request_id]
        self._finished[reason] += 1
        if answer.text is not None and not isinstance(stop, str):
            text += answer.text.finish()
        stats, now = answer.stats, self._clock()
        if answer.started is not None:
            stats.prefill_seconds = (answer.first or now) - answer.started
            stats.decode_seconds = now - (answer.first or now)
            hits, lookups = self.runner.expert_uses()
            stats.expert_hits, stats.expert_lookups = hits - answer.uses[0], lookups - answer.uses[1]
        self._out.append((answer.request_id, Chunk(answer.index, text, token_ids, logprobs, reason, stop, stats)))

    def _failed(self, answers: list[_Answer], error: MoesaicError) -> None:
        """A step of these answers is lost: it is tried once more."""
        _LOG.error("a step of %d answers failed: %s", len(answers), error)
        for answer in answers:
            answer.failures += 1
            if answer.failures > 1:
                self._end(answer, "error")


def _owner(task: Task) -> _Answer:
    assert isinstance(task, _Answer)
    return task


def _sequence(task: Task) -> Any:
    assert task.sequence is not None, "a task that runs has a sequence"
    return task.sequence


def _next_tokens(task: Task, count: int) -> torch.Tensor:
    return torch.tensor(task.ids[task.computed : task.computed + count], dtype=torch.int64)
