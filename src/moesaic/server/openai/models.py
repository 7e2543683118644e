"""/v1/models: the model that is served, under each of its names."""

from __future__ import annotations

from typing import Literal

import msgspec
from msgspec import Struct
from starlette.requests import Request
from starlette.responses import Response

from moesaic.server.names import require_model
from moesaic.server.operation import Operation
from moesaic.server.state import ServerState, state_of

__all__ = ["OPERATIONS", "Model", "ModelList", "fingerprint", "json_response"]


class Model(Struct, kw_only=True):
    """A model by one of its names; `max_model_len` is vLLM's name for the longest context."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "moesaic"
    root: str
    max_model_len: int


class ModelList(Struct, kw_only=True):
    """All names."""

    object: Literal["list"] = "list"
    data: list[Model]


def json_response(body: Struct, status: int = 200) -> Response:
    """A body as JSON."""
    return Response(msgspec.json.encode(body), status, media_type="application/json")


def fingerprint(state: ServerState) -> str | None:
    """OpenAI's `system_fingerprint`: changes when the model's files do."""
    return f"fp_{state.model.digest[:16]}" if state.model.digest else None


def _model(state: ServerState, name: str) -> Model:
    length = state.model.context_length or state.engine.context_length
    return Model(id=name, created=state.model.created, root=state.model.name, max_model_len=length)


async def list_models(request: Request) -> Response:
    """Every name of the model."""
    state = state_of(request)
    return json_response(ModelList(data=[_model(state, name) for name in (state.model.name, *state.aliases)]))


async def get_model(request: Request) -> Response:
    """One name of the model."""
    state = state_of(request)
    name = request.path_params["model"]
    require_model(state, name)
    return json_response(_model(state, name))


OPERATIONS = (
    Operation("GET", "/v1/models", list_models, "List the models", "openai", response=ModelList),
    Operation("GET", "/v1/models/{model:path}", get_model, "Describe a model", "openai", response=Model),
)
