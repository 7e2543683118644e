"""Grammars for whole answers: thoughts stay free, then comes what the request asks for, calls included.

Texts are in llguidance's dialect of Lark. Special tokens are named by their numbers, since a grammar's text never
matches them. It does not compile anything.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Literal

from moesaic.engine.serving.grammar_checks import check_grammar
from moesaic.engine.serving.params import Grammar
from moesaic.errors import RequestError
from moesaic.server.conversation import ChatRequest, Tool
from moesaic.server.parsers.base import ReasoningStyle, Terminal, ToolStyle
from moesaic.server.parsers.rules import json_rule, marker_terminal, until

__all__ = ["Thinking", "answer_grammar"]

Thinking = Literal["never", "open", "closed", "maybe"]
"""Where an answer begins: no thoughts, in them, after them, or where the model may begin them."""

_REGEX_PART = re.compile(r"\\?.", re.DOTALL)


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

    terminal = marker_terminal(special)
    answer = terminal(reasoning.answer) if reasoning is not None and thinking == "maybe" else ""
    rules = _thoughts(reasoning, thinking, terminal)
    if tools:
        assert style is not None
        rules += _with_calls(request, style, tuple(tools), terminal, answer, wanted is None and not forced)
    else:
        rules.append(f"answer: {answer} wanted")
    if wanted is not None and not forced:
        rules.append(f"wanted: {_embedded(wanted)}")
    ends = [r"TEXT: /(.|\n)*/", r"PLAIN: /([^{](.|\n)*)?/", r"BLANKS: /[ \t\r\n]{0,8}/"]
    return Grammar("lark", "\n".join(["%llguidance {}", *rules, *ends]) + "\n")


def _thoughts(reasoning: ReasoningStyle | None, thinking: Thinking, terminal: Terminal) -> list[str]:
    """The first rule, and those for what stands before the body."""
    if reasoning is None or thinking not in ("open", "maybe"):
        return ["start: answer"]
    after = terminal(reasoning.between) or "BLANKS"
    if thinking == "open":
        start = f"start: thoughts {after} {terminal(reasoning.answer)} answer"
    elif reasoning.between:
        start = f"start: ({terminal(reasoning.opener)} thoughts {after})? answer"
    else:
        start = f"start: (BLANKS {terminal(reasoning.opener)} thoughts)? BLANKS answer"
    return [start, f"thoughts{until(reasoning.closer, terminal)}"]


def _with_calls(
    request: ChatRequest, style: ToolStyle, tools: tuple[Tool, ...], terminal: Terminal, answer: str, free: bool
) -> list[str]:
    """The body that is calls; or something else too, if they are not forced."""
    begins = style.start_of_calls()
    search = free and not style.calls_first
    calls = style.grammar(tools, request.parallel_tool_calls, terminal, "opening" if search else terminal(begins))
    if calls is None:
        message = f"calls cannot be forced for this model's style of calls ({style.name}): use tool_choice 'auto'."
        raise RequestError(message, "tool_choice")
    rules = [calls]
    if search:
        rules.append(f"opening{until(begins, terminal)}")
    if request.tool_choice.mode in ("required", "named"):
        rules.append("answer: calls")
    else:
        rules.append(f"answer: calls | {answer} {('PLAIN' if style.only_at_start else 'TEXT') if free else 'wanted'}")
    return rules


def _embedded(grammar: Grammar) -> str:
    """A grammar as a part of one."""
    check_grammar(grammar)
    match grammar.kind:
        case "json_schema":
            return json_rule(json.loads(grammar.text))
        case "json_object":
            return json_rule({"type": "object"})
        case "regex":
            return "/" + _REGEX_PART.sub(_without_delimiter, grammar.text) + "/"
        case "lark":
            return f"%lark {{\n{grammar.text}\n}}"


def _without_delimiter(part: re.Match[str]) -> str:
    """A part of a regular expression such that it does not end where it stands between slashes."""
    text = part[0]
    if text == "\\":
        raise RequestError("the regular expression ends with a backslash.", "response_format")
    return {"/": "\\/", "\n": "\\n", "\\\n": "\\n"}.get(text, text)
