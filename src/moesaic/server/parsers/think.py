"""Thoughts before the answer, between two markers.

`<think>` and `</think>`: model cards and chat templates of DeepSeek R1, V3.1 and later, Qwen3, GLM-4.5 and later,
Kimi-K2-Thinking, MiniMax-M2, Step-3.5, Nemotron-3. Some generation prompts hold the opener (R1, Qwen3-Thinking,
MiniMax), some leave it to the model (Qwen3, GLM-4.5, Kimi). `[THINK]` and `[/THINK]`: Magistral and Ministral-3 of
mistralai.
"""

from __future__ import annotations

from moesaic.server.parsers.base import ReasoningStyle

__all__ = ["BRACKETS", "THINK"]

THINK = ReasoningStyle("think", "<think>", "</think>")
BRACKETS = ReasoningStyle("brackets", "[THINK]", "[/THINK]")
