"""An OpenAPI 3.1 description of operations: types become JSON schemas, errors come with the form of their API.

It knows no operation in particular.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from http import HTTPStatus
from typing import Any

import msgspec

from moesaic import __version__
from moesaic.server.operation import Operation

__all__ = ["describe"]

_PARAMETER = re.compile(r"\{(\w+)(?::\w+)?\}")
_TITLES = {"openai": "OpenAI", "anthropic": "Anthropic", "ollama": "Ollama", "plain": "Server"}
_GUARD_ERRORS = (400, 403, 431, 500)
_BODY_ERRORS = (404, 408, 413, 429)
_STREAMS = {
    "text/event-stream": "Server-sent events, if the request asks for a stream; an error in the middle is an event.",
    "application/x-ndjson": "A JSON object per line, if the answer is streamed; an error in the middle is a line.",
}
_TEXT = {"type": "string"}
_EVENT = {"type": "object", "properties": {"event": _TEXT, "data": _TEXT}, "required": ["data"]}
_MAYBE = {"type": ["string", "null"]}


def _object(**properties: Any) -> dict[str, Any]:
    return {"type": "object", "properties": properties, "required": list(properties)}


_OPENAI_ERROR = _object(error=_object(message=_TEXT, type=_TEXT, param=_MAYBE, code=_MAYBE))
_ERRORS: dict[str, dict[str, Any]] = {
    "openai": _OPENAI_ERROR,
    "plain": _OPENAI_ERROR,
    "anthropic": _object(type={"const": "error"}, error=_object(type=_TEXT, message=_TEXT)),
    "ollama": _object(error=_TEXT),
}


def describe(operations: Sequence[Operation], keyed: bool) -> dict[str, Any]:
    """The description, ready for JSON.

    Args:
        operations: what there is.
        keyed: whether a key is needed for what is not public.
    """
    types = [kind for each in operations for kind in (each.request, each.response) if kind is not None]
    schemas, components = msgspec.json.schema_components(types, ref_template="#/components/schemas/{name}")
    schema_of = dict(zip(map(id, types), schemas, strict=True))
    paths: dict[str, dict[str, Any]] = {}
    for each in operations:
        path = _PARAMETER.sub(r"{\1}", each.path)
        paths.setdefault(path, {})[each.method.lower()] = _describe_one(each, schema_of, keyed)
    return {
        "openapi": "3.1.0",
        "info": {"title": "Moesaic", "version": __version__},
        "paths": paths,
        "components": {
            "schemas": components | {_error_name(style): schema for style, schema in _ERRORS.items()},
            "securitySchemes": {
                "bearer": {"type": "http", "scheme": "bearer"},
                "key": {"type": "apiKey", "in": "header", "name": "x-api-key"},
            },
        },
    }


def _describe_one(operation: Operation, schema_of: dict[int, Any], keyed: bool) -> dict[str, Any]:
    described: dict[str, Any] = {
        "operationId": re.sub(r"\W+", "_", f"{operation.method.lower()}{operation.path}").strip("_"),
        "summary": operation.summary,
        "tags": [_TITLES[operation.style]],
        "responses": _responses(operation, schema_of, keyed),
    }
    names = _PARAMETER.findall(operation.path)
    if names:
        described["parameters"] = [{"name": each, "in": "path", "required": True, "schema": _TEXT} for each in names]
    if operation.request is not None:
        content = {"application/json": {"schema": schema_of[id(operation.request)]}}
        described["requestBody"] = {"required": True, "content": content}
    if keyed and not operation.public:
        described["security"] = [{"bearer": []}, {"key": []}]
    return described


def _responses(operation: Operation, schema_of: dict[int, Any], keyed: bool) -> dict[str, Any]:
    content: dict[str, Any] = {}
    if operation.response is not None:
        content["application/json"] = {"schema": schema_of[id(operation.response)]}
    if operation.stream is not None:
        form = _EVENT if operation.stream == "text/event-stream" else _TEXT
        content[operation.stream] = {"schema": form | {"description": _STREAMS[operation.stream]}}
    if not content:
        content["*/*"] = {}
    found = {str(status): _answer(status, content) for status in operation.statuses}
    errors = [*_GUARD_ERRORS]
    if operation.request is not None:
        errors += _BODY_ERRORS
    elif "{" in operation.path:
        errors.append(404)
    if operation.needs_model:
        errors.append(503)
    if keyed and not operation.public:
        errors.append(401)
    refusal = {"application/json": {"schema": {"$ref": f"#/components/schemas/{_error_name(operation.style)}"}}}
    for status in sorted(errors):
        found.setdefault(str(status), _answer(status, refusal))
    return found


def _answer(status: int, content: dict[str, Any]) -> dict[str, Any]:
    answer: dict[str, Any] = {"description": HTTPStatus(status).phrase, "content": content}
    if status in (429, 503):
        answer["headers"] = {"retry-after": {"schema": {"type": "integer"}, "description": "Seconds."}}
    return answer


def _error_name(style: str) -> str:
    return f"{_TITLES[style]}Error"
