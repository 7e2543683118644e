"""Runs the chat on a session that needs no model: it answers with what it was asked, slowly where it says "slow".

Started by `test_chat.py` in a terminal of its own.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence

from moesaic.cli.chat import chat
from moesaic.engine.answer import Answer, Sampling
from moesaic.errors import GenerationError


class EchoSession:
    """Answers with the messages that it was given, as JSON."""

    def encode_chat(self, messages: Sequence[Mapping[str, str]]) -> list[str]:
        return [json.dumps(list(messages), ensure_ascii=False)]

    def answer(
        self, ids: list[str], sampling: Sampling, on_text: Callable[[str], None], should_stop: Callable[[], bool]
    ) -> Answer:
        answer = Answer(prompt_tokens=4, generated_tokens=3, prefill_seconds=0.5, decode_seconds=0.25)
        last = json.loads(ids[0])[-1]["content"]
        if last == "too long":
            raise GenerationError("the prompt has 9 tokens, but the model's context is 8")
        if last == "prefill":
            time.sleep(30)  # before the first token
        words = [f"w{number} " for number in range(1000)] if last == "slow" else [f"<{ids[0]}>", "\x1b[5m"]
        for word in words:
            on_text(word)
            answer.text += word
            if should_stop():
                answer.finish_reason = "interrupted"
                break
            time.sleep(0.02 if last == "slow" else 0)
        return answer

    def forget(self) -> None:
        print("[forgotten]")


class InterruptibleSession(EchoSession):
    """Ends an answer that Ctrl-C breaks off, as the real session does."""

    def answer(self, *args: object, **kwargs: object) -> Answer:  # type: ignore[override]
        try:
            return super().answer(*args, **kwargs)  # type: ignore[arg-type]
        except KeyboardInterrupt:
            return Answer(finish_reason="interrupted")


if __name__ == "__main__":
    raise SystemExit(chat(InterruptibleSession(), Sampling(), system=None, raw=False, title="echo"))  # type: ignore[arg-type]
