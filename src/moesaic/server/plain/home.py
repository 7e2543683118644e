"""`/`: what a browser shows, and what clients of Ollama ask for (HEAD) before anything else."""

from __future__ import annotations

from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response

from moesaic.server.operation import Operation

__all__ = ["OPERATIONS"]

_TEXT = """\
Moesaic is running.

clients of OpenAI      base URL of this server with /v1
clients of Anthropic   base URL of this server
clients of Ollama      OLLAMA_HOST, this server
everything             /openapi.json
whether it is ready    /health
"""


async def _home(request: Request) -> Response:
    return PlainTextResponse(_TEXT)


OPERATIONS = (Operation("GET", "/", _home, "That this is Moesaic, and where its APIs are", "plain", needs_model=False),)
