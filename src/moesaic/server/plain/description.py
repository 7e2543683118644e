"""`/openapi.json`: what there is, for programs that make clients and tests."""

from __future__ import annotations

from starlette.requests import Request
from starlette.responses import Response

from moesaic.server.operation import Operation

__all__ = ["OPERATIONS"]


async def _description(request: Request) -> Response:
    return Response(request.app.state.description, media_type="application/json")


OPERATIONS = (
    Operation(
        "GET",
        "/openapi.json",
        _description,
        "This description (OpenAPI 3.1)",
        "plain",
        response=dict,
        needs_model=False,
    ),
)
