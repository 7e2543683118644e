"""Who gets in: keys in both header styles, names in Host, pages in Origin."""

from __future__ import annotations

import asyncio

import pytest
from starlette.datastructures import Headers
from tests.server.apps import Connection, call, make_app

from moesaic.errors import ConfigError
from moesaic.server.errors import ApiError
from moesaic.server.options import ServerOptions, is_loopback
from moesaic.server.security import authorise

KEYS = ("right-key", "another-right-key")
OPEN = "0.0.0.0"


def allowed(headers: list[tuple[str, str]], keys: tuple[str, ...] = KEYS) -> bool:
    try:
        authorise(Headers(raw=[(name.encode(), value.encode("latin-1")) for name, value in headers]), keys)
    except ApiError as error:
        assert error.status == 401
        assert not any(key in error.message for key in keys)
        return False
    return True


@pytest.mark.parametrize(
    ("headers", "expected"),
    [
        ([], False),
        ([("authorization", "Bearer right-key")], True),
        ([("authorization", "bearer  another-right-key ")], True),
        ([("x-api-key", "right-key")], True),
        ([("x-api-key", "wrong"), ("authorization", "Bearer right-key")], True),
        ([("authorization", "Bearer wrong")], False),
        ([("authorization", "Bearer right-key2")], False),
        ([("authorization", "Bearer right-ke")], False),
        ([("authorization", "Basic right-key")], False),
        ([("authorization", "right-key")], False),
        ([("authorization", "Bearer")], False),
        ([("authorization", "Bearer ")], False),
        ([("x-api-key", "")], False),
        ([("x-api-key", "right-key\xff")], False),
        ([("x-api-key", "right-key,another-right-key")], False),
        ([("cookie", "x-api-key=right-key")], False),
    ],
)
def test_keys(headers: list[tuple[str, str]], expected: bool) -> None:
    assert allowed(headers) is expected


def test_without_keys_nobody_is_asked_for_one() -> None:
    assert allowed([], ())


def test_everything_but_public_operations_needs_a_key() -> None:
    app = make_app(ServerOptions(api_keys=KEYS))
    assert call(app, "GET", "/health").status_code == 200
    assert call(app, "HEAD", "/health").status_code == 200
    paths = (
        "/metrics",
        "/version",
        "/v1/echo",
        "/nowhere",
        "/health/",
        "//health",
        "/HEALTH",
        "/health/../metrics",
    )
    for method in ("GET", "POST", "PUT", "OPTIONS"):
        for path in paths:
            answer = call(app, method, path)
            assert answer.status_code == 401, (method, path)
            assert answer.headers["www-authenticate"] == "Bearer"
    assert call(app, "POST", "/health").status_code == 401
    assert call(app, "GET", "/metrics", headers={"x-api-key": "right-key"}).status_code == 200


def test_refusals_have_the_form_of_the_api() -> None:
    app = make_app(ServerOptions(api_keys=KEYS))
    assert call(app, "POST", "/v1/messages/echo").json()["error"]["type"] == "authentication_error"
    assert call(app, "POST", "/v1/echo").json()["error"]["code"] == "invalid_api_key"
    assert call(app, "POST", "/api/echo").json()["error"].startswith("the API key")


def test_metrics_may_be_public() -> None:
    app = make_app(ServerOptions(api_keys=KEYS, public_metrics=True))
    assert call(app, "GET", "/metrics").status_code == 200
    assert call(app, "GET", "/version").status_code == 401


@pytest.mark.parametrize(
    ("bound", "names", "host", "status"),
    [
        ("127.0.0.1", (), "localhost", 200),
        ("127.0.0.1", (), "LOCALHOST:8671", 200),
        ("127.0.0.1", (), "127.0.0.1:1", 200),
        ("127.0.0.1", (), "[::1]:8671", 200),
        ("::1", (), "127.9.9.9", 200),
        ("127.0.0.1", (), "attacker.example", 403),
        ("127.0.0.1", (), "attacker.example:8671", 403),
        ("127.0.0.1", (), "localhost.attacker.example", 403),
        ("127.0.0.1", (), "192.168.0.9", 403),
        ("127.0.0.1", (), "127.0.0.1.attacker.example", 403),
        ("127.0.0.1", (), "localhost@attacker.example", 403),
        ("127.0.0.1", (), "attacker.example@localhost", 403),
        ("127.0.0.1", (), "localhost, attacker.example", 403),
        ("127.0.0.1", (), "::1", 403),
        ("127.0.0.1", (), "[attacker.example]", 403),
        ("127.0.0.1", (), "", 400),
        ("127.0.0.1", ("box.lan",), "Box.lan:80", 200),
        ("127.0.0.1", ("box.lan",), "localhost", 200),
        ("127.0.0.1", ("box.lan",), "other.lan", 403),
        ("127.0.0.1", ("*",), "attacker.example", 200),
        (OPEN, (), "any.example", 200),
        (OPEN, ("box.lan",), "any.example", 403),
        (OPEN, ("box.lan",), "box.lan", 200),
        (OPEN, ("box.lan",), "10.0.0.7:8671", 200),
        (OPEN, ("box.lan",), "[fe80::1]", 200),
    ],
)
def test_host(bound: str, names: tuple[str, ...], host: str, status: int) -> None:
    app = make_app(ServerOptions(host=bound, allow_hosts=names, api_keys=KEYS if bound == OPEN else ()))
    assert call(app, "GET", "/health", headers={"host": host}).status_code == status


