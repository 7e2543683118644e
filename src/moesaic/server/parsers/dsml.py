r"""Calls of DeepSeek V3.2 and V4, in tags whose names begin with the special token `｜DSML｜`.

Format: encoding/encoding_dsv32.py and model card of deepseek-ai/DeepSeek-V3.2, a block with a tag for every call:
`<｜DSML｜function_calls>\n<｜DSML｜invoke name="NAME">\n` and so on with a line for every argument,
`<｜DSML｜parameter name="KEY" string="true">VALUE</｜DSML｜parameter>\n`. V4 calls the block `tool_calls`.
`string="false"` means JSON.
"""

from __future__ import annotations

from moesaic.server.parsers.invoke import Invoke

__all__ = ["Dsml", "DsmlV4"]

_V3, _V4 = "｜DSML｜function_calls>", "｜DSML｜tool_calls>"


class Dsml(Invoke):
    """V3.2's block."""

    name = "dsml"
    prefix = "｜DSML｜"
    says_text = True
    openers = (f"<{_V3}", f"<{_V4}")
    closers = (f"</{_V3}", f"</{_V4}")


class DsmlV4(Dsml):
    """V4's block."""

    name = "dsml_v4"
    openers = (f"<{_V4}", f"<{_V3}")
    closers = (f"</{_V4}", f"</{_V3}")
