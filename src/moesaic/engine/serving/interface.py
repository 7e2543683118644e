"""What a server sees of an engine, so that servers are tested without a model.

`AsyncEngine` is the one that runs a model. Nothing here knows of HTTP.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from moesaic.engine.serving.outputs import Chunk
from moesaic.engine.serving.params import SamplingParams

__all__ = ["EngineClient", "EngineStats", "EngineStatus"]

EngineStatus = Literal["loading", "ready", "draining", "dead"]


@dataclass(frozen=True, slots=True)
class EngineStats:
    """What an engine does now, and has done since it started.

    Attributes:
        running: requests of which tokens are computed.
        waiting: requests that wait for their first step.
        blocks: of the KV cache.
        blocks_free: neither held by a request nor kept for its contents.
        blocks_cached: held by no request, kept for their contents.
        prompt_tokens: of all requests so far.
        cached_tokens: of those, found in the cache.
        generated_tokens: so far.
        preemptions: requests that had to give their blocks back and be computed anew.
        finished: requests by how they ended.
        expert_hits: see `RequestStats`.
        expert_lookups: see `RequestStats`.
        last_step: seconds since the last step ended; 0 while nothing runs.
    """

    running: int = 0
    waiting: int = 0
    blocks: int = 0
    blocks_free: int = 0
    blocks_cached: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    generated_tokens: int = 0
    preemptions: int = 0
    finished: tuple[tuple[str, int], ...] = ()
    expert_hits: int = 0
    expert_lookups: int = 0
    last_step: float = 0.0


class EngineClient(Protocol):
    """An engine in the same process, from an event loop."""

    @property
    def status(self) -> EngineStatus:
        """Whether requests are taken."""
        ...

    @property
    def error(self) -> str | None:
        """Why it is dead, for the log; never shown to clients."""
        ...

    @property
    def context_length(self) -> int:
        """Most tokens of prompt and answer together."""
        ...

    def generate(
        self, prompt_ids: Sequence[int], params: SamplingParams, *, request_id: str | None = None
    ) -> AsyncIterator[Chunk]:
        """Answer a prompt; closing the iterator cancels the request.

        Raises:
            RequestError: the prompt is empty or too long, or a parameter is wrong (before the first piece).
            OverloadedError: too many requests wait (before the first piece).
            EngineDeadError: the engine has ended, possibly in the middle.
        """
        ...

    def stats(self) -> EngineStats:
        """A snapshot; cheap."""
        ...

    async def drain(self, timeout: float) -> bool:
        """Take no more requests, and wait for those that run; False if some are left after `timeout` seconds."""
        ...

    async def close(self) -> None:
        """Cancel everything and end."""
        ...
