"""Parts of Lark grammars (llguidance's dialect) that several styles of calls share."""

from __future__ import annotations

import json
from typing import Any

from moesaic.server.conversation import Tool

__all__ = ["arguments_schema", "call_object", "json_rule", "quote"]


def quote(text: str) -> str:
    """A Lark string."""
    return json.dumps(text, ensure_ascii=False)


def json_rule(schema: Any) -> str:
    """What stands for JSON of a schema."""
    return f"%json {json.dumps(schema)}"


def arguments_schema(tool: Tool) -> dict[str, Any]:
    """The schema of a tool's arguments: an object in any case.

    What llguidance cannot enforce of it is left out, unless the tool is strict: then the request is refused.
    """
    schema = {**tool.parameters}
    schema.setdefault("type", "object")
    if not tool.strict:
        schema["x-guidance"] = {"lenient": True}
    return schema


def call_object(tool: Tool, arguments_key: str = "arguments") -> str:
    """An object with a tool's name and its arguments, spelt as templates do."""
    name = json.dumps(tool.name)
    head = quote('{"name": ' + name + f', "{arguments_key}": ')
    return f"{head} {json_rule(arguments_schema(tool))} {quote('}')}"
