"""Tools as chat completions and responses both offer them, and how hard the model is asked to think.

It knows neither API's form of a body.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Annotated, Any, Literal

from msgspec import Meta, Struct

from moesaic.server.conversation import Tool, ToolChoice
from moesaic.server.errors import ApiError
from moesaic.server.state import Chat

__all__ = ["Effort", "FunctionName", "FunctionTool", "check_tools", "make_tools", "template_arguments"]

Effort = Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"]
FunctionName = Annotated[str, Meta(min_length=1, max_length=64, pattern="^[a-zA-Z0-9_-]+$")]
_NAME = re.compile(r"[a-zA-Z0-9_-]{1,64}")


class FunctionTool(Struct, kw_only=True):
    """A function that the model may call; `parameters` is a JSON schema."""

    name: FunctionName
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


def make_tools(functions: Iterable[FunctionTool], where: str = "tools") -> tuple[Tool, ...]:
    """The tools of a body.

    Raises:
        ApiError: a name is none, or used twice.
    """
    made: dict[str, Tool] = {}
    for each in functions:
        if _NAME.fullmatch(each.name) is None:  # the pattern of the type lets a line break at the end pass
            raise ApiError(400, f"{where}: a name has other characters than letters, digits, _ and -.", param=where)
        if each.name in made:
            raise ApiError(400, f"{where}: two functions are called {each.name!r}.", param=where)
        made[each.name] = Tool(each.name, each.description or "", each.parameters or {}, bool(each.strict))
    return tuple(made.values())


def check_tools(chat: Chat, tools: Sequence[Tool], choice: ToolChoice) -> None:
    """Refuse what cannot be done with these tools and this model.

    Raises:
        ApiError: a call is demanded of a tool that is not there, or the model knows no tools.
    """
    if choice.mode == "required" and not tools:
        raise ApiError(400, "tool_choice demands a call, but there are no tools.", param="tool_choice")
    if choice.mode == "named" and choice.name not in [tool.name for tool in tools]:
        raise ApiError(400, f"tool_choice names {choice.name!r}, which is not one of the tools.", param="tool_choice")
    if tools and choice.mode != "none" and not chat.has_tools:
        raise ApiError(400, "this model knows no tools: leave them out.", param="tools", code="unsupported")


def template_arguments(chat: Chat, effort: Effort | None, given: dict[str, Any] | None, where: str) -> dict[str, Any]:
    """Arguments of the chat template: those given, and what an effort means to templates that think or do not.

    Args:
        chat: whose model thinks or does not.
        effort: of thinking; "none" turns it off.
        given: by the request, before all others.
        where: the effort's field in the request.

    Raises:
        ApiError: the model does not think.
    """
    if effort is None:
        return dict(given or {})
    if effort != "none" and not chat.has_reasoning:
        raise ApiError(400, f"{where}: this model does not think.", param=where, code="unsupported")
    thinks = effort != "none"
    made: dict[str, Any] = {"enable_thinking": thinks, "thinking": thinks}
    if thinks:
        made["reasoning_effort"] = effort
    return made | (given or {})
