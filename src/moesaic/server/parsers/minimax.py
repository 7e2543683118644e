r"""Calls of MiniMax-M2.

Format: the model card (docs/tool_calling_guide.md) and chat template of MiniMaxAI/MiniMax-M2:
`<minimax:tool_call>\n<invoke name="NAME">\n<parameter name="KEY">VALUE</parameter>\n</invoke>\n</minimax:tool_call>`.
Values are texts without quotes, or JSON where the schema has another type.
"""

from __future__ import annotations

from moesaic.server.parsers.invoke import Invoke

__all__ = ["MiniMax"]


class MiniMax(Invoke):
    """`invoke` tags without a prefix."""

    name = "minimax"
    openers = ("<minimax:tool_call>",)
    closers = ("</minimax:tool_call>",)
