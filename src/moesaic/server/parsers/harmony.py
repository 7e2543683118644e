"""Messages in channels, as gpt-oss writes them: thoughts, calls and the answer are messages of one turn.

Format: OpenAI's description of harmony (github.com/openai/harmony, docs/format.md) and the chat template of
openai/gpt-oss-120b. A message is `<|start|>HEADER<|message|>TEXT` and ends with `<|end|>`, `<|return|>` (the turn ends)
or `<|call|>` (it ends with a call). The header is a role and, behind `<|channel|>`, `analysis` (thoughts), `commentary`
(calls, or text before them) or `final`; `to=functions.NAME` in it makes the message a call's JSON. The prompt ends with
`<|start|>assistant`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

from moesaic.server.conversation import Tool
from moesaic.server.parsers.base import (
    Call,
    CallPiece,
    Piece,
    ReasoningPiece,
    ReasoningStyle,
    Terminal,
    TextPiece,
    ToolStyle,
    Verdict,
)
from moesaic.server.parsers.cutter import Cutter
from moesaic.server.parsers.markers import Markers
from moesaic.server.parsers.rules import alternatives, arguments_rule, quote
from moesaic.server.parsers.values import load_json

__all__ = ["CHANNELS", "Harmony", "HarmonyParser"]

_START, _CHANNEL, _MESSAGE, _CONSTRAIN = "<|start|>", "<|channel|>", "<|message|>", "<|constrain|>"
_END, _RETURN, _CALL = "<|end|>", "<|return|>", "<|call|>"
_ANALYSIS, _FINAL = f"{_CHANNEL}analysis{_MESSAGE}", f"{_CHANNEL}final{_MESSAGE}"
_RECIPIENT = re.compile(r"to=functions\.([\w.-]+)")
_HEADER_LIMIT = 512  # characters without `<|message|>` are no header

CHANNELS = ReasoningStyle("harmony", _ANALYSIS, _END, f"{_START}assistant", _FINAL)


class Harmony(ToolStyle):
    """Calls as messages to `functions.NAME`."""

    name = "harmony"
    openers = (_CHANNEL,)
    inner = (_START, _MESSAGE, _CONSTRAIN, _END, _RETURN, _CALL)
    calls_first = True
    single_calls = True

    def read(self, block: str, tools: Mapping[str, Tool]) -> list[Call] | Verdict:
        """Calls stand in messages here, which `HarmonyParser` reads."""
        return "malformed"

    def adapt(self, turn: dict[str, Any]) -> None:
        """A turn that calls has thoughts or text, not both: the template refuses that."""
        thoughts, content = turn.get("thinking"), turn["content"]
        if thoughts and content:
            turn["reasoning_content"] = turn["thinking"] = f"{thoughts}\n\n{content}"
            turn["content"] = ""

    def grammar(self, tools: Sequence[Tool], parallel: bool, terminal: Terminal, first: str) -> str | None:
        """One message to a function: the turn ends with it."""
        head, tail = terminal(f"{_CHANNEL}commentary to=functions."), terminal(f" {_CONSTRAIN}json{_MESSAGE}")
        rules = [f"calls: {alternatives('call', len(tools))}"]
        for index, tool in enumerate(tools):
            rules.append(f"call_{index}: {head} {quote(tool.name)} {tail} {arguments_rule(tool)}")
        return "\n".join(rules)


class HarmonyParser(Cutter):
    """Cuts a turn into its messages.

    Args:
        offered: whether there are tools; without them a call is text.
        drop: special tokens that are no markers of the format.
        inside: which message the prompt has begun already, if it has.
    """

    def __init__(
        self, offered: bool, drop: Iterable[str] = (), inside: Literal["analysis", "final"] | None = None
    ) -> None:
        super().__init__()
        self._drop_texts = frozenset(drop)
        self._header = Markers((_MESSAGE, *self._drop_texts))
        self._body = Markers((_START, _END, _RETURN, _CALL, *self._drop_texts))
        self._offered = offered
        self._kind: Literal["header", "analysis", "final", "call"] = inside or "header"
        self._name = ""
        self._scanned = 0
        self._spoken: set[str] = set()
        self._new = False  # nothing of this message was given out

    def finish(self) -> list[Piece]:
        """The answer is over, in the middle of a message or not."""
        if self._kind == "call":
            self._end_call(len(self._buffer))
        elif self._kind != "header" or not self._structured():
            self._kind = "final" if self._kind == "header" else self._kind
            self._give(len(self._buffer))
        self._skip(len(self._buffer))
        return self._take()

    def _structured(self) -> bool:
        return not self._buffer.strip() or any(mark in self._buffer for mark in (_START, _CHANNEL, _END, _RETURN))

    def _step(self) -> bool:
        if self._kind == "header":
            return self._read_header()
        found = self._body.first(self._buffer, self._scanned)
        if found is None:
            settled = len(self._buffer) - self._body.held(self._buffer)
            if self._kind != "call":
                return self._give(settled)
            self._scanned = max(self._scanned, settled)
            return False
        if self._kind != "call":
            self._give(found.start())
            found = self._body.first(self._buffer)
            assert found is not None
        elif found[0] in self._drop_texts:
            self._scanned = found.end()
            return True
        else:
            self._end_call(found.start())
        self._skip(len(found[0]))
        if found[0] not in self._drop_texts:
            self._kind = "header"
        return True

    def _read_header(self) -> bool:
        found = self._header.first(self._buffer)
        if found is None:
            if len(self._buffer) <= _HEADER_LIMIT:
                return False
            self._begin("final")
            return True
        if found[0] in self._drop_texts:
            self._buffer = self._buffer[: found.start()] + self._buffer[found.end() :]
            self._end += len(found[0])
            return True
        header = self._buffer[: found.start()]
        self._skip(found.end())
        channel = header.partition(_CHANNEL)[2].split()
        recipient = _RECIPIENT.search(header)
        if recipient is not None and self._offered:
            self._name = recipient[1]
            self._begin("call")
        else:
            self._begin("analysis" if channel[:1] == ["analysis"] else "final")
        return True

    def _begin(self, kind: Literal["analysis", "final", "call"]) -> None:
        self._kind, self._scanned, self._new = kind, 0, True

    def _end_call(self, size: int) -> None:
        text = self._buffer[:size]
        for dropped in self._drop_texts:
            text = text.replace(dropped, "")
        loaded = load_json(text)
        if isinstance(loaded, str) or not isinstance(loaded[0], dict):
            self._kind = "final"
            self._give(size)
            return
        self._skip(size)
        self._pieces.append(CallPiece(Call(self._name, text.strip()), self._end))

    def _give(self, size: int) -> bool:
        if size <= 0:
            return False
        text = self._leave(size)
        if self._new and self._kind in self._spoken:
            text = "\n\n" + text
        self._new = False
        self._spoken.add(self._kind)
        self._pieces.append((ReasoningPiece if self._kind == "analysis" else TextPiece)(text, self._end))
        return True
