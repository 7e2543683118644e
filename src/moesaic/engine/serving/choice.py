"""Choosing one token from a row of logits: temperature, top-k, top-p, min-p, and a draw by inverse distribution.

What is kept is what transformers' processors keep, in their order: temperature, top-k, top-p, min-p. A vocabulary is
never sorted: thresholds that provably lose nothing come first, and only what is above them is looked at more closely.
This module knows numbers only, neither requests nor texts.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

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


def choose(row: Floats, filters: Filters, noise: float) -> int:
    """Draw a token.

    Args:
        row: float32 `[vocab_size]`, logits; the largest is finite.
        filters: what is kept.
        noise: at least 0 and below 1; the same noise takes the same token.
    """
    ids, weights = kept(row, filters)
    return int(ids[_position(weights, noise)]) if ids is not None else _position(weights, noise)


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
        ids, weights = _nucleus_of_all(row, peak, filters)
    else:
        # Of what min-p keeps a little more, as the exact comparison follows.
        reach = math.log(row.size / _REST) if filters.min_p == 0 else 1e-3 - math.log(filters.min_p)
        ids, values = _above(row, peak, reach * filters.temperature)
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


def _nucleus_of_all(row: Floats, peak: np.float32, filters: Filters) -> tuple[Ids | None, Weights]:
    """Top-p over the whole vocabulary: first by what is not far below the peak, then by all that can matter."""
    near = math.log(row.size / _UNSEEN)
    ids, values = _above(row, peak, near * filters.temperature)
    if ids is not None and 8 * ids.size < row.size:
        weights = _weights(values, peak, filters.temperature)
        if _is_decided(weights, filters.top_p):
            return _nucleus(ids, weights, filters.top_p)
    ids, values = _above(row, peak, math.log(row.size / _REST) * filters.temperature)
    return _nucleus(ids, _weights(values, peak, filters.temperature), filters.top_p)


def _is_decided(weights: Weights, top_p: float) -> bool:
    """Whether the nucleus is the same, however much weight up to `_UNSEEN` there is beside these."""
    sums = np.cumsum(np.sort(weights)[::-1], dtype=np.float64)
    least, most = np.searchsorted(sums, [top_p * sums[-1], top_p * (sums[-1] + _UNSEEN)])
    return bool(least == most)


def _nucleus(ids: Ids | None, weights: Weights, top_p: float) -> tuple[Ids | None, Weights]:
    """Keep those before which, by falling weight, less than `top_p` of all weight comes."""
    if top_p >= 1:
        return ids, weights
    total = float(weights.sum())
    # So many weights below this cannot make up what may be cut off: all of them are cut off.
    floor = total * (1 - top_p) / weights.size * (1 - 1e-5)
    some = np.flatnonzero(weights >= floor)
    candidates = weights[some]
    falling = np.sort(candidates)[::-1]
    count = min(int(np.searchsorted(np.cumsum(falling, dtype=np.float64), top_p * total)) + 1, falling.size)
    last = falling[count - 1]
    chosen = np.flatnonzero(candidates >= last)
    if chosen.size > count:  # of equal ones the first
        equal = np.flatnonzero(candidates[chosen] == last)
        chosen = np.delete(chosen, equal[count - chosen.size :])
    return (some[chosen] if ids is None else ids[some[chosen]]), candidates[chosen]


def _position(weights: Weights, noise: float) -> int:
    """Where `noise` falls when the interval from 0 to 1 is divided in proportion to the weights."""
    if weights.size <= 4 * _BLOCK:
        return _first_above(np.cumsum(weights, dtype=np.float64), noise)
    starts = np.arange(0, weights.size, _BLOCK)
    sums = np.cumsum(np.add.reduceat(weights, starts, dtype=np.float64))
    block = _first_above(sums, noise)
    before = float(sums[block - 1]) if block else 0.0
    inside = np.cumsum(weights[block * _BLOCK : (block + 1) * _BLOCK], dtype=np.float64) + before
    target = min(noise * float(sums[-1]), math.nextafter(float(inside[-1]), 0.0))
    return block * _BLOCK + int(np.searchsorted(inside, target, side="right"))


def _first_above(sums: Doubles, noise: float) -> int:
    """Index of the first sum above `noise` of the last one; what is there has a weight above 0."""
    target = min(noise * float(sums[-1]), math.nextafter(float(sums[-1]), 0.0))
    return int(np.searchsorted(sums, target, side="right"))
