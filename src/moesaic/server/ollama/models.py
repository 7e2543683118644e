"""Ollama's descriptions: the one model, under each of its names, and the version of the API.

It does not answer anything.
"""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

from starlette.requests import Request
from starlette.responses import Response

import moesaic
from moesaic.server.bodies import read_body
from moesaic.server.errors import ApiError
from moesaic.server.names import require_model
from moesaic.server.ollama.replies import TAG, json_response
from moesaic.server.ollama.schema import (
    Details,
    ModelEntry,
    ModelList,
    RunningEntry,
    RunningList,
    ShowAnswer,
    ShowBody,
    Version,
)
from moesaic.server.operation import Operation
from moesaic.server.state import ModelInfo, ServerState, state_of

__all__ = ["OLLAMA_VERSION", "OPERATIONS", "running", "show", "tags", "version"]

OLLAMA_VERSION = "0.12.11"
"""Whose API this is: clients ask for it and refuse what is older than a feature that they need."""
_FAR = timedelta(days=36500)


async def tags(request: Request) -> Response:
    """`GET /api/tags`."""
    state = state_of(request)
    model, details = state.model, _details(state.model)
    return json_response(
        ModelList(
            [
                ModelEntry(
                    name=name,
                    model=name,
                    modified_at=_time(model),
                    size=model.nbytes,
                    digest=model.digest,
                    details=details,
                )
                for name in _names(state)
            ]
        )
    )


async def running(request: Request) -> Response:
    """`GET /api/ps`."""
    state = state_of(request)
    model = state.model
    name = _names(state)[0]
    entry = RunningEntry(
        name=name,
        model=name,
        size=model.nbytes,
        digest=model.digest,
        details=_details(model),
        expires_at=_time(model, _FAR),
        context_length=state.engine.context_length,
    )
    return json_response(RunningList([entry] if state.engine.status in ("ready", "draining") else []))


async def show(request: Request) -> Response:
    """`POST /api/show`."""
    body = await read_body(request, ShowBody)
    state = state_of(request)
    asked = body.model or body.name
    if not asked:
        raise ApiError(400, "model: expected its name.", param="model")
    require_model(state, asked, TAG)
    model = state.model
    capabilities = ["completion"]
    if state.chat.has_tools:
        capabilities.append("tools")
    if state.chat.has_reasoning:
        capabilities.append("thinking")
    return json_response(
        ShowAnswer(
            modelfile=f"FROM {model.name}\n",
            parameters="",
            template=model.template,
            details=_details(model),
            model_info={
                "general.architecture": model.family,
                "general.basename": model.name,
                "general.parameter_count": model.parameters,
                f"{model.family}.context_length": model.context_length,
            },
            capabilities=capabilities,
            modified_at=_time(model),
        )
    )


async def version(request: Request) -> Response:
    """`GET /api/version`."""
    return json_response(Version(OLLAMA_VERSION, moesaic.__version__))


def _names(state: ServerState) -> list[str]:
    names = dict.fromkeys((state.model.name, *state.aliases))
    return [name if ":" in name.rpartition("/")[2] else name + TAG for name in names]


def _time(model: ModelInfo, later: timedelta = timedelta(0)) -> str:
    return (datetime.fromtimestamp(model.created, UTC) + later).isoformat().replace("+00:00", "Z")


def _details(model: ModelInfo) -> Details:
    return Details(
        format=model.container,
        family=model.family,
        families=[model.family],
        parameter_size=_short(model.parameters),
        quantization_level=model.format,
    )


def _short(count: int) -> str:
    for unit, letter in ((10**12, "T"), (10**9, "B"), (10**6, "M"), (10**3, "K")):
        if count >= unit:
            return f"{count / unit:.1f}{letter}"
    return str(count) if count else ""


OPERATIONS = (
    Operation("GET", "/api/tags", tags, "Names of the model (Ollama)", "ollama", response=ModelList),
    Operation("GET", "/api/ps", running, "The model in memory (Ollama)", "ollama", response=RunningList),
    Operation(
        "POST",
        "/api/show",
        show,
        "What is known of the model (Ollama)",
        "ollama",
        request=ShowBody,
        response=ShowAnswer,
    ),
    Operation(
        "GET", "/api/version", version, "Version of the API (Ollama)", "ollama", response=Version, needs_model=False
    ),
)
