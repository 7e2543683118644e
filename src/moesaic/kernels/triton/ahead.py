"""Kernels that are compiled before they are needed: launches are noted instead of done, and threads compile for them.

Triton's compiler gives Python's lock away for nearly all of its time, so threads compile side by side. What they make
lies in Triton's folder of kernels, for the next start, and in this process: whoever launches a kernel that a thread is
at waits for that thread. A launch that nobody noted compiles as ever. Nothing here knows which kernels there are.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from queue import Empty, SimpleQueue
from typing import Any

from triton.runtime import _async_compile, driver
from triton.runtime.jit import JITFunction

from moesaic.kernels.triton.loading import expected

__all__ = ["KernelsAhead"]

_NICENESS = 5  # of the threads: whoever computes meanwhile comes first
_POLL_SECONDS = 0.1
_ONE_AT_A_TIME = threading.Lock()


class _Ahead:
    """A kernel that a thread compiles; to Triton it looks like the compiled kernel, and waits where that is needed.

    Args:
        compile: makes it.
    """

    def __init__(self, compile: Callable[[], Any]) -> None:
        self.compile, self.future = compile, Future[Any]()

    def run_compiler(self) -> None:
        """In a thread of the pool."""
        try:
            with expected():
                kernel = self.compile()
                _build_launcher(kernel)
            self.future.set_result(kernel)
        except BaseException as error:
            self.future.set_exception(error)

    def result(self) -> Any:
        """The compiled kernel; where a thread failed, who launches it tries again and gets the error."""
        try:
            return self.future.result()
        except Exception:
            return self.compile()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.result(), name)


def _build_launcher(kernel: Any) -> None:
    """Let Triton compile what passes arguments to a kernel: some versions do that in C, and keep it in their folder.

    What goes wrong here goes wrong where the kernel is launched, and is told there.
    """
    with contextlib.suppress(Exception):
        driver.active.launcher_cls(kernel.src, kernel.metadata)


class KernelsAhead:
    """Notes launches and compiles what they need.

    Args:
        num_threads: that compile.

    Attributes:
        num_noted: different kernels so far.
    """

    def __init__(self, num_threads: int) -> None:
        self._kernels: dict[str, _Ahead] = {}
        self._noted: list[tuple[Callable[[Any], None], _Ahead]] = []
        self._queue: SimpleQueue[_Ahead | None] = SimpleQueue()
        self._num_threads = num_threads
        self._threads: list[threading.Thread] = []

    @property
    def num_noted(self) -> int:
        """See the class."""
        return len(self._kernels)

    @property
    def num_failed(self) -> int:
        """Kernels that could not be compiled; who launches one gets the error."""
        done = [each.future for each in self._kernels.values() if each.future.done()]
        return sum(future.cancelled() or future.exception() is not None for future in done)

    @contextlib.contextmanager
    def note(self) -> Iterator[None]:
        """Inside, launches of the calling thread are noted and not done, and what they need begins to be compiled.

        Results of kernels are undefined there, so nothing may depend on them. Other threads launch as ever.
        """
        with _ONE_AT_A_TIME:
            run, thread = JITFunction.run, threading.get_ident()

            def run_or_note(function: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
                is_noted = threading.get_ident() == thread
                return run(function, *args, grid=grid, warmup=warmup or is_noted, **options)

            token = _async_compile.active_mode.set(self)
            JITFunction.run = run_or_note
            try:
                yield
            finally:
                JITFunction.run = run
                _async_compile.active_mode.reset(token)
                self._put_in_place()

    def submit(self, key: str, compile: Callable[[], Any], put: Callable[[Any], None], *_: Any) -> Any:
        """Called by Triton for a launch whose kernel it does not have; see `triton.AsyncCompileMode`.

        Args:
            key: of the kernel in Triton's folder.
            compile: makes the kernel, or reads it from there.
            put: takes the kernel for later launches.
        """
        kernel = self._kernels.get(key)
        if kernel is None:
            kernel = self._kernels[key] = _Ahead(compile)
            self._queue.put(kernel)
            if len(self._threads) < min(self._num_threads, len(self._kernels)):
                self._threads.append(threading.Thread(target=self._work, name="moesaic-compile"))
                self._threads[-1].start()
        put(kernel)
        self._noted.append((put, kernel))
        return kernel

    def wait(self, report: Callable[[int, int], None] = lambda done, total: None) -> None:
        """Wait for all that was noted, failures included.

        Args:
            report: called with (kernels done, kernels in all) now and then.
        """
        wanted = list(self._kernels.values())
        while (done := sum(each.future.done() for each in wanted)) < len(wanted):
            report(done, len(wanted))
            time.sleep(_POLL_SECONDS)
        report(done, len(wanted))
        self._put_in_place()

    def close(self) -> None:
        """Threads end after what they are at; what they have not begun is compiled when it is launched."""
        with contextlib.suppress(Empty):
            while True:
                waiting = self._queue.get_nowait()
                if waiting is not None:
                    waiting.future.cancel()
        for _ in self._threads:
            self._queue.put(None)

    def _put_in_place(self) -> None:
        """Let launches find what is compiled, without detour."""
        waiting = []
        for put, each in self._noted:
            if not each.future.done():
                waiting.append((put, each))
            elif not each.future.cancelled() and each.future.exception() is None:
                put(each.future.result())
        self._noted = waiting

    def _work(self) -> None:
        with contextlib.suppress(OSError, AttributeError):  # a thread has a priority of its own on Linux
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _NICENESS)
        while (kernel := self._queue.get()) is not None and threading.main_thread().is_alive():
            kernel.run_compiler()
