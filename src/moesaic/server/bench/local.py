"""A server on a free port of this computer, over an engine of token ids: every token's text is its number.

It is the application and the web server of `moesaic serve`, without loading and without a tokenizer.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import aclosing, asynccontextmanager
from typing import Any, cast

from moesaic.engine.serving.interface import EngineClient
from moesaic.engine.serving.outputs import Chunk
from moesaic.engine.serving.params import SamplingParams
from moesaic.errors import RequestError
from moesaic.server.app import build_app
from moesaic.server.conversation import ChatRequest, Event
from moesaic.server.listening import bind, make_web_server, url_of
from moesaic.server.metrics import Metrics
from moesaic.server.options import ServerOptions
from moesaic.server.state import ModelInfo, ServerState

__all__ = ["IdChat", "local_server"]

_ENDING_SECONDS = 10.0


class IdChat:
    """A `Chat` without a tokenizer: only prompts of token ids are answered.

    Args:
        engine: that answers.
        text_of: text of new tokens; never empty, so that every piece is sent.
    """

    has_reasoning = False
    has_tools = False

    def __init__(self, engine: EngineClient, text_of: Callable[[Sequence[int]], str] | None = None) -> None:
        self._engine, self._text_of = engine, text_of or _numbers

    async def complete(
        self, prompt: str | Sequence[int], params: SamplingParams, request_id: str
    ) -> AsyncIterator[Chunk]:
        """Go on with tokens."""
        if isinstance(prompt, str):
            raise self._no_text()
        stream = cast(Any, self._engine.generate(list(prompt), params, request_id=request_id))
        async with aclosing(stream) as chunks:
            async for chunk in chunks:
                if chunk.token_ids:  # not `replace`, which would cost as much as much of the server
                    text, reason = self._text_of(chunk.token_ids), chunk.finish_reason
                    yield Chunk(chunk.index, text, chunk.token_ids, (), reason, chunk.stop, chunk.stats)
                else:
                    yield chunk

    async def chat(self, request: ChatRequest, request_id: str) -> AsyncIterator[Event]:
        """Refused."""
        raise self._no_text()
        yield  # an iterator, as all chats

    def encode_chat(self, request: ChatRequest) -> list[int]:
        """Refused."""
        raise self._no_text()

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Refused."""
        raise self._no_text()

    def decode(self, ids: Sequence[int]) -> str:
        """Numbers."""
        return self._text_of(ids)

    def token_text(self, token_id: int) -> str:
        """Its number."""
        return self._text_of([token_id])

    @staticmethod
    def _no_text() -> RequestError:
        return RequestError("this model has no tokenizer: expected a prompt of token ids.", "prompt")


@asynccontextmanager
async def local_server(
    engine: EngineClient,
    name: str,
    text_of: Callable[[Sequence[int]], str] | None = None,
    metrics: Metrics | None = None,
) -> AsyncIterator[str]:
    """Serve an engine that is ready; gives the URL.

    Args:
        engine: that answers; it is not closed.
        name: of the model.
        text_of: as for `IdChat`.
        metrics: that the engine tells its times.
    """
    options = ServerOptions(port=0)
    state = ServerState(engine, IdChat(engine, text_of), ModelInfo(name, context_length=engine.context_length))
    listener = bind(options.host, options.port)
    web = make_web_server(build_app(state, options, metrics=metrics), options)
    serving = asyncio.create_task(web.serve(sockets=[listener]))
    try:
        yield url_of(listener)
    finally:
        web.should_exit = True
        await asyncio.wait({serving}, timeout=_ENDING_SECONDS)
        listener.close()


def _numbers(ids: Sequence[int]) -> str:
    return "".join(f" {token}" for token in ids)
