"""The application: operations of all route modules behind one guard, one set of limits and one place for errors.

It knows no API: what there is comes from `routes`.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable, Sequence

import msgspec
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from moesaic.server.access import Access, error_answer, exchange_of
from moesaic.server.availability import check_available
from moesaic.server.errors import ApiError
from moesaic.server.limits import Limited
from moesaic.server.metrics import Metrics
from moesaic.server.openapi import describe
from moesaic.server.operation import Operation, Style
from moesaic.server.options import ServerOptions
from moesaic.server.routes import all_operations
from moesaic.server.security import Gatekeeper
from moesaic.server.state import ServerState

__all__ = ["build_app"]


def build_app(
    state: ServerState | None,
    options: ServerOptions | None = None,
    operations: Sequence[Operation] | None = None,
    metrics: Metrics | None = None,
) -> Starlette:
    """An application.

    Args:
        state: what handlers need; None while a model is being loaded: put it in `app.state.moesaic` later.
        options: how it is guarded.
        operations: instead of all that there are, for tests.
        metrics: that the engine is observed with already.
    """
    options = options or ServerOptions()
    operations = all_operations(options) if operations is None else operations
    metrics = metrics or Metrics()
    app = Starlette(
        routes=[Route(each.path, _endpoint(each), methods=[each.method]) for each in operations],
        middleware=[
            Middleware(Access, style_of=_styles(operations), recorder=metrics),
            Middleware(Gatekeeper, options=options, public=_public(operations)),
            Middleware(Limited, limits=options.limits),
        ],
        exception_handlers={HTTPException: _no_such_route},
    )
    app.router.redirect_slashes = False
    app.state.moesaic = state
    app.state.stopping = False
    app.state.options = options
    app.state.metrics = metrics
    app.state.description = msgspec.json.encode(describe(operations, keyed=bool(options.api_keys)))
    metrics.watch(lambda: None if app.state.moesaic is None else app.state.moesaic.engine)
    return app


def _endpoint(operation: Operation) -> Callable[[Request], Awaitable[Response]]:
    async def endpoint(request: Request) -> Response:
        exchange = exchange_of(request.scope)
        exchange.route, exchange.style, exchange.quiet = operation.path, operation.style, not operation.needs_model
        if operation.needs_model:
            check_available(request.app)
        return await operation.handler(request)

    return endpoint


async def _no_such_route(request: Request, error: Exception) -> Response:
    """What Starlette's router refuses: no such path, or not with this method."""
    assert isinstance(error, HTTPException)
    if error.status_code == 404:
        answer = ApiError(404, "there is nothing at this path.", "not_found_error", code="not_found")
    elif error.status_code == 405:
        answer = ApiError(405, "this path does not take this method.", code="method_not_allowed")
    else:
        answer = ApiError(error.status_code, "the request cannot be answered.")
    response = error_answer(answer, exchange_of(request.scope).style)
    response.headers.update(error.headers or {})
    return response


def _public(operations: Iterable[Operation]) -> list[tuple[str, str]]:
    return [(each.method, each.path) for each in operations if each.public]


def _styles(operations: Iterable[Operation]) -> Callable[[str], Style]:
    """The form of errors at a path: that of the operation there, else of its first segment's first operation."""
    exact: dict[str, Style] = {}
    by_segment: dict[str, Style] = {}
    for each in operations:
        exact.setdefault(each.path, each.style)
        by_segment.setdefault(_first_segment(each.path), each.style)

    def style_of(path: str) -> Style:
        return exact.get(path) or by_segment.get(_first_segment(path)) or "plain"

    return style_of


def _first_segment(path: str) -> str:
    return path.split("/", 2)[1] if path.startswith("/") else ""
