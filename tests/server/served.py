"""`moesaic serve` in a process of its own."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import httpx


class Served:
    """A server that was started.

    Attributes:
        url: where it listens.
        log: lines that it wrote so far.
        statuses: that /health had until it was ready, in their order.
    """

    def __init__(self, arguments: list[str], environment: dict[str, str]) -> None:
        command = [sys.executable, "-m", "moesaic.cli.main", "serve", "--port", "0", *arguments]
        kept = {name: value for name, value in os.environ.items() if name != "MOESAIC_API_KEY"}
        self.process = subprocess.Popen(
            command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True, env=kept | environment
        )
        self.log: list[str] = []
        self.statuses: list[str] = []
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        self.url = self._wait_for(r"listening on (http\S+),")

    def _read(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.log.append(line)

    def _wait_for(self, pattern: str, seconds: float = 120.0) -> str:
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            found = re.search(pattern, "".join(self.log))
            if found:
                return found[1]
            assert self.process.poll() is None, "".join(self.log)
            time.sleep(0.02)
        raise AssertionError("".join(self.log))

    def health(self) -> str:
        answer = httpx.get(f"{self.url}/health", timeout=120)  # loading libraries holds the interpreter
        status = str(answer.json()["status"])
        assert answer.status_code == (200 if status == "ok" else 503)
        return status

    def wait_ready(self, seconds: float = 300.0) -> None:
        deadline = time.monotonic() + seconds
        while True:
            self.statuses.append(self.health())
            if self.statuses[-1] == "ok":
                return
            assert time.monotonic() < deadline, "".join(self.log)
            time.sleep(0.05)

    def send(self, number: int) -> None:
        self.process.send_signal(number)

    def end(self, seconds: float = 120.0) -> int:
        """The exit code."""
        code = self.process.wait(seconds)
        self._reader.join(5)
        return code


@contextmanager
def served(*arguments: str, **environment: str) -> Iterator[Served]:
    """`moesaic serve` with these arguments, listening; ended if it still runs."""
    server = Served(list(arguments), environment)
    try:
        yield server
    finally:
        if server.process.poll() is None:
            server.send(signal.SIGTERM)
            server.send(signal.SIGINT)
            try:
                server.end(10)
            except subprocess.TimeoutExpired:
                server.process.kill()
                server.process.wait()
