"""How large a piece of a prompt may be, so that those who wait for their next token hardly notice it.

A step of the engine decodes, and may bring prompts some layers further. Both are measured. What prompts get of a step
follows from the median time that decoding takes, and from what it took while no prompt came: a prompt slows the others'
steps down too, by what it displaces from caches. It knows times, and neither requests nor models.
"""

from __future__ import annotations

import statistics
from collections import deque

__all__ = ["Pace"]

MIN_CHUNK = 16
"""Fewest tokens that a chunk is cut down to."""
_WINDOW = 31
_LEAST = 0.25
"""Of what decoding takes, what prompts get at least: they have to end some time."""


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
        self._layer_seconds: dict[int, float] = {}  # of a layer, by the chunk's size, a power of two

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

        What is known of other sizes is from another time, of other lengths perhaps: it is brought between what this
        says of them, since a longer chunk takes longer, but no more so than it is longer.
        """
        known, size = self._layer_seconds, _bucket(num_tokens)
        each = seconds / num_layers * size / num_tokens
        each = known[size] = (known.get(size, each) + each) / 2
        for other, before in known.items():
            low, high = sorted((each, each * other / size))
            known[other] = min(max(before, low), high)

    def chunk(self, anybody_waits: bool) -> int:
        """Most tokens of the next chunk: as many as one layer of it fits into a step."""
        if not anybody_waits:
            return self._max_chunk
        size = self._max_chunk
        while size > MIN_CHUNK and self._layer(size) > self._allowed():
            size = max(MIN_CHUNK, size // 2)
        return size

    def layers(self, num_tokens: int, anybody_waits: bool) -> int:
        """Layers that a chunk of so many tokens goes through in the next step."""
        each = self._layer(num_tokens)
        if not anybody_waits or each == 0.0:
            return self._num_layers
        return min(self._num_layers, max(1, int(self._allowed() / each)))

    def _allowed(self) -> float:
        """Seconds of a step for prefill."""
        if not self._decodes:
            return 0.0
        now = statistics.median(self._decodes)
        usual = min(now, statistics.median(self._alone.get(self._bucket, self._decodes)))
        return max(_LEAST * now, self._slowdown * usual - now)

    def _layer(self, num_tokens: int) -> float:
        """At most so many seconds takes a layer."""
        size = _bucket(num_tokens)
        known = (seconds * max(1.0, size / other) for other, seconds in self._layer_seconds.items())
        return min(known, default=float("inf"))


def _bucket(num_tokens: int) -> int:
    return 1 << (num_tokens - 1).bit_length()
