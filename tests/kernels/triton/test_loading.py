"""Counting kernels that are loaded onto a card, and what is said while they are compiled."""

from __future__ import annotations

import logging

import pytest
from triton import knobs

from moesaic.kernels.triton import loading
from moesaic.kernels.triton.loading import num_loaded


def test_every_load_counts_beside_hooks_of_others() -> None:
    seen: list[str] = []

    def other(module: object, function: object, name: str, *rest: object) -> None:
        seen.append(name)

    knobs.runtime.kernel_load_end_hook.add(other)
    try:
        before = num_loaded()
        knobs.runtime.kernel_load_end_hook(None, None, "first", None, "hash")
        knobs.runtime.kernel_load_end_hook(None, None, "second", None, "hash")
        assert num_loaded() == before + 2
        assert seen == ["first", "second"]
    finally:
        knobs.runtime.kernel_load_end_hook.remove(other)


def test_who_waits_for_the_compiler_is_told_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    listener, heard = knobs.compilation.listener, []
    what = {"src": None, "metadata": {}, "metadata_group": {}, "times": None}
    monkeypatch.setattr(loading, "_told", False)
    monkeypatch.setattr(loading, "_earlier", lambda **details: heard.append(details["cache_hit"]))
    with caplog.at_level(logging.WARNING, "moesaic.gpu"):
        listener(cache_hit=True, **what)
        assert not caplog.records
        listener(cache_hit=False, **what)
        listener(cache_hit=False, **what)
    assert heard == [True, False, False]
    assert [record.getMessage().split(":")[0] for record in caplog.records] == ["compiling kernels for this GPU"]
    assert str(knobs.cache.dir) in caplog.text
