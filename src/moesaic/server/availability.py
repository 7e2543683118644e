"""Whether a model is ready to answer, and the refusal while it is not.

The application's `state.moesaic` is None as long as nothing has been loaded; `state.stopping` is set when it ends.
"""

from __future__ import annotations

from typing import Literal

from starlette.applications import Starlette

from moesaic.server.errors import ApiError
from moesaic.server.state import ServerState

__all__ = ["Availability", "availability", "check_available"]

Availability = Literal["ok", "loading", "draining", "dead"]

_MESSAGES: dict[Availability, tuple[str, str, float]] = {
    "loading": ("the model is being loaded: try again in a moment.", "model_loading", 5.0),
    "draining": ("the server is shutting down and takes no more requests.", "shutting_down", 10.0),
    "dead": ("the model is not available at the moment.", "engine_unavailable", 10.0),
}


def availability(app: Starlette) -> Availability:
    """What a request would meet now."""
    if app.state.stopping:
        return "draining"
    state: ServerState | None = app.state.moesaic
    status = "loading" if state is None else state.engine.status
    return "ok" if status == "ready" else status


def check_available(app: Starlette) -> None:
    """Refuse what needs a model while none is ready.

    Raises:
        ApiError: 503, with a time after which to try again.
    """
    now = availability(app)
    if now != "ok":
        message, code, seconds = _MESSAGES[now]
        raise ApiError(503, message, "api_error", code=code, retry_after=seconds)
