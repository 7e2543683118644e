"""Sizes as people write them."""

from __future__ import annotations

import pytest

from moesaic.placement.units import format_bytes, format_gib, parse_bandwidth, parse_size


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("24GiB", 24 * 2**30),
        ("8GB", 8 * 10**9),
        ("7.5G", 15 * 2**29),
        (" 512 mib ", 2**29),
        (".5T", 2**39),
        ("3kb", 3000),
    ],
)
def test_sizes(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "is not a size: expected a number and a unit, such as 24GiB"),
        ("-1GiB", "is not a size"),
        ("1e3GiB", "is not a size"),
        ("GiB", "is not a size"),
        ("24", "has no unit: did you mean 24GiB?"),
        ("24GHz", "unknown unit 'GHz'"),
        ("24Gib/s", "is not a size"),
        ("0.0GiB", "is nothing"),
    ],
)
def test_what_is_no_size(text: str, words: str) -> None:
    with pytest.raises(ValueError, match=r"^'") as caught:
        parse_size(text)
    assert words in str(caught.value)


def test_bandwidths() -> None:
    assert parse_bandwidth("97GB/s") == 97.0
    assert parse_bandwidth("3.35 TB/s") == pytest.approx(3350.0)
    assert parse_bandwidth("1GiB/S") == pytest.approx(1.073741824)
    for text in ("97GB", "fast", "GB/s"):
        with pytest.raises(ValueError, match="expected"):
            parse_bandwidth(text)


def test_sizes_for_people() -> None:
    assert [format_bytes(n) for n in (1023, 1536, 24 * 2**30, 3 * 2**40)] == [
        "1023 B",
        "1.5 KiB",
        "24.0 GiB",
        "3.00 TiB",
    ]
    assert format_gib(2**29) == "0.50 GiB"
