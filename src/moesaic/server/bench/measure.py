"""Loads on a server or on a model of this process, and what was measured: what `moesaic bench serve` shows.

It joins the parts; none of them is made here.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from moesaic.engine.serving.bench.bound import Bound, bound_of
from moesaic.engine.serving.bench.drive import EngineTarget, Record, Target, run_closed, run_open
from moesaic.engine.serving.bench.figures import LoadFigures, load_figures
from moesaic.engine.serving.bench.load import Arrivals, BenchRequest, Lengths, arrival_times, make_requests
from moesaic.errors import MoesaicError

if TYPE_CHECKING:
    from moesaic.engine.serving.async_engine import AsyncEngine
    from moesaic.engine.serving.bench.subject import Subject

__all__ = ["Load", "ServeResult", "measure_engine", "measure_running", "measure_url", "started"]

_WARM_UP = BenchRequest((1, 2, 3, 4, 5, 6, 7, 8), 4)
_MAX_BATCH = 64
_SALT = 7919
"""Between the seeds of loads, so that none finds another's prompts in the cache."""
Run = Callable[[Sequence[BenchRequest], int | None, Sequence[float] | None], Awaitable[list[Record]]]
"""Asks requests: in a closed loop of so many users, or at times."""


@dataclass(frozen=True, slots=True)
class Load:
    """What is asked.

    Attributes:
        users: of closed loops, one loop after the other; empty for an open loop.
        rate: requests per second of an open loop.
        arrivals: of an open loop.
        requests: of an open loop, or of each user.
        prompt: tokens of prompts.
        answer: tokens of answers.
        shared_prefix: tokens that all prompts begin with.
        seed: of all choices.
        temperature: of sampling.
    """

    users: tuple[int, ...] = ()
    rate: float = 1.0
    arrivals: Arrivals = "poisson"
    requests: int = 1
    prompt: Lengths = field(default_factory=lambda: Lengths(128, 128))
    answer: Lengths = field(default_factory=lambda: Lengths(64, 64))
    shared_prefix: int = 0
    seed: int = 0
    temperature: float = 0.0

    @property
    def most_users(self) -> int:
        """Answers at a time that there is to be room for."""
        return max(self.users, default=min(_MAX_BATCH, self.requests))

    @property
    def positions(self) -> int:
        """Tokens of the longest request with its answer."""
        return self.prompt.high + self.answer.high


@dataclass(frozen=True, slots=True)
class ServeResult:
    """What was measured.

    Attributes:
        subject: what answered, for people.
        prompt, answer: lengths, for people.
        figures: of each load.
        bounds: of closed loops of several users, if there was one of one user on the same model of this process.
    """

    subject: str
    prompt: str
    answer: str
    figures: tuple[LoadFigures, ...]
    bounds: tuple[Bound, ...] = ()


@dataclass(frozen=True, slots=True)
class _Done:
    """A load and what became of it; `users` is None for an open loop."""

    users: int | None
    requests: list[BenchRequest]
    records: list[Record]
    figures: LoadFigures


def measure_url(
    load: Load,
    url: str,
    *,
    model: str | None = None,
    api_key: str | None = None,
    vocab_size: int = 1000,
    say: Callable[[str], None] = print,
) -> ServeResult:
    """Loads on a server.

    Args:
        load: what is asked.
        url: of the server.
        model: name to ask for; the first that it has if None.
        api_key: to show.
        vocab_size: random tokens are below this.
        say: called with what is being done.

    Raises:
        ConfigError: nobody answers there, or there is no model.
        MoesaicError: the first request, which is not counted, failed.
    """
    from moesaic.server.bench.http_target import HttpTarget

    async def main() -> ServeResult:
        target = HttpTarget(url, model=model, api_key=api_key, temperature=load.temperature, seed=load.seed)
        async with target:
            done = await _run_loads(load, _run_on(target), "http", vocab_size, say)
        return _result(load, f"{target.model} at {url}", done)

    return asyncio.run(main())


def measure_engine(
    load: Load, subject: Subject, *, http: bool = False, say: Callable[[str], None] = print
) -> ServeResult:
    """Loads on a model of this process; its engine is closed then.

    Args:
        load: what is asked.
        subject: the model.
        http: also through a server of this process, asked by another process.
        say: called with what is being done.

    Raises:
        MoesaicError: the first request, which is not counted, failed.
    """

    async def main() -> ServeResult:
        async with started(subject, 2 * max(load.requests, load.most_users)) as engine:
            return await measure_running(load, subject, engine, http=http, say=say)

    return asyncio.run(main())


