"""A load over HTTP from a process of its own, as users' programs are.

    python -m moesaic.server.bench.client < task.json > records.json

So a server that is measured shares its interpreter with nobody. Only the process that started it is meant to call it.
"""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from moesaic.engine.serving.bench.drive import Record, run_closed, run_open
from moesaic.engine.serving.bench.load import BenchRequest
from moesaic.errors import MoesaicError
from moesaic.server.bench.http_target import HttpTarget

__all__ = ["ask_from_another_process", "main"]


async def ask_from_another_process(
    url: str,
    requests: Sequence[BenchRequest],
    *,
    users: int | None = None,
    times: Sequence[float] | None = None,
    temperature: float = 0.0,
    seed: int = 0,
) -> list[Record]:
    """Run a closed loop of `users`, or an open loop at `times`; clocks of both processes are the same on one computer.

    Raises:
        MoesaicError: the process failed.
    """
    task = {
        "url": url,
        "requests": [asdict(request) for request in requests],
        "users": users,
        "times": None if times is None else list(times),
        "temperature": temperature,
        "seed": seed,
    }
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "moesaic.server.bench.client",
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
    )
    try:
        out, _ = await process.communicate(json.dumps(task).encode())
    except BaseException:
        process.kill()
        await process.wait()
        raise
    if process.returncode:
        raise MoesaicError(f"the process that asks over HTTP ended with {process.returncode}; see what it wrote above.")
    return [Record(**fields) for fields in json.loads(out)]


async def _ask(task: dict[str, Any]) -> list[Record]:
    requests = [BenchRequest(tuple(each["prompt_ids"]), each["num_tokens"]) for each in task["requests"]]
    async with HttpTarget(task["url"], temperature=task["temperature"], seed=task["seed"]) as target:
        if task["users"] is not None:
            return await run_closed(target, requests, task["users"])
        return await run_open(target, requests, task["times"])


def main() -> None:
    """Read a task, ask, write records."""
    records = asyncio.run(_ask(json.load(sys.stdin)))
    json.dump([asdict(record) for record in records], sys.stdout)


if __name__ == "__main__":
    main()
