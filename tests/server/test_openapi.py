"""The description, and the server against requests made from it: right ones and wrong ones."""

from __future__ import annotations

from typing import Any

import schemathesis
from hypothesis import HealthCheck, settings
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    allow_header_conformance,
    content_type_conformance,
    negative_data_rejection,
    response_headers_conformance,
    response_schema_conformance,
    status_code_conformance,
    unsupported_method,
)
from tests.server.apps import call, make_app
from tests.server.scripted import scripted_state

from moesaic.server.app import build_app
from moesaic.server.openapi import describe
from moesaic.server.options import ServerOptions
from moesaic.server.routes import all_operations

OPTIONS = ServerOptions(allow_hosts=("testserver",))
APP = build_app(scripted_state()[0], OPTIONS)
CHECKS = [
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_schema_conformance,
    response_headers_conformance,
    negative_data_rejection,
    allow_header_conformance,
    unsupported_method,
]
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
@settings(max_examples=10, deadline=5000, derandomize=True, suppress_health_check=list(HealthCheck))
def test_requests_made_from_the_description(case: schemathesis.Case) -> None:
    is_right = case.meta is not None and case.meta.generation.mode is schemathesis.GenerationMode.POSITIVE
    if is_right and isinstance(case.body, dict) and "model" in case.body:
        case.body["model"] = "demo"  # so that more than the name is looked at
    case.call_and_validate(checks=CHECKS, timeout=10)