async def measure_running(
    load: Load, subject: Subject, engine: AsyncEngine, *, http: bool = False, say: Callable[[str], None] = print
) -> ServeResult:
    """As `measure_engine`, on an engine that `started` gave; it is not closed."""
    vocab_size = subject.engine.runner.vocab_size
    target = EngineTarget(engine, load.temperature, load.seed)
    done = await _run_loads(load, _run_on(target), "engine", vocab_size, say)
    bounds = await asyncio.to_thread(_bounds, load, subject, done)
    if http:
        done += await _through_http(load, engine, subject.name, vocab_size, say)
    return _result(load, subject.describe(), done, bounds)


@asynccontextmanager
async def started(subject: Subject, max_waiting: int) -> AsyncIterator[AsyncEngine]:
    """A subject's engine for the running event loop, closed at the end.

    Args:
        subject: the model.
        max_waiting: answers that may wait for their first step.
    """
    from moesaic.engine.serving.async_engine import AsyncEngine

    engine = AsyncEngine(lambda: subject.engine, max_waiting=max_waiting)
    engine.start()
    try:
        await engine.wait_ready()
        yield engine
    finally:
        await engine.close()


def _result(load: Load, subject: str, done: Sequence[_Done], bounds: Sequence[Bound] = ()) -> ServeResult:
    figures = tuple(each.figures for each in done)
    return ServeResult(subject, str(load.prompt), str(load.answer), figures, tuple(bounds))


async def _through_http(
    load: Load, engine: AsyncEngine, name: str, vocab_size: int, say: Callable[[str], None]
) -> list[_Done]:
    from moesaic.server.bench.client import ask_from_another_process
    from moesaic.server.bench.local import local_server

    async with local_server(engine, name) as url:

        async def run(
            requests: Sequence[BenchRequest], users: int | None, times: Sequence[float] | None
        ) -> list[Record]:
            return await ask_from_another_process(
                url, requests, users=users, times=times, temperature=load.temperature, seed=load.seed
            )

        return await _run_loads(load, run, "http", vocab_size, say)


def _run_on(target: Target) -> Run:
    async def run(requests: Sequence[BenchRequest], users: int | None, times: Sequence[float] | None) -> list[Record]:
        if users is not None:
            return await run_closed(target, requests, users)
        assert times is not None
        return await run_open(target, requests, times)

    return run


async def _run_loads(load: Load, run: Run, via: str, vocab_size: int, say: Callable[[str], None]) -> list[_Done]:
    """All loops, after a short request that warms up and shows whether anything works."""
    (first,) = await run([_WARM_UP], 1, None)
    if first.error is not None:
        raise MoesaicError(f"the first request failed: {first.error}")
    done = []
    for users in load.users or (None,):
        count = load.requests * (users or 1)
        seed = load.seed + _SALT * ((users or 0) + (via == "http") * 100_000)
        requests = make_requests(
            count, load.prompt, load.answer, vocab_size, seed=seed, shared_prefix=load.shared_prefix
        )
        how = f"{load.rate:g} requests a second" if users is None else f"{users} at a time"
        say(f"{count} requests, {how}, via {via} ...")
        times = arrival_times(count, load.rate, load.arrivals, seed=load.seed) if users is None else None
        records = await run(requests, users, times)
        figures = load_figures(records, via=via, users=users, rate=load.rate if users is None else None)
        done.append(_Done(users, requests, records, figures))
    return done


def _bounds(load: Load, subject: Subject, done: Sequence[_Done]) -> list[Bound]:
    """Of closed loops on a CPU, beside one of a single user. On a GPU, bytes come from two memories."""
    from moesaic.engine.serving.bench.routing import distinct_experts
    from moesaic.engine.serving.bench.subject import step_bytes

    plan, rates = subject.prepared.plan, {each.users: each.figures.decode_tokens_per_second for each in done}
    one = rates.get(1)
    if one is None or plan.uses_gpu or not subject.expert_modules:
        return []
    bounds = []
    for each in done:
        measured = each.figures.decode_tokens_per_second
        if each.users is None or each.users == 1 or measured is None:
            continue
        step = step_bytes(plan, (load.prompt.low + load.prompt.high) / 2 + (load.answer.low + load.answer.high) / 4)
        distinct = distinct_experts(subject.model, subject.expert_modules, _first_answers(each, each.users))
        bounds.append(bound_of(each.users, measured, one, step, distinct))
    return bounds


def _first_answers(done: _Done, users: int) -> list[tuple[list[int], int]]:
    """Of each user, tokens of the first prompt and its answer, and how many the prompt has."""
    found: dict[int, Record] = {}
    for record in done.records:
        if record.error is None:
            found.setdefault(record.user, record)
    prompts = {user: list(done.requests[user].prompt_ids) for user in range(users)}
    return [(prompts[user] + record.token_ids, len(prompts[user])) for user, record in sorted(found.items())]
