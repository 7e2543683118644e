"""From MODEL to what handlers need: an engine in a thread of its own, the tokenizer's side, and the model's facts.

Nothing heavy is imported before the thread runs, so that a server listens at once. It knows no routes.
"""

from __future__ import annotations

import asyncio
import gc
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moesaic.engine.serving.interface import EngineClient
from moesaic.errors import EngineDeadError
from moesaic.server.metrics import Metrics
from moesaic.server.state import ModelInfo, ServerState

if TYPE_CHECKING:
    from moesaic.engine.serving.core import Engine
    from moesaic.server.lifecycle import Load

__all__ = ["ModelOptions", "loader"]


@dataclass(frozen=True, slots=True)
class ModelOptions:
    """What is served, and how it is loaded.

    Attributes:
        model: MODEL as given.
        name: by which it is asked for; made from MODEL if None.
        aliases: further names.
        max_waiting: answers that may wait for their first step; the engine's own if None.
        progress: whether a bar is drawn while it loads.
        serving: fields of `ServingOptions`, without those that nobody gave.
    """

    model: str
    name: str | None = None
    aliases: tuple[str, ...] = ()
    max_waiting: int | None = None
    progress: bool = False
    serving: tuple[tuple[str, Any], ...] = ()

    @property
    def served_name(self) -> str:
        """The name that clients ask for: a file's or folder's, or MODEL as it is."""
        if self.name is not None:
            return self.name
        path = Path(self.model).expanduser()
        if not path.exists():
            return self.model
        path = path.resolve()
        return path.stem if path.suffix == ".gguf" else path.name


def loader(options: ModelOptions) -> Load:
    """What `lifecycle` calls to load the model, first and after failures."""

    async def load(metrics: Metrics) -> ServerState:
        from moesaic.engine.serving.async_engine import AsyncEngine

        failures: list[Exception] = []

        def make() -> Engine:
            try:
                return _make_engine(options)
            except Exception as error:
                failures.append(error)
                raise

        make_client = partial(AsyncEngine, make, times=metrics)
        client = make_client() if options.max_waiting is None else make_client(max_waiting=options.max_waiting)
        client.start()
        try:
            engine = await client.wait_ready()
        except EngineDeadError:
            if failures:  # an error of loading says more than that there is no engine
                raise failures[0] from None
            raise
        return await asyncio.to_thread(_make_state, options, client, engine)

    return load


def _make_engine(options: ModelOptions) -> Engine:
    """Load the model; in the engine's thread."""
    from moesaic.engine.serving.start import ServingOptions, make_engine

    gc.collect()  # what is left of an engine that failed: its parts know each other
    return make_engine(options.model, ServingOptions(**dict(options.serving)), options.progress)


def _make_state(options: ModelOptions, client: EngineClient, engine: Engine) -> ServerState:
    from moesaic.server.chat import ChatService

    template, facts = engine.tokenizer.chat_template, engine.facts
    assert facts is not None  # `make_engine` knows them
    model = ModelInfo(
        name=options.served_name,
        created=int(time.time()),
        path=options.model,
        family=facts.family,
        container=facts.container,
        format=facts.format,
        parameters=facts.parameters,
        nbytes=facts.nbytes,
        context_length=engine.context_length,
        template=template if isinstance(template, str) else "",
        digest=facts.digest,
    )
    return ServerState(client, ChatService(client, engine.tokenizer), model, options.aliases)
