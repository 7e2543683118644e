"""How large a piece of a prompt may be, so that those who wait for their next token hardly notice it.

A step of the engine decodes, and may bring prompts some layers further. Both are measured. What prompts get of a step
follows from the median time that decoding takes, and from what it took while no prompt came: a prompt slows the others'
steps down too, by what it displaces from caches. It knows times, and neither requests nor models.

What a layer takes need not follow from its tokens: experts are read once for few and for many of them, and launches
take their time. So a chunk is only cut where that makes its layers shorter.
"""

from __future__ import annotations

import math
import statistics
from collections import deque

__all__ = ["Pace"]

MIN_CHUNK = 16
"""Fewest tokens that a chunk is cut down to."""
_WINDOW = 31
_LEAST = 0.25
"""Of what decoding takes, what prompts get at least: they have to end some time."""
_ABOUT = 1.1
"""Times what is allowed, what several layers may take: otherwise much of it would often be left."""
_SAVED = 0.75
"""Of what a layer takes, what at most is left for half the tokens if it pays to cut a chunk."""
_NEARLY = 1.5
"""Times the shortest layer that is known: so long may layers take where cutting does not pay."""
_FAR, _NEAR = 8, 2
"""Times the tokens of a chunk that was measured: so far a straight line through what is known is believed, where layers
are too long in any case, and where they fit."""
_TRIAL = 1.8
"""Times what is allowed, what a layer of twice the tokens may take at worst to be tried, if only one size is known."""


class Pace:
    """Measured times, and what follows from them.

    Args:
        num_layers: of the model.
        max_chunk: most tokens of a chunk.
        slowdown: a step with prefill takes at most about so many times what decoding takes.
    """

    def __init__(self, num_layers: int, max_chunk: int, slowdown: float = 2.0) -> None:
        self._num_layers, self._max_chunk, self._slowdown = num_layers, max_chunk, slowdown
        self._decodes: deque[float] = deque(maxlen=_WINDOW)
        self._alone: dict[
            int, deque[float]
        ] = {}  # of steps without prefill, by the number of sequences, a power of two
        self._bucket = 0  # of the last step
        self._layers: dict[int, tuple[int, float]] = {}  # tokens and seconds of a layer, by the former, a power of two

    @property
    def knows_decoding(self) -> bool:
        """Whether it is known what decoding takes: without that, prompts would get next to nothing."""
        return bool(self._decodes)

    def decoded(self, seconds: float, num_sequences: int = 1, alone: bool = True) -> None:
        """A decode step took so long.

        Args:
            seconds: without sampling.
            num_sequences: that got a token.
            alone: whether no prompt was on its way.
        """
        self._decodes.append(seconds)
        self._bucket = _bucket(num_sequences)
        if alone:
            self._alone.setdefault(self._bucket, deque(maxlen=_WINDOW)).append(seconds)

    def advanced(self, num_tokens: int, num_layers: int, seconds: float) -> None:
        """A chunk of so many tokens went through so many layers.

        What is known of other sizes is from another time, of other lengths perhaps: it changes as this one does, and
        is brought between what this says of them, since a longer chunk takes longer, but no more so than it is longer.
        """
        known, size, each, change = self._layers, _bucket(num_tokens), seconds / num_layers, 1.0
        if size in known:
            tokens, before = known[size]
            expected = before * max(1.0, num_tokens / tokens)
            each = (expected + each) / 2
            change = each / expected if expected > 0 else 1.0
        known[size] = num_tokens, each
        for other, (tokens, before) in known.items():
            low, high = sorted((each, each * tokens / num_tokens))
            known[other] = tokens, each if other == size else min(max(before * change, low), high)

    def chunk(self, anybody_waits: bool) -> int:
        """Most tokens of the next chunk: as many as one layer of it fits into a step, if cutting it makes it fit."""
        if not anybody_waits:
            return self._max_chunk
        allowed, sizes = self._allowed(), [self._max_chunk]
        while sizes[-1] > MIN_CHUNK:
            sizes.append(max(MIN_CHUNK, sizes[-1] // 2))
        fits = next((size for size in sizes if self._line(size, _NEAR) <= allowed), None)
        if fits is not None and len(self._layers) == 1 and self._layer(2 * fits) <= _TRIAL * allowed:
            return min(2 * fits, self._max_chunk)
        if fits is not None or not self._layers:
            return fits or sizes[-1]
        (least, shortest), *others = sorted(self._layers.values())
        halved = ((seconds * _SAVED ** math.log2(tokens / least)) for tokens, seconds in others if tokens >= 2 * least)
        if least <= MIN_CHUNK or shortest > next(halved, float("inf")):  # cutting does not pay
            return next(size for size in sizes if self._line(size, _FAR) <= _NEARLY * shortest or size == sizes[-1])
        return next(size for size in sizes if shortest * size <= allowed * least or size == sizes[-1])

    def layers(self, num_tokens: int, anybody_waits: bool) -> int:
        """Layers that a chunk of so many tokens goes through in the next step."""
        each = self._layer(num_tokens)
        if not anybody_waits or each == 0.0:
            return self._num_layers
        return min(self._num_layers, max(1, int(_ABOUT * self._allowed() / each)))

    def _allowed(self) -> float:
        """Seconds of a step for prefill."""
        if not self._decodes:
            return 0.0
        now = statistics.median(self._decodes)
        usual = min(now, statistics.median(self._alone.get(self._bucket, self._decodes)))
        return max(_LEAST * now, self._slowdown * usual - now)

    def _layer(self, num_tokens: int) -> float:
        """At most so many seconds takes a layer."""
        known = (seconds * max(1.0, num_tokens / tokens) for tokens, seconds in self._layers.values())
        return min(known, default=float("inf"))

    def _line(self, num_tokens: int, far: int) -> float:
        """What a layer takes if that goes on as it does between the shortest and the longest chunk that are known."""
        upper = self._layer(num_tokens)
        if len(self._layers) < 2:
            return upper
        (least, shortest), (most, longest) = min(self._layers.values()), max(self._layers.values())
        if num_tokens > far * most:
            return upper
        return min(upper, shortest + (longest - shortest) * max(0, num_tokens - least) / (most - least))


def _bucket(num_tokens: int) -> int:
    return 1 << (num_tokens - 1).bit_length()
