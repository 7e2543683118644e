"""What the server adds to a token: from the end of its step to the client, directly and through HTTP.

The engine is the real one on a runner of fixed steps. The client of HTTP is a process of its own; it notes when bytes
arrive and looks at them afterwards, so that its own work hardly counts.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass

from moesaic.engine.serving.async_engine import AsyncEngine
from moesaic.engine.serving.bench.figures import percentile
from moesaic.engine.serving.core import Engine, EngineOptions
from moesaic.engine.serving.defaults import GenerationDefaults
from moesaic.engine.serving.params import SamplingParams
from moesaic.errors import MoesaicError
from moesaic.server.bench.local import local_server
from moesaic.server.bench.paced import PacedRunner
from moesaic.server.metrics import Metrics

__all__ = ["Latency", "measure_latency"]

_NAME = "paced"
_PROMPT = (1, 2, 3)
Arrival = tuple[int, float]
"""A step's number and when its token came."""


@dataclass(frozen=True, slots=True)
class Latency:
    """Milliseconds from the end of a step until its token is with who asked.

    Attributes:
        streams: answers at a time.
        step: milliseconds that a step takes.
        tokens: that were measured, each way.
        direct_p50, direct_p99: of `generate` in the engine's process.
        http_p50, http_p99: of a stream of `/v1/completions`.
        loop_microseconds: processor time of the server's event loop per token, requests included.
    """

    streams: int
    step: float
    tokens: int
    direct_p50: float
    direct_p99: float
    http_p50: float
    http_p99: float
    loop_microseconds: float

    @property
    def added_p50(self) -> float:
        """What the server adds to the median."""
        return self.http_p50 - self.direct_p50

    @property
    def added_p99(self) -> float:
        """What it adds to the 99th percentile."""
        return self.http_p99 - self.direct_p99


async def measure_latency(streams: int = 64, step_seconds: float = 0.05, steps: int = 100) -> Latency:
    """Measure with so many streams.

    Args:
        streams: answers at a time.
        step_seconds: that a step takes.
        steps: tokens of each answer; the first tenth is not counted.

    Raises:
        MoesaicError: the client failed.
    """
    runner = PacedRunner(step_seconds, 8 * steps + 64, streams, len(_PROMPT) + steps)
    metrics = Metrics()
    engine = AsyncEngine(
        lambda: Engine(runner, None, GenerationDefaults(), options=EngineOptions(max_running=streams)),
        max_waiting=2 * streams,
        times=metrics,
    )
    engine.start()
    try:
        await engine.wait_ready()
        arrivals = await asyncio.gather(*(_direct(engine, steps) for _ in range(streams)))
        direct = _milliseconds([each for stream in arrivals for each in stream], runner, steps)
        async with local_server(engine, _NAME, metrics=metrics) as url:
            before = time.thread_time()
            http = _milliseconds(await _through_http(url, streams, steps), runner, steps)
            in_loop = time.thread_time() - before
    finally:
        await engine.close()
    if not direct or not http:
        raise MoesaicError("no token came: nothing was measured.")
    return Latency(
        streams,
        1e3 * step_seconds,
        min(len(direct), len(http)),
        percentile(direct, 50) or 0.0,
        percentile(direct, 99) or 0.0,
        percentile(http, 50) or 0.0,
        percentile(http, 99) or 0.0,
        1e6 * in_loop / (streams * steps),
    )


def _milliseconds(arrivals: Sequence[Arrival], runner: PacedRunner, steps: int) -> list[float]:
    """From the end of each step to its token, without the first steps of these."""
    first = min((step for step, _ in arrivals), default=0) + max(1, steps // 10)
    return [1e3 * (came - runner.ended[step]) for step, came in arrivals if step >= first]


async def _direct(engine: AsyncEngine, steps: int) -> list[Arrival]:
    params = SamplingParams(max_tokens=steps, temperature=0, ignore_eos=True)
    arrivals = []
    async for chunk in engine.generate(_PROMPT, params):
        now = time.perf_counter()
        arrivals += [(token, now) for token in chunk.token_ids]
    return arrivals


async def _through_http(url: str, streams: int, steps: int) -> list[Arrival]:
    """Let another process ask; both have the same clock."""
    host, _, port = url.removeprefix("http://").rpartition(":")
    body = {
        "model": _NAME,
        "prompt": _PROMPT,
        "max_tokens": steps,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
    }
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "moesaic.server.bench.raw_client",
        host,
        port,
        str(streams),
        json.dumps(body),
        stdout=asyncio.subprocess.PIPE,
    )
    out, _ = await process.communicate()
    if process.returncode:
        raise MoesaicError(f"the client's process ended with {process.returncode}; see what it wrote above.")
    return [(step, came) for step, came in json.loads(out)]
