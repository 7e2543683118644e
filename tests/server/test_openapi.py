"""The description, and the server against requests made from it: right ones and wrong ones."""

from __future__ import annotations

from typing import Any

import schemathesis
from hypothesis import HealthCheck, settings
from tests.server.apps import call, make_app, make_state

from moesaic.server.app import all_operations, build_app
from moesaic.server.openapi import describe
from moesaic.server.options import ServerOptions

OPTIONS = ServerOptions(allow_hosts=("testserver",))
APP = build_app(make_state(), OPTIONS)
schema = schemathesis.openapi.from_asgi("/openapi.json", APP)


def test_every_operation_is_described() -> None:
    described = call(APP, "GET", "/openapi.json").json()
    assert described["openapi"] == "3.1.0"
    found = {(method.upper(), path) for path, methods in described["paths"].items() for method in methods}
    expected = {(each.method, each.path.replace(":path", "")) for each in all_operations(OPTIONS)}
    assert found == expected and ("GET", "/health") in found


def references(value: Any) -> set[str]:
    if isinstance(value, dict):
        return {value["$ref"]} if "$ref" in value else set().union(*map(references, value.values()))
    return set().union(*map(references, value)) if isinstance(value, list) else set()


def test_everything_referred_to_is_there() -> None:
    described = call(APP, "GET", "/openapi.json").json()
    names = {f"#/components/schemas/{name}" for name in described["components"]["schemas"]}
    assert references(described) <= names


def test_only_what_needs_a_key_says_so() -> None:
    operations = all_operations(OPTIONS)
    for keyed in (False, True):
        paths = describe(operations, keyed)["paths"]
        assert "security" not in paths["/health"]["get"]
        assert ("security" in paths["/metrics"]["get"]) is keyed
        assert ("401" in paths["/metrics"]["get"]["responses"]) is keyed


def test_the_description_needs_a_key_if_there_is_one() -> None:
    assert call(make_app(ServerOptions(api_keys=("a-long-key",))), "GET", "/openapi.json").status_code == 401


@schema.parametrize()
@settings(max_examples=25, deadline=5000, derandomize=True, suppress_health_check=list(HealthCheck))
def test_requests_made_from_the_description(case: schemathesis.Case) -> None:
    case.call_and_validate(timeout=10)
