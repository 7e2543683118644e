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
Ids = NDArray[np.int64]

_GROUPS = 64
_REST = 1e-7
"""Tokens that are left out because all of them together are less likely than this; float32 cannot tell."""
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


def kept(row: Floats, filters: Filters) -> tuple[Ids | None, Floats | Doubles]:
    """The tokens that may be drawn.

    Args:
        row: float32 `[vocab_size]`, logits; the largest is finite.
        filters: what is kept.

    Returns:
        Their ids, ascending (None: all tokens), and weights that are proportional to their probabilities.
    """
    ids, values, peak = _candidates(row, filters)
    # Differences are taken first: large logits lose no digits, and nothing overflows at small temperatures.
    if values.size <= 4096:
        weights: Floats | Doubles = np.exp((values.astype(np.float64) - float(peak)) / filters.temperature)
    else:
        weights = np.subtract(values, peak)
        weights *= np.float32(1 / filters.temperature)
        np.exp(weights, out=weights)
    keep: NDArray[np.bool_] | None = None
    if filters.top_p < 1:
        keep = _nucleus(weights, filters.top_p)
    if filters.min_p > 0:
        likely = weights >= filters.min_p  # the likeliest one's weight is 1
        keep = likely if keep is None else keep & likely
    if keep is None:
        return ids, weights
    return (np.flatnonzero(keep) if ids is None else ids[keep]), weights[keep]


def largest(row: Floats, count: int) -> Ids:
    """Ids of the `count` largest values and of those equal to the last of them, ascending."""
    ids, values = _above(row, _lower_bound(row, count))
    if values.size > count:
        last = np.partition(values, values.size - count)[values.size - count]
        chosen = values >= last
        ids = np.flatnonzero(chosen) if ids is None else ids[chosen]
    elif ids is None:
        ids = np.arange(values.size)
    return ids


def log_sum_exp(row: Floats) -> float:
    """The logarithm of the sum of exponentials; the largest value must be finite."""
    peak = row.max()
    _, values = _within_reach(row, peak, 1.0)
    return float(peak) + math.log(float(np.exp(values - peak).sum(dtype=np.float64)))


def _candidates(row: Floats, filters: Filters) -> tuple[Ids | None, Floats, np.float32]:
    """Tokens that top-k keeps, or without it all that have a noticeable probability or may pass min-p."""
    peak: np.float32 = row.max()
    if 0 < filters.top_k < row.size:
        ids = largest(row, filters.top_k)
        return ids, row[ids], peak
    if filters.min_p > 0 and filters.top_p >= 1:
        slack = 1e-3 - math.log(filters.min_p)  # the exact comparison follows
        return *_above(row, peak - np.float32(slack * filters.temperature)), peak
    return *_within_reach(row, peak, filters.temperature), peak


def _within_reach(row: Floats, peak: np.float32, temperature: float) -> tuple[Ids | None, Floats]:
    """All tokens but those that together have less than `_REST` of the probability."""
    reach = math.log(row.size / _REST)
    return _above(row, peak - np.float32(reach * temperature))


def _above(row: Floats, threshold: np.float32) -> tuple[Ids | None, Floats]:
    """Ids (None: all of them) and values at or above a threshold, or more; without -inf where that saves something."""
    mask = row >= threshold if threshold > -np.inf else row > threshold
    ids = np.flatnonzero(mask)
    return (None, row) if 2 * ids.size > row.size else (ids, row[ids])


def _lower_bound(row: Floats, count: int) -> np.float32:
    """A value that at least `count` others reach: the count-th largest of the maxima of groups."""
    length = row.size // _GROUPS
    if count > length:
        bound: np.float32 = np.partition(row, row.size - count)[row.size - count] if count < row.size else row.min()
        return bound
    maxima = row[: length * _GROUPS].reshape(_GROUPS, length).max(axis=0)
    bound = np.partition(maxima, length - count)[length - count]
    return bound


def _nucleus(weights: Floats | Doubles, top_p: float) -> NDArray[np.bool_]:
    """Which are kept: those before which, by falling weight, less than `top_p` of all weight comes."""
    total = float(weights.sum(dtype=np.float64))
    mass = top_p * total
    # So many weights below this cannot make up what may be cut off: all of them are cut off.
    floor = (total - mass) / weights.size * (1 - 1e-6)
    falling = np.sort(weights[weights >= floor])[::-1]
    count = min(int(np.searchsorted(np.cumsum(falling, dtype=np.float64), mass)) + 1, falling.size)
    last = falling[count - 1]
    keep: NDArray[np.bool_] = weights >= last
    surplus = np.count_nonzero(keep) - count
    if surplus > 0:
        keep[np.flatnonzero(weights == last)[-surplus:]] = False
    return keep


def _position(weights: Floats | Doubles, noise: float) -> int:
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
