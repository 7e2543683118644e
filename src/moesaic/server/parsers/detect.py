"""Which styles of reasoning and of tool calls a chat template speaks, from its text."""

from __future__ import annotations

from dataclasses import dataclass

from moesaic.errors import ConfigError
from moesaic.server.parsers.base import ReasoningStyle, ToolStyle
from moesaic.server.parsers.deepseek import DeepSeek, DeepSeekFenced
from moesaic.server.parsers.dsml import Dsml, DsmlV4
from moesaic.server.parsers.glm import Glm
from moesaic.server.parsers.harmony import CHANNELS, Harmony
from moesaic.server.parsers.hermes import Hermes
from moesaic.server.parsers.kimi import Kimi
from moesaic.server.parsers.llama import Llama
from moesaic.server.parsers.minimax import MiniMax
from moesaic.server.parsers.mistral import Mistral, MistralList
from moesaic.server.parsers.qwen_coder import QwenCoder
from moesaic.server.parsers.think import BRACKETS, THINK

__all__ = ["REASONING_STYLES", "TOOL_STYLES", "Styles", "detect"]

REASONING_STYLES = {style.name: style for style in (CHANNELS, THINK, BRACKETS)}
_STYLES: tuple[ToolStyle, ...] = (
    Harmony(),
    Kimi(),
    DsmlV4(),
    Dsml(),
    DeepSeekFenced(),
    DeepSeek(),
    MiniMax(),
    Glm(),
    QwenCoder(),
    Mistral(),
    MistralList(),
    Hermes(),
    Llama(),
)
TOOL_STYLES: dict[str, ToolStyle] = {style.name: style for style in _STYLES}
# The first whose texts are all in the template; what is more special comes first.
_TOOL_SIGNS: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("harmony", ("<|channel|>", "<|call|>")),
    ("kimi", ("<|tool_call_begin|>",)),
    ("dsml_v4", ("｜DSML｜", "tool_calls>")),
    ("dsml", ("｜DSML｜",)),
    ("deepseek_fenced", ("<｜tool▁call▁begin｜>", "```json")),
    ("deepseek", ("<｜tool▁call▁begin｜>",)),
    ("minimax", ("<minimax:tool_call>",)),
    ("glm", ("<arg_key>",)),
    ("qwen_coder", ("<tool_call>", "<function=", "<parameter=")),
    ("mistral", ("[TOOL_CALLS]", "[ARGS]")),
    ("mistral_list", ("[TOOL_CALLS]",)),
    ("hermes", ("<tool_call>",)),
    ("llama", ("<|start_header_id|>", '"parameters": ')),
)


@dataclass(frozen=True, slots=True)
class Styles:
    """How a model writes thoughts and calls; None where it has none or none that is known."""

    reasoning: ReasoningStyle | None
    tools: ToolStyle | None


def detect(template: str, reasoning: str | None = None, tools: str | None = None) -> Styles:
    """The styles that a template speaks.

    Args:
        template: its source.
        reasoning: a name from `REASONING_STYLES`, or "none", instead of what is found.
        tools: a name from `TOOL_STYLES`, or "none", instead of what is found.

    Raises:
        ConfigError: there is no style of such a name.
    """
    if reasoning is None:
        signs = {"harmony": "<|channel|>analysis", "think": "</think>", "brackets": "[/THINK]"}
        found = next((name for name, sign in signs.items() if sign in template), "none")
    else:
        found = reasoning
    named = tools or next((name for name, signs in _TOOL_SIGNS if all(sign in template for sign in signs)), "none")
    for name, known in ((found, REASONING_STYLES), (named, TOOL_STYLES)):
        if name != "none" and name not in known:
            raise ConfigError(f"no style is named {name!r}: expected one of {', '.join(('none', *known))}.")
    return Styles(REASONING_STYLES.get(found), TOOL_STYLES.get(named))
