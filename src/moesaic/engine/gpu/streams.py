"""Work that a GPU does beside its current stream, and points in it that others wait for.

On the CPU everything happens in the order in which it is asked for: there streams and marks have nothing to do, so that
what is written with them runs without a GPU.
"""

from __future__ import annotations

import contextlib
import time

import torch

__all__ = ["Mark", "SideStream"]


class SideStream:
    """An order of its own on a device.

    Args:
        device: a GPU, or the CPU.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def use(self) -> contextlib.AbstractContextManager[object]:
        """What is asked for inside is done here."""
        return contextlib.nullcontext() if self.stream is None else torch.cuda.stream(self.stream)

    def follow(self) -> None:
        """What is asked for here from now on comes after everything in the current stream."""
        if self.stream is not None:
            self.stream.wait_stream(torch.cuda.current_stream(self.device))

    def join(self) -> None:
        """What is asked for in the current stream from now on comes after everything here."""
        if self.stream is not None:
            torch.cuda.current_stream(self.device).wait_stream(self.stream)


class Mark:
    """A point in a stream.

    Args:
        device: as for `SideStream`.
        timed: whether `seconds_since` will be asked.
    """

    def __init__(self, device: torch.device, timed: bool = False) -> None:
        self._device = device
        self._event = torch.cuda.Event(enable_timing=timed) if device.type == "cuda" else None
        self._time = 0.0

    def set(self) -> None:
        """It is here, in the current stream."""
        if self._event is None:
            self._time = time.perf_counter()
        else:
            self._event.record(torch.cuda.current_stream(self._device))

    def wait(self) -> None:
        """What comes next in the current stream waits until the point where it was set last; not at all if never."""
        if self._event is not None:
            torch.cuda.current_stream(self._device).wait_event(self._event)

    def is_passed(self) -> bool:
        """Whether everything before it is done."""
        return self._event is None or bool(self._event.query())

    def synchronize(self) -> None:
        """Let the calling thread wait for it."""
        if self._event is not None:
            self._event.synchronize()

    def seconds_since(self, other: Mark) -> float:
        """Time from another one, both passed."""
        if self._event is None or other._event is None:
            return self._time - other._time
        return float(other._event.elapsed_time(self._event)) / 1e3
