"""A client of `/v1/completions` that notes when pieces come: any server that streams as OpenAI's does.

Prompts are token ids, which need no tokenizer. It does not know which server answers.
"""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from types import TracebackType
from typing import Any

import httpx

from moesaic.engine.serving.bench.drive import Piece
from moesaic.engine.serving.bench.load import BenchRequest
from moesaic.errors import ConfigError, MoesaicError

__all__ = ["HttpTarget"]

_CONNECT_SECONDS = 30.0
_SILENT_SECONDS = 600.0
_TEXT_OF_ERROR = 200


class HttpTarget:
    """A `Target` over HTTP; an async context manager.

    Args:
        url: of the server, with or without `/v1`.
        model: name to ask for; the first that `/v1/models` has if None.
        api_key: to show.
        temperature: of sampling.
        seed: of sampling; every request has one of its own that follows from it.
    """

    def __init__(
        self,
        url: str,
        *,
        model: str | None = None,
        api_key: str | None = None,
        temperature: float = 0.0,
        seed: int = 0,
    ) -> None:
        self._url = url.rstrip("/").removesuffix("/v1")
        self._temperature, self._seed, self.model = temperature, seed, model
        headers = {} if api_key is None else {"authorization": f"Bearer {api_key}"}
        self._client = httpx.AsyncClient(
            headers=headers,
            timeout=httpx.Timeout(_SILENT_SECONDS, connect=_CONNECT_SECONDS),
            limits=httpx.Limits(max_connections=None, max_keepalive_connections=None),
            trust_env=False,  # what lies between would be measured too
        )

    async def __aenter__(self) -> HttpTarget:
        if self.model is None:
            self.model = await self._first_model()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._client.aclose()

    async def ask(self, request: BenchRequest) -> AsyncIterator[Piece]:
        """As `Target`. A piece is an event with text: one token of most servers, most of the time."""
        self._seed += 1
        body = {
            "model": self.model,
            "prompt": list(request.prompt_ids),
            "max_tokens": request.num_tokens,
            "temperature": self._temperature,
            "seed": self._seed,
            "ignore_eos": True,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        try:
            async with self._client.stream("POST", f"{self._url}/v1/completions", json=body) as answer:
                if answer.status_code != 200:
                    raise MoesaicError(f"{answer.status_code}: {_reason(await answer.aread())}")
                async for line in answer.aiter_lines():
                    if line.startswith("data:") and line != "data: [DONE]":
                        yield _piece(line.removeprefix("data:"))
        except httpx.HTTPError as error:
            raise MoesaicError(f"{type(error).__name__}: {error}".rstrip(": ")) from error

    async def _first_model(self) -> str:
        url = f"{self._url}/v1/models"
        try:
            answer = await self._client.get(url)
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            raise ConfigError(f"nothing answers at {url}: {error}. Is the server running, and --url right?") from error
        if answer.status_code != 200:
            raise ConfigError(f"{url} answers {answer.status_code}: {_reason(answer.content)}. Is --api-key right?")
        try:
            return str(answer.json()["data"][0]["id"])
        except (ValueError, LookupError, TypeError) as error:
            raise ConfigError(f"{url} does not list a model: name one with --served-name.") from error


def _piece(text: str) -> Piece:
    """One event. An error in it fails the request."""
    try:
        event: Any = json.loads(text)
        if "error" in event:
            raise MoesaicError(f"in the stream: {_reason(text.encode())}")
        usage = event.get("usage") or {}
        details = usage.get("prompt_tokens_details") or {}
        brings = any(choice.get("text") for choice in event.get("choices") or ())
        return Piece(int(brings), (), details.get("cached_tokens"), usage.get("completion_tokens"))
    except (ValueError, AttributeError, TypeError) as error:
        raise MoesaicError(f"an event that is none of OpenAI's: {text[:_TEXT_OF_ERROR]!r}") from error


def _reason(content: bytes) -> str:
    """What an error's body says, on one line."""
    text = content.decode("utf-8", "replace")
    try:
        found = json.loads(text)["error"]
        text = str(found["message"] if isinstance(found, dict) else found)
    except (ValueError, LookupError, TypeError):
        pass
    return " ".join(text.split())[:_TEXT_OF_ERROR]
