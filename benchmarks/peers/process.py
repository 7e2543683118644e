"""Other programs as processes: what goes wrong in one becomes a short text, never an exception of the comparison's.

A worker that is not being measured is stopped (SIGSTOP), so that threads which spin while idle take nothing from the
other program. Only processes that were started here are signalled.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

__all__ = ["Budget", "ToolError", "Worker", "run_json", "run_text"]


class ToolError(Exception):
    """A program is missing, refused or broke; the text is a cell of the table."""


class Budget:
    """Time that may still be spent."""

    def __init__(self, seconds: float | None) -> None:
        self._end = None if seconds is None else time.monotonic() + seconds

    def left(self) -> float:
        """Seconds, negative when it is overdrawn."""
        return 1e9 if self._end is None else self._end - time.monotonic()

    def limit(self, seconds: float) -> float:
        """So long, or what is left; ToolError if that is nothing."""
        if self.left() <= 0:
            raise ToolError("not run: out of time")
        return min(seconds, self.left())


def _last_words(log: Path) -> str:
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines()]
    lines = [line for line in lines if line]
    return lines[-1][-160:] if lines else "no message"


def _ending(code: int, log: Path) -> str:
    how = signal.Signals(-code).name if code < 0 else f"exit {code}"
    return f"crashed: {how} ({_last_words(log)})"


class Worker:
    """A process that holds the experts of one program; see worker.py."""

    def __init__(self, python: str, script: Path) -> None:
        with tempfile.NamedTemporaryFile(prefix="peers-", suffix=".log", delete=False) as log:
            self._log = Path(log.name)
            try:
                self._process = subprocess.Popen(
                    [python, str(script)],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=log,
                    start_new_session=True,
                )
            except OSError as error:
                raise ToolError(f"missing: {Path(python).name}: {error.strerror}") from error

    def ask(self, request: dict[str, Any], timeout: float) -> dict[str, Any]:
        """Answer of the worker; ToolError if it has none."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(request).encode() + b"\n")
            self._process.stdin.flush()
        except BrokenPipeError as error:
            raise ToolError(_ending(self._process.wait(), self._log)) from error
        reply: dict[str, Any] = json.loads(self._read_line(timeout))
        if "error" in reply:
            raise ToolError(" ".join(reply["error"].split())[:200])
        return reply

    def pause(self) -> None:
        """Keep its threads from running."""
        self._signal(signal.SIGSTOP)

    def resume(self) -> None:
        """Let them run again."""
        self._signal(signal.SIGCONT)

    def close(self) -> None:
        """End the process and forget its log."""
        self.resume()
        self._signal(signal.SIGKILL)  # freeing gigabytes in order takes time and serves nothing
        self._process.wait()
        self._log.unlink(missing_ok=True)

    def _read_line(self, timeout: float) -> bytes:
        assert self._process.stdout is not None
        line, end = b"", time.monotonic() + timeout
        while not line.endswith(b"\n"):
            ready, _, _ = select.select([self._process.stdout], [], [], max(0.0, end - time.monotonic()))
            if not ready:
                raise ToolError(f"not run: took more than {timeout:.0f} s")
            part = os.read(self._process.stdout.fileno(), 1 << 16)
            if not part:
                raise ToolError(_ending(self._process.wait(), self._log))
            line += part
        return line

    def _signal(self, number: signal.Signals) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, number)


def run_text(command: list[str], timeout: float) -> str:
    """Standard output of a program; ToolError if it cannot be started, fails or takes too long."""
    with tempfile.NamedTemporaryFile(prefix="peers-", suffix=".log") as log:
        try:
            done = subprocess.run(command, stdout=subprocess.PIPE, stderr=log, timeout=timeout, check=False)
        except OSError as error:
            raise ToolError(f"missing: {Path(command[0]).name}: {error.strerror}") from error
        except subprocess.TimeoutExpired as error:
            raise ToolError(f"not run: took more than {timeout:.0f} s") from error
        if done.returncode:
            raise ToolError(_ending(done.returncode, Path(log.name)))
        return done.stdout.decode(errors="replace")


def run_json(command: list[str], timeout: float) -> Any:
    """The JSON that a program prints, on its last line or as a whole."""
    text = run_text(command, timeout).strip()
    for candidate in (text, text[text.find("[") :], text.rpartition("\n")[2]):
        with contextlib.suppress(ValueError):
            return json.loads(candidate)
    raise ToolError(f"crashed: printed no JSON but {text[-80:]!r}")
