"""Grammars for whole answers: thoughts stay free, then comes what the request asks for, calls included.

Texts are in llguidance's dialect of Lark. Special tokens are named by their numbers, since a grammar's text never
matches them. It does not compile anything.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from moesaic.engine.serving.params import Grammar
from moesaic.errors import RequestError
from moesaic.server.conversation import ChatRequest, Tool
from moesaic.server.parsers.base import ReasoningStyle, Terminal, ToolStyle
from moesaic.server.parsers.rules import quote

__all__ = ["Thinking", "answer_grammar"]

Thinking = Literal["never", "open", "closed", "maybe"]
"""Where an answer begins: no thoughts, in them, after them, or where the model may begin them."""


def answer_grammar(
    request: ChatRequest,
    style: ToolStyle | None,
    reasoning: ReasoningStyle | None,
    thinking: Thinking,
    special: Mapping[str, int],
) -> Grammar | None:
    """The grammar of a request's answer; None where everything is allowed.

    Args:
        request: says what is asked for.
        style: how calls are written.
        reasoning: how thoughts are marked.
        thinking: where the answer begins.
        special: tokens that text never matches.

    Raises:
        RequestError: calls are to be forced, and this model's style has no grammar.
    """
    wanted = request.params.grammar
    tools = request.tools if request.tool_choice.mode != "none" else ()
    forced = request.tool_choice.mode in ("required", "named")
    if request.tool_choice.mode == "named":
        tools = tuple(tool for tool in tools if tool.name == request.tool_choice.name)
    if not tools or not (forced or wanted or any(tool.strict for tool in tools)):
        if wanted is None or thinking in ("never", "closed"):
            return wanted
        tools = ()

    def terminal(marker: str) -> str:
        return f"<[{special[marker]}]>" if marker in special else quote(marker)

    rules: list[str] = []
    if tools:
        assert style is not None
        free = not forced and wanted is None
        calls = _calls(request, style, tuple(tools), terminal, "opening" if free else terminal(style.start_of_calls()))
        rules.append(calls)
        if free:
            rules.append(f"opening{_until(style.start_of_calls(), special, terminal)}")
        others = "| TEXT" if free else "| wanted" if wanted is not None and not forced else ""
        rules.append(f"body: calls {others}")
    else:
        rules.append("body: wanted")
    if wanted is not None and not forced:
        rules.append(f"wanted: {_embedded(wanted)}")
    if reasoning is not None and thinking in ("open", "maybe"):
        rules.append(f"thoughts{_until(reasoning.closer, special, terminal)}")
        thoughts = (
            "thoughts BLANKS" if thinking == "open" else f"(BLANKS {terminal(reasoning.opener)} thoughts)? BLANKS"
        )
    else:
        thoughts = ""
    head = ["%llguidance {}", f"start: {thoughts} body"]
    ends = [r"TEXT: /(.|\n)*/", r"BLANKS: /[ \t\r\n]{0,8}/"]
    return Grammar("lark", "\n".join([*head, *rules, *ends]) + "\n")


def _calls(request: ChatRequest, style: ToolStyle, tools: tuple[Tool, ...], terminal: Terminal, first: str) -> str:
    calls = style.grammar(tools, request.parallel_tool_calls, terminal, first)
    if calls is None:
        message = f"calls cannot be forced for this model's style of calls ({style.name}): use tool_choice 'auto'."
        raise RequestError(message, "tool_choice")
    return calls


def _until(marker: str, special: Mapping[str, int], terminal: Terminal) -> str:
    """The rest of a rule: any text up to a marker, and the marker."""
    if marker in special:
        return f": TEXT {terminal(marker)}"
    return f"[lazy]: TEXT {quote(marker)}"


def _embedded(grammar: Grammar) -> str:
    """A grammar as a part of one."""
    match grammar.kind:
        case "json_schema":
            return f"%json {grammar.text}"
        case "json_object":
            return '%json {"type": "object"}'
        case "regex":
            return "/" + grammar.text.replace("\n", "\\n").replace("/", "\\/") + "/"
        case "lark":
            return f"%lark {{\n{grammar.text}\n}}"
