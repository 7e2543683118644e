from __future__ import annotations

from typing import Any

import pytest
from tests.server.parsers.cutting import WEATHER

from moesaic.errors import RequestError
from moesaic.server.parsers.values import call_of, load_json, load_prefix, property_schema, renamed, typed_value


@pytest.mark.parametrize(
    ("text", "schema", "value"),
    [
        ("12", {"type": "string"}, "12"),
        ('"12"', {"type": "string"}, '"12"'),
        (" a\n", {"type": "string"}, " a\n"),
        ("12", {"type": "integer"}, 12),
        ("12.0", {"type": "integer"}, 12.0),
        ("12.5", {"type": "integer"}, "12.5"),
        (" 12\n", {"type": "number"}, 12),
        ("true", {"type": "boolean"}, True),
        ("True", {"type": "boolean"}, True),
        ("yes", {"type": "boolean"}, "yes"),
        ("null", {"type": ["integer", "null"]}, None),
        ("None", {"anyOf": [{"type": "integer"}, {"type": "null"}]}, None),
        ("7", {"type": ["string", "integer"]}, 7),
        ("x", {"type": ["string", "integer"]}, "x"),
        ("[1, 2]", {"type": "array"}, [1, 2]),
        ('{"a": [1]}', {"type": "object"}, {"a": [1]}),
        ("{1}", {"type": "object"}, "{1}"),
        ("12", {}, 12),
        ('"a"', {}, '"a"'),
        ("a b", {}, "a b"),
        ("1", {"enum": ["1", "2"]}, "1"),
        ("1", {"enum": [1, 2]}, 1),
        ("NaN", {"type": "number"}, "NaN"),
        ("[" * 100_000, {"type": "array"}, "[" * 100_000),
    ],
)
def test_values_are_typed_by_the_schema(text: str, schema: dict[str, Any], value: Any) -> None:
    result = typed_value(text, schema)
    assert result == value
    assert type(result) is type(value)


def test_schemas_of_properties() -> None:
    assert property_schema(WEATHER, "days") == {"type": "integer"}
    assert property_schema(WEATHER, "other") == {}
    assert property_schema(None, "days") == {}


@pytest.mark.parametrize(
    ("text", "verdict"),
    [
        ('{"a": "b', "incomplete"),
        ('{"a": ', "incomplete"),
        ("[1, ", "incomplete"),
        ("[1 2]", "malformed"),
        ("x", "malformed"),
    ],
)
def test_whether_more_text_may_help(text: str, verdict: str) -> None:
    assert load_prefix(text) == verdict


def test_json_has_nothing_behind_it() -> None:
    assert load_json(' {"a": 1} \n') == ({"a": 1},)
    assert load_json("{} {}") == "malformed"
    assert load_prefix("{} {}") == ({}, 2)


def test_calls_of_objects() -> None:
    call = call_of({"name": "f", "parameters": {"a": "ü"}, "id": "x"})
    assert call is not None
    assert (call.name, call.arguments, call.id) == ("f", '{"a": "ü"}', "x")
    for value in (None, [], {}, {"name": ""}, {"name": "f", "arguments": 1}, {"name": "f", "arguments": "1"}):
        assert call_of(value) is None


def test_renaming_reaches_all_texts_but_words_of_schemas() -> None:
    value = {"type": "object", "properties": {"a": {"type": "string", "enum": ["u", 1, None]}}, "x": [True, {"b": "c"}]}
    assert renamed(value, str.upper) == {
        "type": "object",
        "properties": {"A": {"type": "string", "enum": ["U", 1, None]}},
        "X": [True, {"B": "C"}],
    }
    assert list(renamed({"a": 1, "b": 2}, lambda text: "y")) == ["y", "yx1"]


def test_values_may_not_be_too_deep() -> None:
    value: Any = "a"
    for _ in range(100):
        value = [value]
    with pytest.raises(RequestError, match="deeper than 64"):
        renamed(value, str.upper)
