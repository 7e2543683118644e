"""Routes, health, and what clients and the log get when something fails."""

from __future__ import annotations

import logging
import re

import msgspec
import pytest
from starlette.requests import Request
from starlette.responses import Response
from tests.server.apps import call, make_app, post
from tests.server.fakes import ScriptedEngine

from moesaic.errors import EngineDeadError, OverloadedError, RequestError
from moesaic.server.app import build_app
from moesaic.server.errors import ApiError


def test_health_follows_the_engine() -> None:
    engine = ScriptedEngine()
    app = make_app(engine=engine)
    answer = call(app, "GET", "/health")
    assert (answer.status_code, answer.json()) == (200, {"status": "ok"})
    for status in ("loading", "draining", "dead"):
        engine.status = status
        answer = call(app, "GET", "/health")
        assert (answer.status_code, answer.json()) == (503, {"status": status})


def test_nothing_is_answered_before_a_model_is_there() -> None:
    app = build_app(None)
    assert call(app, "GET", "/health").json() == {"status": "loading"}
    assert call(app, "GET", "/version").status_code == 200
    assert "moesaic_engine_ready 0.0" in call(app, "GET", "/metrics").text


def test_the_home_page_is_there_for_browsers_and_clients_of_ollama() -> None:
    app = build_app(None)  # `ollama` asks for HEAD / before anything else, and gives up where that is no 200
    answer = call(app, "GET", "/")
    assert (answer.status_code, answer.headers["content-type"]) == (200, "text/plain; charset=utf-8")
    assert answer.text.startswith("Moesaic is running.")
    head = call(app, "HEAD", "/")
    assert (head.status_code, head.text) == (200, "")


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        (b"", "it ends too early"),
        (b"x", "invalid character at byte 0"),
        (b'{"model": "demo",}', "trailing comma in object at byte 17"),
        (b'{"temperature": NaN}', "invalid character at byte 16"),
        (b'{"model": "\xff"}', "a text is not UTF-8"),
        (b'{"a": "\\ud800"}', "half a surrogate pair"),
    ],
)
def test_a_body_that_is_no_json_is_told_where(body: bytes, reason: str) -> None:
    app = build_app(make_app().state.moesaic)
    answer = call(app, "POST", "/v1/chat/completions", content=body)
    assert answer.status_code == 400
    message = answer.json()["error"]["message"]
    assert message.startswith("the body is not valid JSON: ") and reason in message


@pytest.mark.parametrize(("status", "code"), [("loading", "model_loading"), ("dead", "engine_unavailable")])
def test_requests_are_refused_while_no_model_is_ready(status: str, code: str) -> None:
    answer = call(make_app(engine=ScriptedEngine(status=status)), "POST", "/v1/echo")  # type: ignore[arg-type]
    assert answer.status_code == 503
    assert answer.json()["error"]["code"] == code
    assert int(answer.headers["retry-after"]) >= 1


def test_no_requests_are_taken_while_the_server_stops() -> None:
    app = make_app()
    app.state.stopping = True
    assert call(app, "POST", "/v1/echo").json()["error"]["code"] == "shutting_down"
    assert call(app, "GET", "/health").json() == {"status": "draining"}


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("/v1/nothing", {"error": {"message": "M", "type": "not_found_error", "param": None, "code": "not_found"}}),
        ("/v1/messages/echo", {"type": "error", "error": {"type": "invalid_request_error", "message": "M"}}),
        ("/api/nothing", {"error": "M"}),
    ],
)
def test_unknown_paths_and_methods_get_errors_in_the_form_of_their_api(path: str, expected: object) -> None:
    answer = call(make_app(), "DELETE" if path == "/v1/messages/echo" else "POST", path)
    assert answer.status_code == (405 if path == "/v1/messages/echo" else 404)
    text = msgspec.json.encode(expected).decode().replace('"M"', '"[a-z ]+[.]"').replace("{", "[{]")
    assert re.fullmatch(text, answer.text)
    assert ("allow" in answer.headers) == (answer.status_code == 405)


def test_a_slash_too_many_is_no_redirect() -> None:
    assert call(make_app(), "POST", "/v1/echo/").status_code == 404


@pytest.mark.parametrize("path", ["/broken", "/v1/messages/broken"])
def test_what_a_library_raises_stays_in_the_log(path: str, caplog: pytest.LogCaptureFixture) -> None:
    answer = call(make_app(), "POST", path)
    assert answer.status_code == 500
    assert "secret" not in answer.text and "ValueError" not in answer.text
    number = re.search(r"[0-9a-f]{16}", answer.json()["error"]["message"])
    assert number
    [record] = [each for each in caplog.records if number[0] in each.getMessage()]
    assert record.exc_info and "secret of a library" in str(record.exc_info[1])


@pytest.mark.parametrize(
    ("error", "status", "words"),
    [
        (ApiError(418, "teapot", code="t"), 418, "teapot"),
        (RequestError("n is 0", "n"), 400, "n is 0"),
        (OverloadedError("9 wait", 3.2), 429, "9 wait"),
        (EngineDeadError("CUDA secret"), 503, "not available"),
        (msgspec.ValidationError("Expected `int`"), 400, "Expected `int`"),
    ],
)
def test_errors_of_ours_become_answers(error: Exception, status: int, words: str) -> None:
    async def fails(request: Request) -> Response:
        raise error

    answer = call(make_app(operations=[post("/fails", fails)]), "POST", "/fails")
    assert answer.status_code == status
    assert words in answer.json()["error"]["message"] and "secret" not in answer.text
    assert answer.headers.get("retry-after") == ("4" if status == 429 else None)


def test_request_ids() -> None:
    app = make_app()
    assert call(app, "GET", "/health", headers={"x-request-id": "mine-1"}).headers["x-request-id"] == "mine-1"
    for bad in ("a" * 65, "two words", "{}", ""):
        assert re.fullmatch(
            "req_[0-9a-f]{24}", call(app, "GET", "/health", headers={"x-request-id": bad}).headers["x-request-id"]
        )
    answer = call(app, "POST", "/v1/messages/echo", headers={"x-request-id": "mine-2"})
    assert answer.headers["request-id"] == "mine-2"


def test_the_access_log_has_no_contents(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "moesaic.server")
    call(
        make_app(),
        "POST",
        "/v1/echo?key=SECRET",
        content=b'{"a": "SECRET"}',
        headers={"x-api-key": "SECRET"},
    )
    call(make_app(), "GET", "/x%0aSECOND LINE")
    call(make_app(), "GET", "/health")  # asked for again and again
    lines = [record.getMessage() for record in caplog.records if record.name == "moesaic.server"]
    assert len(lines) == 2
    assert re.fullmatch(r"127\.0\.0\.1 POST /v1/echo 200 0\.\d+s req_\w+", lines[0])
    assert "\n" not in lines[1] and r"\nSECOND" in lines[1]
