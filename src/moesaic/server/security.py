"""Who may ask: keys, the `Host` that was asked for, and the web page that asks.

Everything is refused that is not allowed: a request needs a key if there are any, whatever its path, unless its
operation is public. `Host` is checked against DNS rebinding (a page whose name suddenly means 127.0.0.1), `Origin`
against pages that use a visitor's browser to reach a server on the visitor's computer. It does not know what is asked.
"""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
import re
from collections.abc import Iterable, Sequence

from starlette.datastructures import Headers
from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send

from moesaic.server.access import exchange_of
from moesaic.server.errors import ApiError
from moesaic.server.options import ServerOptions, is_loopback

__all__ = ["Gatekeeper", "authorise"]

_HEADER_NAMES = re.compile(r"[A-Za-z0-9!#$%&'*+.^_`|~, -]{1,2048}")
_REMEMBER_SECONDS = "600"


def authorise(headers: Headers, keys: Sequence[str]) -> None:
    """Let a request pass that has one of the keys, as `Authorization: Bearer` or as `x-api-key`.

    The time that it takes tells nothing of the keys: digests of equal length are compared, all of them.

    Raises:
        ApiError: 401.
    """
    if not keys:
        return
    shown = list(headers.getlist("x-api-key"))
    for value in headers.getlist("authorization"):
        scheme, _, key = value.partition(" ")
        if scheme.lower() == "bearer":
            shown.append(key.strip())
    right = [_digest(key) for key in keys]
    matches = [hmac.compare_digest(_digest(key), each) for key in shown for each in right]
    if not any(matches):
        raise ApiError(
            401,
            "the API key is missing or wrong: send it as 'Authorization: Bearer KEY' or 'x-api-key: KEY'.",
            "authentication_error",
            code="invalid_api_key",
        )


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()


class Gatekeeper:
    """Middleware that lets pass what may, and answers browsers that ask whether they may (CORS).

    Args:
        app: what follows.
        options: keys, hosts and origins.
        public: method and path of what needs no key; paths are compared as they are.
    """

    def __init__(self, app: ASGIApp, options: ServerOptions, public: Iterable[tuple[str, str]]) -> None:
        self._app = app
        self._options = options
        self._public = frozenset(public)
        self._hosts = frozenset(name.lower() for name in options.allow_hosts)
        self._local = is_loopback(options.host)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Check one request.

        Raises:
            ApiError: 400, 401 or 403.
        """
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        host = self._check_host(headers)
        origin = self._check_origin(headers, host)
        if origin is not None:
            exchange_of(scope).headers += [
                ("access-control-allow-origin", origin),
                ("access-control-expose-headers", "x-request-id, request-id, retry-after"),
                ("vary", "Origin"),
            ]
            if scope["method"] == "OPTIONS" and "access-control-request-method" in headers:
                await _preflight(headers)(scope, receive, send)
                return
        method = "GET" if scope["method"] == "HEAD" else scope["method"]
        if (method, scope["path"]) not in self._public:
            authorise(headers, self._options.api_keys)
        await self._app(scope, receive, send)

    def _check_host(self, headers: Headers) -> str:
        """The `Host` of a request, lower case and with its port."""
        values = headers.getlist("host")
        if len(values) != 1 or not values[0]:
            raise ApiError(400, "expected exactly one Host header.", code="invalid_host")
        host = values[0].lower()
        if not self._is_host_allowed(_without_port(host)):
            raise ApiError(
                403,
                "this server does not answer to the name in the Host header: start it with --allow-host NAME.",
                "permission_error",
                code="host_not_allowed",
            )
        return host

    def _is_host_allowed(self, name: str) -> bool:
        if name in self._hosts or "*" in self._hosts or is_loopback(name):
            return True
        if self._local:
            return False
        return not self._hosts or _is_address(name)  # an address is no name that could come to mean another computer

    def _check_origin(self, headers: Headers, host: str) -> str | None:
        """The page that asks, if it is another one and may; None without a browser or for a page of this server."""
        values = headers.getlist("origin")
        if not values:
            return None
        origin = values[0]
        allowed = self._options.allow_origins
        if len(values) == 1:
            if origin in allowed or ("*" in allowed and origin != "null"):
                return origin
            if origin.lower() in (f"http://{host}", f"https://{host}"):
                return None
        raise ApiError(
            403,
            "web pages of this origin may not use the server: start it with --allow-origin ORIGIN.",
            "permission_error",
            code="origin_not_allowed",
        )


def _without_port(host: str) -> str:
    """The name or address in `host`, in which an IPv6 address has brackets."""
    if host.startswith("["):
        return host[1:].partition("]")[0]
    return host.rpartition(":")[0] if ":" in host else host


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


def _preflight(headers: Headers) -> Response:
    """The answer to a browser that asks before it asks; which page it is has been checked."""
    answer = {"access-control-allow-methods": "GET, POST", "access-control-max-age": _REMEMBER_SECONDS}
    asked = headers.get("access-control-request-headers", "")
    if _HEADER_NAMES.fullmatch(asked):
        answer["access-control-allow-headers"] = asked
    if headers.get("access-control-request-private-network") == "true":
        answer["access-control-allow-private-network"] = "true"
    return Response(status_code=204, headers=answer)
