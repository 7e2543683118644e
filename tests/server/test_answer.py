from __future__ import annotations

from collections.abc import Sequence

import pytest

from moesaic.engine.serving.outputs import Chunk, RequestStats, TokenLogprob
from moesaic.server.answer import Answer
from moesaic.server.conversation import Event, Finished, ReasoningDelta, TextDelta, ToolCallDelta
from moesaic.server.parsers.hermes import Hermes
from moesaic.server.parsers.kimi import Kimi
from moesaic.server.parsers.scanner import Scanner
from moesaic.server.parsers.think import THINK

CALL = '<tool_call>{"name": "f", "arguments": {"a": 1}}</tool_call>'
STATS = RequestStats(prompt_tokens=3)


def entry(text: str | bytes) -> TokenLogprob:
    return TokenLogprob(0, text.encode() if isinstance(text, str) else text, -1.0)


def answer(**options: object) -> Answer:
    style = Hermes()
    return Answer(2, Scanner(THINK, style=style), style, **options)


def run(target: Answer, words: Sequence[str], reason: str = "stop", stop: str | int | None = None) -> list[Event]:
    """The events of one piece per word, each with the log-probability of its token."""
    events: list[Event] = []
    for at, word in enumerate(words):
        last = at == len(words) - 1
        end = {"finish_reason": reason, "stop": stop, "stats": STATS} if last else {}
        events += target.feed(Chunk(2, word, (at,), (entry(word),), **end))
    return events


def test_thoughts_text_and_calls() -> None:
    events = run(answer(), ["<think>", "Hm", ".", "</think>", "\n\n", "Let", " me", CALL, ""])
    said = [type(event)(2, event.text) for event in events if isinstance(event, (TextDelta, ReasoningDelta))]
    assert said == [ReasoningDelta(2, "Hm"), ReasoningDelta(2, "."), TextDelta(2, "Let"), TextDelta(2, " me")]
    call = events[-2]
    assert isinstance(call, ToolCallDelta)
    assert (call.choice, call.call, call.name, call.arguments) == (2, 0, "f", '{"a": 1}')
    assert call.id is not None
    assert call.id.startswith("call_")
    assert events[-1] == Finished(2, "tool_calls", STATS)


@pytest.mark.parametrize(
    ("words", "reason", "expected"),
    [
        (["a"], "stop", "stop"),
        ([CALL], "stop", "tool_calls"),
        ([CALL], "length", "length"),
        (["a"], "cancelled", "cancelled"),
    ],
)
def test_why_an_answer_ended(words: list[str], reason: str, expected: str) -> None:
    assert run(answer(), words, reason)[-1] == Finished(2, expected, STATS)


def test_what_stopped_an_answer() -> None:
    assert run(answer(), ["a"], "stop", "END")[-1] == Finished(2, "stop", STATS, "END")
    assert run(answer(), ["a"], "stop", 7)[-1] == Finished(2, "stop", STATS)


def test_logprobs_stay_with_their_text() -> None:
    words = ["<think>", "Hm", " ", "</think>", "\n\n", "Let", " me", "\n", CALL, ""]
    by_kind: dict[type, list[str]] = {TextDelta: [], ReasoningDelta: []}
    for event in run(answer(), words):
        if isinstance(event, (TextDelta, ReasoningDelta)):
            by_kind[type(event)] += [each.raw.decode() for each in event.logprobs]
            assert "".join(each.raw.decode() for each in event.logprobs) == event.text
    assert by_kind == {ReasoningDelta: ["Hm"], TextDelta: ["Let", " me"]}


def test_logprobs_of_held_text_come_with_it() -> None:
    target = answer()
    first = list(target.feed(Chunk(2, "a <tool", (1, 2), (entry("a"), entry(" <tool")))))
    assert first == [TextDelta(2, "a", (entry("a"),))]
    second = list(target.feed(Chunk(2, "box>", (3,), (entry("box>"),))))
    assert second == [TextDelta(2, " <toolbox>", (entry(" <tool"), entry("box>")))]


def test_logprobs_of_incomplete_characters_wait_for_them() -> None:
    target = Answer(2, Scanner())
    assert list(target.feed(Chunk(2, "a", (1,), (entry("a"),)))) == [TextDelta(2, "a", (entry("a"),))]
    assert list(target.feed(Chunk(2, "", (2,), (entry(b"\xc3"),)))) == []
    both = (entry(b"\xc3"), entry(b"\xa4"))
    assert list(target.feed(Chunk(2, "ä", (3,), both[1:]))) == [TextDelta(2, "ä", both)]


def test_only_one_call_where_several_are_not_wanted() -> None:
    events = run(answer(parallel=False), [CALL, CALL, ""])
    assert [event.call for event in events if isinstance(event, ToolCallDelta)] == [0]
    assert [event.call for event in run(answer(), [CALL, CALL, ""]) if isinstance(event, ToolCallDelta)] == [0, 1]


def test_ids_of_calls_are_unique_in_a_conversation() -> None:
    style = Kimi()
    call = "<|tool_call_begin|>functions.f:0<|tool_call_argument_begin|>{}<|tool_call_end|>"
    fresh = Answer(2, Scanner(style=style), style)
    assert [event.id for event in run(fresh, [call, call]) if isinstance(event, ToolCallDelta)] == [
        "functions.f:0",
        "functions.f:1",
    ]
    later = Answer(2, Scanner(style=style), style, frozenset({"functions.f:0", "functions.f:1", "x"}))
    assert [event.id for event in run(later, [call]) if isinstance(event, ToolCallDelta)] == ["functions.f:3"]
