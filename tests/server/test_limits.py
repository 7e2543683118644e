"""What a request may cost: bodies in all ways of sending them, depth, counts, and how many at a time."""

from __future__ import annotations

import asyncio
import json
import random
import time

import pytest
from tests.server.apps import Connection, call, make_app
from tests.server.fakes import ScriptedEngine

from moesaic.server import limits as limits_module
from moesaic.server.errors import ApiError
from moesaic.server.limits import check_body, check_depth
from moesaic.server.options import Limits, ServerOptions

PATH = "/v1/echo"


def limited(**limits: object) -> ServerOptions:
    return ServerOptions(limits=Limits(**limits))  # type: ignore[arg-type]


def depth_of(value: object) -> int:
    """The oracle: by recursion."""
    if isinstance(value, dict):
        value = list(value.values())
    return 1 + max(map(depth_of, value), default=0) if isinstance(value, list) else 0


def is_depth_allowed(raw: bytes, limit: int) -> bool:
    try:
        check_depth(raw, limit)
    except ApiError as error:
        assert (error.status, error.code) == (400, "too_deep")
        return False
    return True


def random_value(rng: random.Random, room: int) -> object:
    kind = rng.randrange(4 if room else 2)
    if kind == 0:
        return rng.choice(["[[[[", '"]', "\\", '\\"[', "}{", "", "é\n"])
    if kind == 1:
        return rng.choice([1, None, True, -0.5])
    if kind == 2:
        return [random_value(rng, room - 1) for _ in range(rng.randrange(4))]
    return {rng.choice(["[", '"', "\\", "a"]): random_value(rng, room - 1) for _ in range(rng.randrange(4))}


def test_depth_is_that_of_the_value() -> None:
    rng = random.Random(5)
    for _ in range(400):
        value = random_value(rng, 8)
        raw = json.dumps(value, ensure_ascii=bool(rng.randrange(2))).encode()
        for limit in range(1, 9):
            assert is_depth_allowed(raw, limit) is (depth_of(value) <= limit), (raw, limit)


@pytest.mark.parametrize(
    "raw",
    [
        b'"' * 2_000_000,
        b'\\"' * 1_000_000,
        b'"' + b"\\" * 2_000_001,
        b'["' + b'\\"[' * 700_000,
        b"[" * 2_000_000,
        b"[]" * 1_000_000,
        b"[" * 64 + b"{}" * 1_000_000,
        b"]" * 2_000_000,
    ],
)
def test_depth_of_hostile_bytes_takes_no_time(raw: bytes) -> None:
    started = time.perf_counter()
    is_depth_allowed(raw, 64)
    assert time.perf_counter() - started < 2


def test_deep_bodies_are_refused_before_they_are_decoded() -> None:
    for body in (b"[" * 100_000, b"[" * 65 + b"]" * 65, b'{"a":' * 1000 + b"1" + b"}" * 1000):
        answer = call(make_app(), "POST", PATH, content=body)
        assert (answer.status_code, answer.json()["error"]["code"]) == (400, "too_deep")
    assert call(make_app(), "POST", PATH, content=b"[" * 64 + b"]" * 64).status_code == 200


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"messages": [{}] * 5}, "messages"),
        ({"input": ["a"] * 5}, "input"),
        ({"n": 4}, "n"),
        ({"best_of": 4}, "best_of"),
        ({"stop": ["a"] * 3}, "stop"),
        ({"stop": "a" * 11}, "stop"),
        ({"stop_sequences": ["b", "a" * 11]}, "stop_sequences"),
        ({"options": {"stop": ["a" * 11]}}, "options.stop"),
        ({"logit_bias": {str(i): 1 for i in range(4)}}, "logit_bias"),
        ({"tools": [{}] * 3}, "tools"),
        ({"tools": [{"a": "x" * 100}]}, "tools"),
        ({"response_format": {"a": "x" * 100}}, "response_format"),
        ({"format": {"a": "x" * 100}}, "format"),
    ],
)
def test_numbers_of_things(body: dict[str, object], param: str) -> None:
    limits = Limits(messages=4, choices=3, stops=2, stop_characters=10, biases=3, tools=2, schema_bytes=100)
    with pytest.raises(ApiError) as caught:
        check_body(json.dumps(body).encode(), limits)
    assert (caught.value.status, caught.value.param, caught.value.code) == (400, param, "limit_exceeded")


