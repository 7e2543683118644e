"""What HTTP adds to a token: times by hand, and once for real."""

from __future__ import annotations

import asyncio

import pytest

from moesaic.server.bench.latency import Latency, measure_latency
from moesaic.server.bench.raw_client import arrivals_of

HEAD = b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n"


def chunk(token: int) -> bytes:
    data = b'data: {"choices":[{"index":0,"text":" %d"}]}\n\n' % token
    return b"%x\r\n%s\r\n" % (len(data), data)


def test_a_token_comes_with_its_last_byte() -> None:
    third = chunk(12)
    cut = third.index(b"12") + 1  # in the middle of its number
    pieces = [(1.0, HEAD + chunk(10)), (2.0, chunk(11) + third[:cut]), (3.0, third[cut:] + chunk(13)), (4.0, b"0\r\n")]
    assert arrivals_of(pieces) == [(10, 1.0), (11, 2.0), (12, 3.0), (13, 3.0)]


def test_an_answer_that_is_no_success() -> None:
    with pytest.raises(ValueError, match="429"):
        arrivals_of([(1.0, b"HTTP/1.1 429 Too Many Requests\r\n\r\n")])


def test_what_is_added_is_the_difference() -> None:
    row = Latency(4, 10.0, 100, 1.0, 2.0, 4.0, 7.0, 90.0)
    assert (row.added_p50, row.added_p99) == (3.0, 5.0)


def test_a_measurement() -> None:
    row = asyncio.run(asyncio.wait_for(measure_latency(streams=3, step_seconds=0.02, steps=20), 120))
    assert row.streams == 3 and row.step == 20
    assert 3 * 15 <= row.tokens <= 3 * 20
    assert 0 < row.direct_p50 <= row.direct_p99
    assert row.direct_p50 < row.http_p50 <= row.http_p99
    assert row.loop_microseconds > 0
