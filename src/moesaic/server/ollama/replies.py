"""What all of Ollama's routes answer with, and whether there is anything to answer with."""

from __future__ import annotations

from typing import Any

import msgspec
from starlette.responses import Response

from moesaic.errors import EngineDeadError
from moesaic.server.names import require_model
from moesaic.server.state import ServerState

__all__ = ["TAG", "json_response", "require_ready"]

TAG = ":latest"
"""An ending of names that makes no difference."""


def require_ready(state: ServerState, name: str) -> None:
    """Refuse another model's name, and everything once the engine is gone.

    Raises:
        ApiError: 404 naming the model that there is.
        EngineDeadError: the engine has ended.
    """
    require_model(state, name, TAG)
    if state.engine.status == "dead":
        raise EngineDeadError("the engine has ended")


def json_response(value: Any) -> Response:
    """A msgspec object as JSON."""
    return Response(msgspec.json.encode(value), media_type="application/json")