@pytest.mark.parametrize(
    "raw",
    [
        b'{"messages": [{},{},{},{}], "n": 3, "stop": ["aaaaaaaaaa", ""], "tools": [{},{}], "logit_bias": {"1":1}}',
        b'{"n": "4", "stop": 7, "messages": "abcdefgh", "options": [], "logit_bias": [1,2,3,4,5]}',
        b'{"n": null, "stop": null, "input": "aaaaaaaaaaaaaaaaaaaa"}',
        b'{"stop": [1, 2]}',
        b"[1, 2, 3, 4, 5]",
        b"no JSON {",
        b"\xff\xfe",
        b"",
    ],
)
def test_what_is_right_or_for_others_to_refuse_passes(raw: bytes) -> None:
    check_body(raw, Limits(messages=4, choices=3, stops=2, stop_characters=10, biases=3, tools=2, schema_bytes=100))


def test_body_bytes() -> None:
    app = make_app(limited(body_bytes=1000))
    assert call(app, "POST", PATH, content=b"x" * 1000).json() == {"length": 1000}
    answer = call(app, "POST", PATH, content=b"x" * 1001)
    assert (answer.status_code, answer.json()["error"]["type"]) == (413, "request_too_large")
    assert answer.headers["connection"] == "close"
    assert call(app, "POST", "/v1/messages/echo", content=b"x" * 1001).json()["error"]["type"] == "request_too_large"


def test_a_body_without_length_is_cut_off() -> None:
    connection = Connection(PATH)
    for _ in range(30):
        connection.send(b"x" * 100, more=True)
    connection.send(b"")
    asyncio.run(connection.run(make_app(limited(body_bytes=1000))))
    assert connection.status == 413 and connection.headers["connection"] == "close"


def test_a_body_without_end_is_cut_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits_module, "_LINGER_SECONDS", 0.1)

    async def endless() -> Connection:
        connection = Connection(PATH)
        answering = asyncio.create_task(connection.run(make_app(limited(body_bytes=1000))))
        for _ in range(300):
            connection.send(b"x" * 100, more=True)
            await asyncio.sleep(0.01)
            if answering.done():
                break
        assert answering.done()
        return connection

    assert asyncio.run(endless()).status == 413


def test_a_client_that_waits_to_be_told_to_go_on_is_told_at_once() -> None:
    connection = Connection(PATH, {"content-length": "1001", "expect": "100-continue"})
    asyncio.run(connection.run(make_app(limited(body_bytes=1000))))
    assert (connection.status, connection.received) == (413, 0)


def test_a_slow_client_is_given_up() -> None:
    async def slow() -> Connection:
        connection = Connection(PATH)
        app = make_app(limited(body_seconds=0.2))
        answering = asyncio.create_task(connection.run(app))
        for _ in range(50):
            if answering.done():
                break
            connection.send(b"x", more=True)
            await asyncio.sleep(0.02)
        await asyncio.wait_for(answering, 1)
        return connection

    connection = asyncio.run(slow())
    assert (connection.status, connection.headers["connection"]) == (408, "close")


def test_a_client_that_leaves_while_it_sends_gets_nothing() -> None:
    connection = Connection(PATH)
    connection.send(b"x", more=True)
    connection.leave()
    asyncio.run(connection.run(make_app()))
    assert connection.sent == []


def test_headers() -> None:
    headers = {f"x-{number}": "1" for number in range(101)}
    assert call(make_app(), "GET", "/health", headers=headers).status_code == 431


def test_too_many_at_a_time_come_back_later() -> None:
    async def crowd() -> tuple[list[Connection], Connection]:
        app = make_app(limited(requests=2), ScriptedEngine(delay=0.05))
        running = [Connection("/stream"), Connection("/whole")]
        tasks = []
        for connection in running:
            connection.send(b"")
            tasks.append(asyncio.create_task(connection.run(app)))
        await asyncio.sleep(0.02)
        third = Connection("/whole")
        await third.run(app)
        health = Connection("/health", method="GET")
        await health.run(app)
        assert health.status == 200
        await asyncio.gather(*tasks)
        after = Connection("/whole")
        after.send(b"")
        await after.run(app)
        return [*running, after], third

    answered, refused = asyncio.run(crowd())
    assert [each.status for each in answered] == [200, 200, 200]
    assert refused.status == 429 and int(refused.headers["retry-after"]) >= 1


@pytest.mark.parametrize("path", ["/whole", "/stream"])
def test_a_request_whose_client_leaves_is_cancelled(path: str) -> None:
    async def leave() -> tuple[ScriptedEngine, Connection]:
        engine = ScriptedEngine(words=["word"] * 100, delay=0.02)
        app = make_app(limited(requests=1), engine)
        connection = Connection(path)
        connection.send(b"{}")
        answering = asyncio.create_task(connection.run(app))
        await asyncio.sleep(0.1)
        assert engine.cancelled == 0
        connection.leave()
        await asyncio.wait({answering}, timeout=1)
        assert answering.done()
        after = Connection(PATH)
        after.send(b"")
        await after.run(app)
        assert after.status == 200
        return engine, connection

    engine, connection = asyncio.run(leave())
    assert engine.cancelled == 1
    assert (connection.status == 200) == (path == "/stream")
