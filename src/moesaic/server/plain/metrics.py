"""`/metrics` for Prometheus."""

from __future__ import annotations

from prometheus_client import CONTENT_TYPE_LATEST
from starlette.requests import Request
from starlette.responses import Response

from moesaic.server.metrics import Metrics
from moesaic.server.operation import Operation

__all__ = ["OPERATIONS"]


async def _metrics(request: Request) -> Response:
    metrics: Metrics = request.app.state.metrics
    return Response(metrics.text(), media_type=CONTENT_TYPE_LATEST)


OPERATIONS = (
    Operation("GET", "/metrics", _metrics, "Counts and times in Prometheus's format", "plain", needs_model=False),
)
