"""Counts and times of a server for Prometheus, in a registry of its own.

Requests are counted by the middleware; an engine tells when tokens come, and what it counts itself is asked for when
somebody looks. It knows nothing of what is in a request.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from itertools import accumulate

from prometheus_client import CollectorRegistry, Counter, Histogram, ProcessCollector, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from moesaic.engine.serving.interface import EngineClient

__all__ = ["Metrics"]

_FIRST_TOKEN = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)
_BETWEEN_TOKENS = (0.002, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 1, 2, 5)
_REQUEST = (0.005, 0.05, 0.25, 1, 5, 15, 60, 300, 1200)
_METHODS = frozenset({"GET", "HEAD", "POST", "OPTIONS"})


class Metrics:
    """Of one application; also what an `AsyncEngine` tells the times of tokens."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        self._requests = Counter(
            "moesaic_requests", "Requests answered", ["method", "route", "status"], registry=self._registry
        )
        self._seconds = Histogram(
            "moesaic_request_seconds",
            "Time to the end of an answer",
            ["route"],
            buckets=_REQUEST,
            registry=self._registry,
        )
        first = _Times("time_to_first_token_seconds", "Time to an answer's first token", _FIRST_TOKEN)
        between = _Times("inter_token_seconds", "Time between pieces of an answer", _BETWEEN_TOKENS)
        self.first_token, self.next_token = first.observe, between.observe
        for times in (first, between):
            self._registry.register(times)
        ProcessCollector(registry=self._registry)

    def watch(self, engine: Callable[[], EngineClient | None]) -> None:
        """Report the counts of the engine that the function gives when they are asked for."""
        self._registry.register(_EngineCollector(engine))

    def request(self, method: str, route: str | None, status: int, seconds: float) -> None:
        """Count a request; labels come from a fixed set, whatever was sent."""
        route = route or "other"
        self._requests.labels(method if method in _METHODS else "other", route, str(status)).inc()
        self._seconds.labels(route).observe(seconds)

    def text(self) -> bytes:
        """All of it in Prometheus's text format."""
        return generate_latest(self._registry)


class _Times(Collector):
    """A histogram for what happens once per token: only one thread observes, so that nothing is locked."""

    def __init__(self, name: str, help_text: str, bounds: Sequence[float]) -> None:
        self._name, self._help, self._bounds = f"moesaic_{name}", help_text, bounds
        self._counts = [0] * (len(bounds) + 1)
        self._sum = 0.0

    def observe(self, seconds: float) -> None:
        """Count one."""
        self._counts[bisect_left(self._bounds, seconds)] += 1
        self._sum += seconds

    def collect(self) -> Iterator[Metric]:
        """A snapshot."""
        bounds = [*(str(float(bound)) for bound in self._bounds), "+Inf"]
        buckets = list(zip(bounds, accumulate(self._counts), strict=True))
        yield HistogramMetricFamily(self._name, self._help, buckets, self._sum)


class _EngineCollector(Collector):
    """What an engine counts itself."""

    def __init__(self, engine: Callable[[], EngineClient | None]) -> None:
        self._engine = engine

    def describe(self) -> Iterator[Metric]:
        """Nothing: so nobody asks the engine before it is there."""
        return iter(())

    def collect(self) -> Iterator[Metric]:
        """A snapshot."""
        engine = self._engine()
        status = "loading" if engine is None else engine.status
        yield _gauge("engine_ready", "Whether the engine takes requests", float(status == "ready"))
        if engine is None:
            return
        stats = engine.stats()
        yield _gauge("requests_running", "Requests of which tokens are computed", stats.running)
        yield _gauge("requests_waiting", "Requests that wait for their first step", stats.waiting)
        blocks = GaugeMetricFamily("moesaic_kv_blocks", "Blocks of the KV cache", labels=["state"])
        blocks.add_metric(["free"], stats.blocks_free)
        blocks.add_metric(["cached"], stats.blocks_cached)
        blocks.add_metric(["used"], stats.blocks - stats.blocks_free - stats.blocks_cached)
        yield blocks
        yield _counter("prompt_tokens", "Tokens of prompts", stats.prompt_tokens)
        yield _counter("cached_tokens", "Tokens of prompts that the cache still held", stats.cached_tokens)
        yield _counter("generated_tokens", "Tokens of answers", stats.generated_tokens)
        yield _counter("preemptions", "Requests that gave their blocks back for a while", stats.preemptions)
        yield _counter("expert_cache_hits", "Experts found in the cache on the GPU", stats.expert_hits)
        yield _counter("expert_cache_lookups", "Experts looked for there", stats.expert_lookups)
        finished = CounterMetricFamily("moesaic_answers", "Answers by how they ended", labels=["reason"])
        for reason, count in stats.finished:
            finished.add_metric([reason], count)
        yield finished


def _gauge(name: str, help_text: str, value: float) -> Metric:
    return GaugeMetricFamily(f"moesaic_{name}", help_text, value)


def _counter(name: str, help_text: str, value: float) -> Metric:
    return CounterMetricFamily(f"moesaic_{name}", help_text, value)