def test_two_or_no_host_headers_are_refused() -> None:
    for extra in ([], [(b"host", b"localhost"), (b"host", b"attacker.example")]):
        connection = Connection("/health", method="GET")
        connection.scope["headers"] = extra
        asyncio.run(connection.run(make_app()))
        assert connection.status == 400


@pytest.mark.parametrize(
    ("allowed_origins", "origin", "status"),
    [
        ((), None, 200),
        ((), "https://attacker.example", 403),
        ((), "null", 403),
        ((), "http://127.0.0.1:8671", 200),
        ((), "http://127.0.0.1:3000", 403),
        ((), "http://localhost:8671", 403),
        (("https://chat.example",), "https://chat.example", 200),
        (("https://chat.example",), "http://chat.example", 403),
        (("https://chat.example",), "https://chat.example.attacker.example", 403),
        (("*",), "https://anything.example", 200),
        (("*",), "null", 403),
        (("null",), "null", 200),
    ],
)
def test_origin(allowed_origins: tuple[str, ...], origin: str | None, status: int) -> None:
    app = make_app(ServerOptions(allow_origins=allowed_origins))
    headers = {} if origin is None else {"origin": origin}
    answer = call(app, "POST", "/v1/echo", headers=headers)
    assert answer.status_code == status
    named = status == 200 and origin is not None and not origin.startswith("http://127")
    assert answer.headers.get("access-control-allow-origin") == (origin if named else None)
    assert "access-control-allow-credentials" not in answer.headers


def test_browsers_may_ask_first() -> None:
    app = make_app(ServerOptions(allow_origins=("https://chat.example",), api_keys=KEYS))
    headers = {
        "origin": "https://chat.example",
        "access-control-request-method": "POST",
        "access-control-request-headers": "authorization,content-type",
        "access-control-request-private-network": "true",
    }
    answer = call(app, "OPTIONS", "/v1/echo", headers=headers)
    assert answer.status_code == 204 and not answer.content
    assert answer.headers["access-control-allow-origin"] == "https://chat.example"
    assert answer.headers["access-control-allow-methods"] == "GET, POST"
    assert answer.headers["access-control-allow-headers"] == "authorization,content-type"
    assert answer.headers["access-control-allow-private-network"] == "true"
    assert answer.headers["vary"] == "Origin"
    assert call(app, "OPTIONS", "/v1/echo", headers=headers | {"origin": "https://b.example"}).status_code == 403
    refused = call(app, "POST", "/v1/echo", headers={"origin": "https://chat.example"})
    assert refused.status_code == 401
    assert refused.headers["access-control-allow-origin"] == "https://chat.example"  # so that the page can read why


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.0.9", "box.lan", ""])
def test_other_addresses_than_loopback_need_a_key(host: str) -> None:
    with pytest.raises(ConfigError, match=r"--api-key, --api-key-file or MOESAIC_API_KEY"):
        ServerOptions(host=host)
    assert ServerOptions(host=host, api_keys=KEYS).host == host


@pytest.mark.parametrize("host", ["127.0.0.1", "127.3.2.1", "::1", "localhost"])
def test_loopback_needs_none(host: str) -> None:
    assert is_loopback(host) and ServerOptions(host=host).api_keys == ()


@pytest.mark.parametrize(
    ("bad", "words"),
    [
        ({"port": 65536}, "port 65536"),
        ({"api_keys": ("short",)}, "8 to 512 printable"),
        ({"api_keys": ("with a space",)}, "8 to 512 printable"),
        ({"allow_hosts": ("box.lan:80",)}, "without a port"),
        ({"allow_origins": ("chat.example",)}, "allowed origin 'chat.example'"),
        ({"allow_origins": ("https://chat.example/",)}, "expected a form like"),
    ],
)
def test_wrong_options_are_refused(bad: dict[str, object], words: str) -> None:
    with pytest.raises(ConfigError, match=words) as caught:
        ServerOptions(**bad)  # type: ignore[arg-type]
    assert "with a space" not in str(caught.value)


def test_keys_are_not_shown() -> None:
    assert "right-key" not in repr(ServerOptions(api_keys=KEYS))
