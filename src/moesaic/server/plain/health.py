"""`/health`, for load balancers and people who wait, and `/version`."""

from __future__ import annotations

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from moesaic import __version__
from moesaic.server.availability import Availability, availability
from moesaic.server.operation import Operation

__all__ = ["OPERATIONS", "Health", "Version"]


class Health(msgspec.Struct, frozen=True):
    """Whether requests are taken: "ok" with status 200, everything else with 503."""

    status: Availability


class Version(msgspec.Struct, frozen=True):
    """Of Moesaic."""

    version: str


async def _health(request: Request) -> Response:
    now = availability(request.app)
    headers = {"content-type": "application/json", "cache-control": "no-store"}
    return Response(msgspec.json.encode(Health(now)), 200 if now == "ok" else 503, headers)


async def _version(request: Request) -> Response:
    return Response(msgspec.json.encode(Version(__version__)), media_type="application/json")


OPERATIONS = (
    Operation(
        "GET",
        "/health",
        _health,
        "Whether a model is ready to answer",
        "plain",
        response=Health,
        public=True,
        needs_model=False,
        statuses=(200, 503),
    ),
    Operation("GET", "/version", _version, "Version of the server", "plain", response=Version, needs_model=False),
)
