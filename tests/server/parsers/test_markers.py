from __future__ import annotations

import random
import re
import time

from moesaic.server.parsers.markers import Markers, find_any


def test_the_longest_marker_is_found() -> None:
    pattern = find_any(("<a>", "<a", "b", "<a><c>", ""))
    assert pattern.findall("<a><c><a><ab x") == ["<a><c>", "<a>", "<a", "b"]
    assert find_any(()).search("anything") is None


def test_as_a_list_of_alternatives_finds() -> None:
    draw = random.Random(1)
    for _ in range(200):
        texts = {"".join(draw.choices("ab.(", k=draw.randint(1, 4))) for _ in range(draw.randint(1, 8))}
        text = "".join(draw.choices("ab.(", k=60))
        plain = re.compile("|".join(map(re.escape, sorted(texts, key=len, reverse=True))))
        assert find_any(texts).findall(text) == plain.findall(text)


def test_many_markers_and_hostile_text_take_no_time() -> None:
    markers = Markers([f"<|reserved_{index}|>" for index in range(2000)] + ["<" + "x" * 5000 + ">"])
    begin = time.monotonic()
    assert markers.first("<" * 500_000 + "<|reserved_7|>") is not None
    assert time.monotonic() - begin < 2


def test_what_is_held_back() -> None:
    markers = Markers(("<tool>", "</think>"))
    for text, held in (("a", 0), ("a<", 1), ("a</", 2), ("a<tool", 5), ("a<tool>", 0), ("<<", 1), ("", 0)):
        assert markers.held(text) == held
    assert markers.without("a<tool>b</think>") == "ab"
