"""Runs the work of a load: reads tensors, packs them, gives the file's pages back, and reports progress.

Jobs run on a few threads in the order given, which should be the order of the file, so that reading is sequential and
the pages in use stay few: a checkpoint tensor is released when the last job that reads it has run. This module does not
know what the tensors mean.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from types import TracebackType

import numpy as np
from tqdm import tqdm

from moesaic.kernels import PackedTensor, SlicedTensor
from moesaic.models import TensorRef
from moesaic.quant import WeightFormat, dequantize, quantize
from moesaic.weights import Checkpoint

__all__ = ["Job", "LoadProgress", "Progress", "pack_matrix", "run_jobs"]

Progress = bool | Callable[[int, int], None]
"""True draws a bar on stderr, the plan's notes above it; False is silent; a function is called with (bytes done, bytes
in all)."""

_REQUANTISE_BYTES = 4 * 1024**2
"""Float32 bytes that exist at a time while a matrix is requantised; enough for every thread to have rows."""


@dataclass(frozen=True, slots=True)
class Job:
    """One piece of a load.

    Attributes:
        sources: names of the checkpoint tensors that are read.
        nbytes: how many bytes of them.
        index: which matrix of the first source, if it is a stack; for the order of reading.
        run: reads and stores.
        requantises: whether it needs memory for floats and for its result; that work runs on all threads of the
            kernels already, so such jobs run one after the other.
    """

    sources: tuple[str, ...]
    nbytes: int
    index: int
    run: Callable[[Checkpoint], None]
    requantises: bool = False

    @staticmethod
    def of(ref: TensorRef, run: Callable[[Checkpoint], None], requantises: bool = False) -> Job:
        """A job that reads one reference."""
        return Job(ref.sources, ref.nbytes, ref.index or 0, run, requantises)


def pack_matrix(ref: TensorRef, checkpoint: Checkpoint, packed: PackedTensor | SlicedTensor, index: int = 0) -> None:
    """Pack one matrix into `packed[index]`; its blocks keep their bits unless the plan wants another format.

    Another form of the blocks is made while they are packed.
    """
    if packed.format.recodes == ref.format.ggml_type:
        packed.pack_(index, ref.read_raw(checkpoint), ref.format)
    else:
        packed.pack_(index, _raw_in_format(ref, checkpoint, packed.format))


def _raw_in_format(ref: TensorRef, checkpoint: Checkpoint, wanted: WeightFormat) -> np.ndarray:
    """Bytes of a matrix in the format wanted, uint8 `[rows, row_bytes]`."""
    raw = ref.read_raw(checkpoint)
    if ref.format == wanted:
        return raw
    rows, cols = raw.shape[0], ref.shape[-1]
    result = np.empty((rows, wanted.row_bytes(cols)), np.uint8)
    step = max(1, _REQUANTISE_BYTES // (4 * cols))
    for start in range(0, rows, step):
        values = dequantize(np.ascontiguousarray(raw[start : start + step]), ref.format, cols)
        result[start : start + step] = quantize(values, wanted)
    return result


class LoadProgress:
    """Progress in bytes of the files read; a context manager.

    Args:
        progress: see `Progress`.
        total: bytes in all.
        description: what is being done, in front of the bar.
    """

    def __init__(self, progress: Progress, total: int, description: str = "Loading") -> None:
        self._done, self._total = 0, total
        self._callback = progress if callable(progress) else None
        self._bar = (
            tqdm(total=total, desc=description, unit="B", unit_scale=True, unit_divisor=1000, dynamic_ncols=True)
            if progress is True
            else None
        )

    def add(self, nbytes: int) -> None:
        """Count bytes that have been read and stored."""
        self._done += nbytes
        if self._bar is not None:
            self._bar.update(nbytes)
        if self._callback is not None:
            self._callback(self._done, self._total)

    def __enter__(self) -> LoadProgress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.close()


def run_jobs(jobs: Sequence[Job], checkpoint: Checkpoint, progress: Progress, num_threads: int) -> None:
    """Run all jobs; the first error stops the load and is raised.

    Args:
        jobs: in the order in which the file should be read.
        checkpoint: what they read.
        progress: see `Progress`.
        num_threads: jobs that run at the same time, at least 1.
    """
    readers = Counter(name for job in jobs for name in job.sources)
    lock = threading.Lock()

    with (
        LoadProgress(progress, sum(job.nbytes for job in jobs)) as report,
        ThreadPoolExecutor(num_threads, thread_name_prefix="moesaic-load") as copying,
        # One thread: every further one would keep its own share of freed memory in the C library's allocator.
        ThreadPoolExecutor(1, thread_name_prefix="moesaic-requantise") as requantising,
    ):

        def run(job: Job) -> None:
            job.run(checkpoint)
            with lock:
                readers.subtract(job.sources)
                for name in job.sources:
                    if readers[name] == 0:
                        checkpoint.release(name)
                report.add(job.nbytes)

        futures = [(requantising if job.requantises else copying).submit(run, job) for job in jobs]
        try:
            for future in futures:
                future.result()
        except BaseException:
            for pool in (copying, requantising):
                pool.shutdown(wait=False, cancel_futures=True)
            raise
