"""Choosing one token from a row of logits: temperature, top-k, top-p, min-p, and a draw by inverse distribution.

What is kept is what transformers' processors keep, in their order: temperature, top-k, top-p, min-p. A vocabulary is
never sorted: thresholds that provably lose nothing come first, and only what is above them is looked at more closely.
This module knows numbers only, neither requests nor texts.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["Filters", "choose", "kept", "largest", "log_sum_exp"]

Floats = NDArray[np.float32]
Doubles = NDArray[np.float64]
Weights = NDArray[np.float32] | NDArray[np.float64]
Ids = NDArray[np.int64]

_GROUPS = 64
_REST = 1e-7
"""Tokens that are left out because all of them together are less likely than this; float32 cannot tell."""
_UNSEEN = 1e-3
"""Weight (the likeliest token has 1) that a first look at top-p leaves open."""
_ATTEMPTS = 12
_BLOCK = 512


@dataclass(frozen=True, slots=True)
class Filters:
    """Which tokens may be drawn.

    Attributes:
        temperature: divides the logits; above 0.
        top_k: keep so many of the likeliest tokens, and those as likely as the last of them; 0 keeps all.
        top_p: then keep the likeliest tokens until they have this probability; of equal ones the first.
        min_p: then keep tokens at least this fraction as likely as the likeliest.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0


def choose(row: Floats, filters: Filters, noise: Callable[[int], float]) -> int:
    """Draw a token.

    Args:
        row: float32 `[vocab_size]`, logits; the largest is finite.
        filters: what is kept.
        noise: gives numbers at least 0 and below 1, for 0, 1, ...; the same noise takes the same token.
    """
    found = None
    if filters.top_k == 0 and filters.min_p == 0 and 0.5 <= filters.top_p < 1:
        peak = row.max()
        found = _near_nucleus(row, peak, filters)
        token = _draw_until_in_nucleus(row, peak, filters, noise) if found is None else None
        if token is not None:
            return token
    ids, weights = kept(row, filters) if found is None else found
    position = _position(weights, noise(0))
    return position if ids is None else int(ids[position])


def kept(row: Floats, filters: Filters) -> tuple[Ids | None, Weights]:
    """The tokens that may be drawn.

    Args:
        row: float32 `[vocab_size]`, logits; the largest is finite.
        filters: what is kept.

    Returns:
        Their ids, ascending (None: all tokens), and weights that are proportional to their probabilities.
    """
    peak: np.float32 = row.max()
    if 0 < filters.top_k < row.size:
        top = largest(row, filters.top_k)
        ids, weights = _nucleus(top, _weights(row[top], peak, filters.temperature), filters.top_p)
    elif filters.top_p < 1:
        near = _near_nucleus(row, peak, filters)
        ids, weights = _far_nucleus(row, peak, filters) if near is None else near
    else:
        ids, values = _above(row, peak, _reach(row, filters))
        weights = _weights(values, peak, filters.temperature)
    if filters.min_p > 0:
        likely = np.flatnonzero(weights >= filters.min_p)  # the likeliest one's weight is 1
        ids, weights = likely if ids is None else ids[likely], weights[likely]
    return ids, weights


def largest(row: Floats, count: int) -> Ids:
    """Ids of the `count` largest values and of those equal to the last of them, ascending."""
    bound = _lower_bound(row, count)
    ids = np.flatnonzero(row >= bound if bound > -np.inf else row > bound)
    if ids.size <= count:
        return ids
    values = row[ids]
    last: np.float32 = np.partition(values, ids.size - count)[ids.size - count]
    return ids[np.flatnonzero(values >= last)]


def log_sum_exp(row: Floats) -> float:
    """The logarithm of the sum of exponentials; the largest value must be finite."""
    peak: np.float32 = row.max()
    _, values = _above(row, peak, math.log(row.size / _REST))
    return float(peak) + math.log(float(_weights(values, peak, 1.0).sum(dtype=np.float64)))


def _weights(values: Floats, peak: np.float32, temperature: float) -> Weights:
    """Exponentials of logits, at most 1. Differences come first: nothing overflows, and no digits are lost."""
    if values.size <= 4096:
        return np.exp((values.astype(np.float64) - float(peak)) / temperature)
    weights = np.subtract(values, peak)
    weights *= np.float32(1 / temperature)
    return np.exp(weights, out=weights)


def _reach(row: Floats, filters: Filters) -> float:
    """How far below the peak tokens matter: with min-p a little more than it keeps, as the exact comparison follows."""
    least = math.log(row.size / _REST) if filters.min_p == 0 else 1e-3 - math.log(filters.min_p)
    return least * filters.temperature


def _above(row: Floats, peak: np.float32, reach: float) -> tuple[Ids | None, Floats]:
    """Ids and values that are at most `reach` below the peak; if these are most of them, all (None: all ids)."""
    mask = row >= peak - np.float32(reach)
    if 2 * np.count_nonzero(mask) > row.size:
        return None, row
    ids = np.flatnonzero(mask)
    return ids, row[ids]


def _lower_bound(row: Floats, count: int) -> np.float32:
    """A value that at least `count` others reach: the count-th largest of the maxima of groups."""
    length, count = row.size // _GROUPS, min(count, row.size)
    maxima = row[: length * _GROUPS].reshape(_GROUPS, length).max(axis=0) if count <= length else row
    bound: np.float32 = np.partition(maxima, maxima.size - count)[maxima.size - count]
    return bound


