"""Which decode steps have graphs: the usual sizes get theirs while nobody waits, others when they are first needed.

A graph is for up to so many sequences, a power of two, without uploads or with. A step takes the smallest that is there
and large enough; where none is, one is captured that all expected sequences fit into, so that a crowd waits for one
capture and not for one of every size on the way. This module knows neither what a step launches nor when nobody waits.
"""

from __future__ import annotations

import logging
import time
from collections import Counter
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch

from moesaic.engine.gpu.step_buffers import StepBuffers

__all__ = ["Bucket", "GraphMaker", "StepGraphs"]

_LOG = logging.getLogger("moesaic.gpu")

PATIENCE = 64
"""Steps that do with what there is before everybody waits for a graph that fits better."""


@dataclass(slots=True)
class Bucket:
    """The buffers of decode steps of up to so many sequences, and the graphs that read and write them."""

    buffers: StepBuffers
    out: torch.Tensor  # logits, or what the tail goes on with; all buckets have the same memory
    likeliest: torch.Tensor  # tokens, by the logits; in page-locked memory, as the next
    largest: torch.Tensor  # their logits
    size: int
    graphs: dict[bool, Any] = field(default_factory=dict)  # CUDA graphs: without uploads, and with
    warm: set[bool] = field(default_factory=set)  # what was launched once: all its kernels are loaded

    @property
    def is_ready(self) -> bool:
        """Whether steps can have this size at once."""
        return False in self.graphs


class GraphMaker(Protocol):
    """Launches steps."""

    def new_bucket(self, size: int) -> Bucket:
        """Buffers for steps of up to so many sequences."""
        ...

    def ways(self, size: int) -> tuple[bool, ...]:
        """How steps of a size can run: without uploads, and with."""
        ...

    def warm_up(self, bucket: Bucket, brings: bool) -> None:
        """Launch a step without sequences, without a graph."""
        ...

    def capture(self, bucket: Bucket, brings: bool, pool: Any) -> Any:
        """Capture the same, which was launched before; its memory comes from a pool (a new one if None)."""
        ...


class StepGraphs:
    """The buckets of a runner's decode steps.

    Args:
        maker: launches steps.
        max_batch: most sequences of a step.
        captures: whether there are graphs; otherwise buckets are only buffers.

    Attributes:
        buckets: by the most sequences of their steps.
        expected: sequences that will decode together soon; a hint.
        prepares: whether somebody asks for graphs while nobody waits, so that a step can do without for a while.
    """

    def __init__(self, maker: GraphMaker, max_batch: int, captures: bool) -> None:
        self._maker, self._max_batch, self._captures = maker, max_batch, captures
        self.buckets: dict[int, Bucket] = {}
        self.expected = 0
        self.prepares = False
        self._made_do: Counter[tuple[int, bool]] = Counter()  # steps that would have had this graph if it were there
        self._seconds, self._gives_up = 0.0, False
        self._sizes = sorted({self.size(1 << power) for power in range(max_batch.bit_length() + 1)})

    @property
    def sizes(self) -> list[int]:
        """Of buckets, ascending: a step of fewer sequences is padded."""
        return self._sizes

    def size(self, count: int) -> int:
        """The smallest bucket that holds so many sequences."""
        return min(1 << (count - 1).bit_length(), self._max_batch)

    def has_all(self, count: int) -> bool:
        """Whether steps of `count` sequences have all graphs of the size that fits best, so that none waits for one."""
        size = self.size(count)
        there = self.buckets[size].graphs if size in self.buckets else {}
        return not self._captures or all(brings in there for brings in self._maker.ways(size))

    def bucket(self, count: int) -> Bucket:
        """The one that a step of `count` sequences takes; it is ready."""
        bucket = self.buckets.get(self.size(count))
        if bucket is not None and (bucket.is_ready or not self._captures):  # as nearly always
            return bucket
        bucket = self._bucket(self._choose(count))
        if self._captures:
            self._need(bucket, False)
        return bucket

    def brings(self, bucket: Bucket, at_once: bool) -> bool:
        """Whether a step of this bucket may have uploads.

        They are captured now if they are wanted `at_once`, if nobody prepares them, or if many steps did without.
        """
        if True in bucket.graphs:
            return True
        if True not in self._maker.ways(bucket.size):
            return False
        if self._captures:
            if self.prepares and not at_once and not self._is_worth(bucket.size, True):
                return False
            self._need(bucket, True)
        return True

    def prepare(self, most: int) -> bool:
        """Do a piece of what is left to do until steps of up to `most` sequences have their graphs, smallest first.

        Such a piece is a step that loads kernels, or a capture: what somebody waits for who comes meanwhile.

        Returns:
            Whether there was one.
        """
        self.prepares = True
        if not self._captures or self._gives_up:
            return False
        began = time.perf_counter()
        for brings in (False, True):
            for size in self.sizes:
                if size > self.size(most) or brings not in self._maker.ways(size):
                    continue
                bucket = self.buckets.get(size)
                if bucket is None or brings not in bucket.graphs:
                    self._try(size, brings)
                    self._seconds += time.perf_counter() - began
                    return True
        if self._seconds:
            ready = ", ".join(str(size) for size, bucket in sorted(self.buckets.items()) if bucket.is_ready)
            _LOG.info("decode steps of %s sequences have graphs (%.1f s, while nobody waited)", ready, self._seconds)
            self._seconds = 0.0
        return False

    def _choose(self, count: int) -> int:
        """The size of a step: its own, or a larger one that is there, or one for all who are expected."""
        own = self.size(count)
        if not self._captures:
            return own
        ready = [size for size in self.sizes if size >= own and size in self.buckets and self.buckets[size].is_ready]
        if not ready:
            return self.size(max(count, min(self.expected, self._max_batch)))
        return own if ready[0] != own and self._is_worth(own, False) else ready[0]

    def _is_worth(self, size: int, brings: bool) -> bool:
        """Count a step that could have had a graph, and say whether there were many."""
        self._made_do[size, brings] += 1
        return self._made_do[size, brings] > PATIENCE

    def _need(self, bucket: Bucket, brings: bool) -> None:
        """Have a graph, while somebody waits."""
        began = time.perf_counter()
        while brings not in bucket.graphs:
            self._advance(bucket, brings)
        seconds = time.perf_counter() - began
        if seconds > 0.01 and bucket.size > 1:
            _LOG.info("a decode step of %d sequences waited %.2f s for its graph", bucket.size, seconds)

    def _try(self, size: int, brings: bool) -> None:
        """Go a piece further; without memory for it, it stays undone until somebody needs it."""
        try:
            self._advance(self._bucket(size), brings)
        except torch.cuda.OutOfMemoryError as error:
            self._gives_up = True
            _LOG.warning("graphs of decode steps from %d sequences on are captured when they come: %s", size, error)

    def _advance(self, bucket: Bucket, brings: bool) -> None:
        if brings not in bucket.warm:
            self._maker.warm_up(bucket, brings)
            bucket.warm.add(brings)
            return
        graphs = (graph for each in self.buckets.values() for graph in each.graphs.values())
        shared = next(graphs, None)  # only one of the graphs runs at a time, and none leaves anything behind
        bucket.graphs[brings] = self._maker.capture(bucket, brings, None if shared is None else shared.pool())
        self._made_do.pop((bucket.size, brings), None)

    def _bucket(self, size: int) -> Bucket:
        if size not in self.buckets:
            self.buckets[size] = self._maker.new_bucket(size)
        return self.buckets[size]
