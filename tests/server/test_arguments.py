"""Arguments as objects, also of calls that were cut short."""

from __future__ import annotations

import pytest

from moesaic.server.arguments import arguments_object


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('{"a": [1, "ü"]}', {"a": [1, "ü"]}),
        ("{}", {}),
        ("", {}),
        (" \n", {}),
        ('{"a": 1', {"INVALID_JSON": '{"a": 1'}),
        ("[1]", {"INVALID_JSON": "[1]"}),
        ('"text"', {"INVALID_JSON": '"text"'}),
        ("[" * 100_000, {"INVALID_JSON": "[" * 100_000}),
    ],
    ids=lambda value: value[:20] if isinstance(value, str) else "",
)
def test_arguments(text: str, expected: object) -> None:
    assert arguments_object(text) == expected