def _near_nucleus(row: Floats, peak: np.float32, filters: Filters) -> tuple[Ids, Weights] | None:
    """Top-p over the whole vocabulary by what is not far below the peak; None if that does not decide it."""
    reach = math.log(row.size / _UNSEEN) * filters.temperature
    mask = row >= peak - np.float32(reach)
    if 8 * np.count_nonzero(mask) > row.size:
        return None
    ids = np.flatnonzero(mask)
    weights = _weights(row[ids], peak, filters.temperature)
    # Whether it is the same, however much weight up to `_UNSEEN` there is beside these.
    falling = np.sort(weights)[::-1]
    sums = np.cumsum(falling, dtype=np.float64)
    least, most = np.searchsorted(sums, [filters.top_p * sums[-1], filters.top_p * (sums[-1] + _UNSEEN)])
    if least != most:
        return None
    chosen = _first_of(weights, falling, int(least) + 1)
    return ids[chosen], weights[chosen]


def _far_nucleus(row: Floats, peak: np.float32, filters: Filters) -> tuple[Ids | None, Weights]:
    """Top-p over the whole vocabulary. Only what min-p keeps is put in order; all there is counts for the whole."""
    every, values = _above(row, peak, math.log(row.size / _REST) * filters.temperature)
    weights = _weights(values, peak, filters.temperature)
    if filters.min_p == 0:
        return _nucleus(every, weights, filters.top_p)
    mass = filters.top_p * float(_block_sums(weights)[-1])
    ids, values = _above(row, peak, _reach(row, filters))
    weights = _weights(values, peak, filters.temperature)
    chosen = _until(weights, mass)
    return (chosen if ids is None else ids[chosen]), weights[chosen]


def _draw_until_in_nucleus(
    row: Floats, peak: np.float32, filters: Filters, noise: Callable[[int], float]
) -> int | None:
    """Draw from all tokens until one is in the nucleus, which needs no order among them; None if none was.

    What comes out is distributed as if only the nucleus were drawn from.
    """
    weights = _weights(row, peak, filters.temperature)
    sums = _block_sums(weights)
    mass = filters.top_p * float(sums[-1])
    for attempt in range(_ATTEMPTS):
        token = _position(weights, noise(attempt), sums)
        before = float(weights[weights > weights[token]].sum())
        before += float(weights[token]) * np.count_nonzero(weights[:token] == weights[token])
        if before < mass:
            return token
    return None


def _nucleus(ids: Ids | None, weights: Weights, top_p: float) -> tuple[Ids | None, Weights]:
    """Keep those before which, by falling weight, less than `top_p` of all weight comes."""
    if top_p >= 1:
        return ids, weights
    total = float(weights.sum())
    # So many weights below this cannot make up what may be cut off: all of them are cut off.
    floor = total * (1 - top_p) / weights.size * (1 - 1e-5)
    some = np.flatnonzero(weights >= floor)
    chosen = some[_until(weights[some], top_p * total)]
    return (chosen if ids is None else ids[chosen]), weights[chosen]


def _until(weights: Weights, mass: float) -> Ids:
    """Where those are before which, by falling weight, less than `mass` comes, ascending."""
    falling = np.sort(weights)[::-1]
    count = int(np.searchsorted(np.cumsum(falling, dtype=np.float64), mass)) + 1
    return _first_of(weights, falling, count)


def _first_of(weights: Weights, falling: NDArray[Any], count: int) -> Ids:
    """Where the `count` largest weights are (of equal ones the first), ascending; `falling`: all of them in order."""
    count = min(count, falling.size)
    last = falling[count - 1]
    chosen = np.flatnonzero(weights >= last)
    if chosen.size > count:
        equal = np.flatnonzero(weights[chosen] == last)
        chosen = np.delete(chosen, equal[count - chosen.size :])
    return chosen


def _position(weights: Weights, noise: float, sums: Doubles | None = None) -> int:
    """Where `noise` falls when the interval from 0 to 1 is divided in proportion to the weights.

    `sums` are those of `_block_sums`, if they are there already.
    """
    if sums is None:
        sums = _block_sums(weights)
    block = _first_above(sums, noise * float(sums[-1]))
    before = float(sums[block - 1]) if block else 0.0
    inside = np.cumsum(weights[block * _BLOCK : (block + 1) * _BLOCK], dtype=np.float64) + before
    return block * _BLOCK + _first_above(inside, noise * float(sums[-1]))


def _block_sums(weights: Weights) -> Doubles:
    """Sums up to the ends of blocks of `_BLOCK` weights: a running sum over all of them takes far longer."""
    whole = weights.size // _BLOCK * _BLOCK
    parts = weights[:whole].reshape(-1, _BLOCK).sum(axis=1).astype(np.float64)
    if whole < weights.size:
        parts = np.append(parts, float(weights[whole:].sum()))
    return np.cumsum(parts)


def _first_above(sums: Doubles, target: float) -> int:
    """Index of the first sum above a target, or of the last that grew; what is there has a weight above 0."""
    target = min(target, math.nextafter(float(sums[-1]), 0.0))
    return int(np.searchsorted(sums, target, side="right"))
