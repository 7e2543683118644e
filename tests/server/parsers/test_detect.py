from __future__ import annotations

import pytest

from moesaic.errors import ConfigError
from moesaic.server.parsers.detect import TOOL_STYLES, detect

# What is telling in the published templates of these models.
TEMPLATES = {
    "plain": ("{{ messages[0].content }}", None, None),
    "Qwen2.5": ('<tool_call>\\n{"name": <function-name>}\\n</tool_call>', None, "hermes"),
    "Qwen3": ("{{ content.split('</think>') }}<tool_call>\\n</tool_call>", "think", "hermes"),
    "Qwen3-Coder": ("<tool_call>\\n<function=f>\\n<parameter=p>", None, "qwen_coder"),
    "DeepSeek-R1": ("</think><｜tool▁calls▁begin｜><｜tool▁call▁begin｜>\\n```json", "think", "deepseek_fenced"),
    "DeepSeek-V3.1": ("</think><｜tool▁calls▁begin｜><｜tool▁call▁begin｜>", "think", "deepseek"),
    "DeepSeek-V3.2": ("{%- set dsml_token = '｜DSML｜' -%}</think>'function_calls>'", "think", "dsml"),
    "DeepSeek-V4": ("{%- set dsml_token = '｜DSML｜' -%}</think>'tool_calls>'", "think", "dsml_v4"),
    "GLM-4.6": ("<tool_call>{name}\n<arg_key>k</arg_key></think>", "think", "glm"),
    "Kimi-K2": ("<|tool_calls_section_begin|><|tool_call_begin|>", None, "kimi"),
    "MiniMax-M2": ("{%- set begin = '<minimax:tool_call>' -%}<invoke name=></think>", "think", "minimax"),
    "Nemo": ('{{- "[TOOL_CALLS][" }}', None, "mistral_list"),
    "Devstral": ('{{- "[TOOL_CALLS]" + name + "[ARGS]" }}', None, "mistral"),
    "Ministral-3": ('{{- "[TOOL_CALLS]" + name + "[ARGS]" }}[THINK][/THINK]', "brackets", "mistral"),
    "Llama-3.1": ("<|start_header_id|>{{- '\"parameters\": ' }}", None, "llama"),
    "gpt-oss": ("<|channel|>analysis<|message|><|call|>", "harmony", "harmony"),
}


@pytest.mark.parametrize("name", TEMPLATES)
def test_styles_are_found_in_templates(name: str) -> None:
    template, reasoning, tools = TEMPLATES[name]
    styles = detect(template)
    assert (styles.reasoning.name if styles.reasoning else None) == reasoning
    assert (styles.tools.name if styles.tools else None) == tools


def test_styles_may_be_named() -> None:
    styles = detect(TEMPLATES["Qwen3"][0], reasoning="none", tools="glm")
    assert styles.reasoning is None
    assert styles.tools is TOOL_STYLES["glm"]
    with pytest.raises(ConfigError, match=r"'other'.*none.*glm"):
        detect("", tools="other")
    with pytest.raises(ConfigError, match=r"'other'.*none.*think"):
        detect("", reasoning="other")


def test_every_style_has_its_name() -> None:
    assert all(name == style.name for name, style in TOOL_STYLES.items())
