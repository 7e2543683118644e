"""By which names the model may be asked for."""

from __future__ import annotations

from moesaic.server.errors import ApiError
from moesaic.server.state import ServerState

__all__ = ["require_model"]


def require_model(state: ServerState, name: str, tag: str = "") -> None:
    """Refuse another model's name.

    Args:
        state: of the application.
        name: in the request.
        tag: an ending that makes no difference, such as Ollama's ":latest".

    Raises:
        ApiError: 404 naming the model that there is.
    """
    known = {each.removesuffix(tag) for each in (state.model.name, *state.aliases)}
    if name.removesuffix(tag) not in known:
        message = f"model '{name[:200]}' not found: this server has '{state.model.name}'."
        raise ApiError(404, message, param="model", code="model_not_found")
