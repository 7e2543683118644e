"""Numbers from the times of a load: latencies, rates, and the decode rate while everybody decodes.

Times between tokens are those between pieces that a client gets. It measures nothing itself.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from moesaic.engine.serving.bench.drive import Record

__all__ = ["LoadFigures", "decode_rate", "gaps", "load_figures", "percentile"]

_MAX_ERRORS = 5


@dataclass(frozen=True, slots=True)
class LoadFigures:
    """What a load showed; latencies in milliseconds, None where nothing was measured.

    Attributes:
        via: "engine" (called in its process) or "http".
        users: of a closed loop; None for an open one.
        rate: requests per second of an open loop; None for a closed one.
        requests: that were sent.
        failed: of them.
        errors: texts of failures with how often each came, the most frequent first.
        seconds: from the first request to the last answer's end.
        prompt_tokens: of requests that were answered.
        cached_tokens: of those, found in the cache.
        generated_tokens: of their answers.
        ttft_p50, ttft_p99: time to the first token.
        itl_p50, itl_p99, itl_max: time from one piece of an answer to its next.
        requests_per_second: that were answered.
        tokens_per_second: of answers.
        decode_tokens_per_second: of all users together while all of them were between their first and last token.
    """

    via: str
    users: int | None
    rate: float | None
    requests: int
    failed: int
    errors: tuple[tuple[str, int], ...]
    seconds: float
    prompt_tokens: int
    cached_tokens: int
    generated_tokens: int
    ttft_p50: float | None
    ttft_p99: float | None
    itl_p50: float | None
    itl_p99: float | None
    itl_max: float | None
    requests_per_second: float
    tokens_per_second: float
    decode_tokens_per_second: float | None


def load_figures(
    records: Sequence[Record], *, via: str = "engine", users: int | None = None, rate: float | None = None
) -> LoadFigures:
    """Numbers of a load.

    Args:
        records: of its requests, at least one.
        via: see `LoadFigures`.
        users: of a closed loop.
        rate: of an open loop.
    """
    done = [record for record in records if record.error is None]
    seconds = max(record.ended for record in records) - min(record.asked for record in records)
    first = [1e3 * (record.times[0] - record.asked) for record in done if record.times]
    between = [1e3 * gap for record in done for gap in gaps(record)]
    generated = sum(record.generated_tokens for record in done)
    return LoadFigures(
        via=via,
        users=users,
        rate=rate,
        requests=len(records),
        failed=len(records) - len(done),
        errors=tuple(Counter(r.error for r in records if r.error is not None).most_common(_MAX_ERRORS)),
        seconds=seconds,
        prompt_tokens=sum(record.prompt_tokens for record in done),
        cached_tokens=sum(record.cached_tokens for record in done),
        generated_tokens=generated,
        ttft_p50=percentile(first, 50),
        ttft_p99=percentile(first, 99),
        itl_p50=percentile(between, 50),
        itl_p99=percentile(between, 99),
        itl_max=max(between, default=None),
        requests_per_second=len(done) / seconds if seconds > 0 else 0.0,
        tokens_per_second=generated / seconds if seconds > 0 else 0.0,
        decode_tokens_per_second=None if users is None else decode_rate(done, users),
    )


def gaps(record: Record) -> list[float]:
    """Seconds from each piece to the next."""
    return [later - earlier for earlier, later in zip(record.times, record.times[1:], strict=False)]


def percentile(values: Iterable[float], percent: float) -> float | None:
    """The value below which so many percent of all are, interpolated between the two nearest; None of nothing."""
    ordered = sorted(values)
    if not ordered:
        return None
    place = (len(ordered) - 1) * percent / 100
    low, high = math.floor(place), math.ceil(place)
    return ordered[low] + (ordered[high] - ordered[low]) * (place - low)


def decode_rate(records: Iterable[Record], users: int) -> float | None:
    """Tokens per second while `users` answers are between their first and last token; None if they never are.

    A token is taken to be made evenly over the time from the one before, so that neither end of such a time is
    counted too high or too low.
    """
    answers = [record for record in records if len(record.times) > 1]
    changes = sorted(
        [(answer.times[0], 1) for answer in answers] + [(answer.times[-1], -1) for answer in answers],
        key=lambda change: change,
    )
    windows, running, since = [], 0, 0.0
    for at, change in changes:
        if running >= users and at > since:
            windows.append((since, at))
        running, since = running + change, at
    seconds = sum(end - begin for begin, end in windows)
    if seconds <= 0:
        return None
    return sum(_made(answer, windows) for answer in answers) / seconds


def _made(answer: Record, windows: Sequence[tuple[float, float]]) -> float:
    """Tokens of an answer that were made within windows, with fractions."""
    total = 0.0
    for begin, end, count in zip(answer.times, answer.times[1:], answer.counts[1:], strict=False):
        if end > begin:
            inside = sum(max(0.0, min(end, right) - max(begin, left)) for left, right in windows)
            total += count * inside / (end - begin)
        else:
            total += count * any(left < end <= right for left, right in windows)
    return total
