"""Counting kernels that are loaded onto a card."""

from __future__ import annotations

from triton import knobs

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
