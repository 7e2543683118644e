"""Decode steps: a bucket for each of some batch sizes, whose steps are captured once as a graph and replayed.

The thread that replays a graph answers its requests for routed experts, so that there is no thread besides the kernels'
pool. Without graphs the same is launched anew each time. It chooses neither tokens nor whose turn it is, and
`step_graphs` which sizes have graphs.
"""

from __future__ import annotations

import math
import time
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from moesaic.engine.gpu.hand_off import HandOff
from moesaic.engine.gpu.lending import VramLending
from moesaic.engine.gpu.runner_options import RunnerOptions
from moesaic.engine.gpu.slots import ExpertSlots
from moesaic.engine.gpu.step_buffers import StepBuffers
from moesaic.engine.gpu.step_graphs import Bucket, StepGraphs
from moesaic.engine.gpu.uploads import MissUploads
from moesaic.kernels.triton.argmax import argmax
from moesaic.kvcache.paged import PagedSequence, PoolLayer
from moesaic.kvcache.states import StateLayer
from moesaic.modules.gpu.decoder import GpuDecoder
from moesaic.modules.gpu.step import ExpertPath, GpuStep

__all__ = ["DecodeSteps"]


class DecodeSteps:
    """Decode steps of a runner.

    Args:
        decoder: the model.
        caches: of every layer on the GPU.
        options: of the runner.
        max_blocks: most blocks of a sequence.
        hand_off: by which the CPU is asked for experts.
        slots: routed experts on the GPU.
        uploads: brings misses to the GPU; None: all are the CPU's.
        lending: memory that moves between steps, or None.

    Attributes:
        lending: as given.
        graphs: of the sizes that there are.
        on_launch: called in each step when it is launched, before its requests are served.
    """

    def __init__(
        self,
        decoder: GpuDecoder,
        caches: list[PoolLayer | StateLayer],
        options: RunnerOptions,
        max_blocks: int,
        hand_off: HandOff,
        slots: ExpertSlots,
        uploads: MissUploads | None = None,
        lending: VramLending | None = None,
    ) -> None:
        self._decoder, self._caches, self._options, self._max_blocks = decoder, caches, options, max_blocks
        self._hand_off, self._slots, self._uploads, self.lending = hand_off, slots, uploads, lending
        self.on_launch: Callable[[], None] = lambda: None
        captures = options.graphs and decoder.device.type == "cuda"
        # Weakly: VRAM of a model that nobody has any more is free at once, not when Python looks for cycles.
        self.graphs = StepGraphs(weakref.proxy(self), options.max_batch, captures)
        # What lies beside in a graph, on streams of no priority, gets what this one leaves of the GPU.
        self._captured = torch.cuda.Stream(decoder.device, priority=-1) if captures else None
        self._token_ids = torch.zeros(options.max_batch, dtype=torch.int64)
        self._numbers = self._token_ids.numpy()  # the same memory: numbers of a tensor take longer to write
        width = decoder.vocab_size if decoder.tail is None else decoder.hidden_size
        self._out = torch.zeros(options.max_batch, width, device=decoder.device)
        pinned = decoder.device.type == "cuda"
        self._likeliest = torch.zeros(options.max_batch, dtype=torch.int64, pin_memory=pinned)
        self._largest = torch.zeros(options.max_batch, pin_memory=pinned)
        self._found = self._likeliest.numpy(), self._largest.numpy()  # the same memory
        self._host: torch.Tensor | None = None  # a copy of the result, once somebody has asked for one

    @property
    def buckets(self) -> dict[int, Bucket]:
        """By the most sequences of their steps; without those that are left out, they are made anew."""
        return self.graphs.buckets

    @buckets.setter
    def buckets(self, buckets: dict[int, Bucket]) -> None:
        self.graphs.buckets = buckets

    @property
    def slots(self) -> ExpertSlots:
        """As given. Graphs use what there was when they were captured: others make all `buckets` anew."""
        return self._slots

    @slots.setter
    def slots(self, slots: ExpertSlots) -> None:
        self._slots, self.buckets = slots, {}

    @property
    def uploads(self) -> MissUploads | None:
        """As given; others make all `buckets` anew."""
        return self._uploads

    @uploads.setter
    def uploads(self, uploads: MissUploads | None) -> None:
        self._uploads, self.buckets = uploads, {}

    def run(self, sequences: Sequence[PagedSequence], token_ids: Sequence[int], to_host: bool = False) -> torch.Tensor:
        """Append one token to each of 1 to `max_batch` sequences.

        Args:
            sequences: each of them once.
            token_ids: one for each.
            to_host: bring the result to the CPU.

        Returns:
            float32 `[sequences, vocab_size]`, or `[sequences, hidden_size]` for the decoder's tail; the next call may
            overwrite it.

        Raises:
            GenerationError: the cache is full.
            ExpertTimeoutError: GPU and CPU waited for each other too long. In both cases nothing was appended, but
                sequences with recurrent states were emptied by the latter.
        """
        count = len(sequences)
        bucket, uploads = self._ready(count)
        bucket.buffers.append(sequences)
        try:
            self._numbers[:count] = token_ids
            self._decoder.embed(self._token_ids[:count], bucket.buffers.rows(count))
            self._run(bucket, uploads, count, to_host)
        except BaseException:
            self._hand_off.recover(self.uploads)
            for sequence in sequences:
                sequence.truncate(0 if sequence.is_recurrent else sequence.length - 1)
            raise
        return (self._host if to_host and self._host is not None else self._out)[:count]

    def likeliest(self, count: int) -> list[int]:
        """The likeliest token of each of the last step's `count` sequences, as `ops.likeliest`; without a tail."""
        tokens, values = (found[:count].tolist() for found in self._found)
        return [token if math.isfinite(value) else -1 for token, value in zip(tokens, values, strict=True)]

    @property
    def sizes(self) -> list[int]:
        """Of steps, ascending: one of fewer sequences is padded."""
        return self.graphs.sizes

    def bucket(self, count: int) -> Bucket:
        """The one that a step of `count` sequences takes, with all its graphs, which are captured now if need be."""
        bucket = self.graphs.bucket(count)
        self.graphs.brings(bucket, at_once=True)
        return bucket

    def prepare(self, most: int) -> bool:
        """While nobody waits: a piece of what is to be done before steps of up to `most` sequences can run at once.

        Returns:
            Whether there was one.
        """
        return self.graphs.prepare(min(most, self._options.max_batch))

    def rehearse(self, size: int) -> None:
        """Launch what steps of `size` sequences do. Nobody answers the GPU, so launches must be noted, not done."""
        bucket = self.new_bucket(size)
        for brings in self.ways(size):
            self._compute(bucket, self._graph_path(brings))

    def new_bucket(self, size: int) -> Bucket:
        """As `GraphMaker`, like those that follow."""
        decoder = self._decoder
        buffers = StepBuffers(size, self._max_blocks, decoder.hidden_size, decoder.device)
        return Bucket(buffers, self._out[:size], self._likeliest[:size], self._largest[:size], size)

    def ways(self, size: int) -> tuple[bool, ...]:
        """How steps of a bucket run: without uploads, and with."""
        return (False, True) if self.uploads is not None and self.uploads.takes(size) else (False,)

    def warm_up(self, bucket: Bucket, brings: bool) -> None:
        """Compile and load every kernel of a step, in which all is padding, which chooses no experts."""
        bucket.buffers.append(())
        try:
            self._compute(bucket, self._eager_path(bucket.size, brings))
            if bucket.out.is_cuda:
                torch.cuda.current_stream().synchronize()
            self._hand_off.check()
        except BaseException:
            self._hand_off.recover(self.uploads)
            raise

    def capture(self, bucket: Bucket, brings: bool, pool: Any) -> Any:
        """A CUDA graph; other threads may use the GPU meanwhile."""
        path, graph = self._graph_path(brings), torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=pool, stream=self._captured, capture_error_mode="thread_local"):
            self._compute(bucket, path)
        return graph

    def _ready(self, count: int) -> tuple[Bucket, MissUploads | None]:
        """What a step of `count` sequences runs in, and who brings misses in it; perhaps a graph is captured first."""
        bucket, uploads = self.graphs.bucket(count), self.uploads
        if uploads is None or not self.graphs.brings(bucket, at_once=count == 1 or uploads.fixed is not None):
            return bucket, None
        return bucket, uploads

    def _run(self, bucket: Bucket, uploads: MissUploads | None, count: int, to_host: bool) -> None:
        hand_off, cache, began = self._hand_off, self.slots.cache, time.perf_counter()
        if cache is not None:
            cache.before_step()
        is_quiet = cache is None or not cache.is_busy
        brings = uploads is not None and uploads.before_step(count, is_quiet)
        if not bucket.graphs:
            self.on_launch()
            self._compute(bucket, self._eager_path(count, brings))
            if cache is not None:
                cache.during_step()
        else:
            bucket.graphs[brings].replay()
            if cache is not None:
                cache.during_step()
            self.on_launch()
            hand_off.serve(count, uploads if brings else None)
        if cache is not None and hand_off.server is not None:  # while the GPU computes what follows the last layer
            uses, share = hand_off.server.uses.numpy().view(np.uint32), 0 if uploads is None else uploads.share
            cache.after_step(hand_off.served, uses, count, (bucket.size, share))
        if to_host:
            self._fetch(bucket, count)
        if bucket.out.is_cuda:
            torch.cuda.current_stream().synchronize()
        hand_off.check()
        if uploads is not None:
            uploads.after_step(time.perf_counter() - began, is_quiet)
        if self.lending is not None:
            self.lending.after_step()

    def _fetch(self, bucket: Bucket, count: int) -> None:
        """Begin to copy the result; pages of memory that was never used would take longer than the copy."""
        if self._host is None:
            self._host = torch.zeros(self._out.shape, pin_memory=self._out.is_cuda)
        self._host[:count].copy_(bucket.out[:count], non_blocking=True)

    def _compute(self, bucket: Bucket, path: ExpertPath) -> None:
        """What a graph holds."""
        decoder = self._decoder
        with torch.no_grad():
            bucket.buffers.upload()
            hidden = bucket.buffers.hidden
            normed = decoder.run(hidden, GpuStep(bucket.buffers.input, self._caches, decoder.angles, 1, path))
            if decoder.tail is not None:
                bucket.out.copy_(hidden)
            else:
                argmax(decoder.logits(hidden, normed, bucket.out), bucket.likeliest, bucket.largest)
            self._hand_off.end_step()

    def _eager_path(self, num_tokens: int, brings: bool) -> ExpertPath:
        return self._hand_off.eager_path(self.slots, self.uploads if brings else None, num_tokens)

    def _graph_path(self, brings: bool) -> ExpertPath:
        return self._hand_off.graph_path(self.slots, self.uploads if brings else None)
