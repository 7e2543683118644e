"""What is shown of an allocator that refuses."""

from __future__ import annotations

import pytest

pytest.importorskip("triton")

from long_after_short import MIB, partly_used


def test_segments_that_are_used_in_part() -> None:
    def segment(*blocks: tuple[int, str]) -> dict[str, object]:
        used = sum(size for size, state in blocks if state != "inactive")
        return {
            "total_size": sum(size for size, _ in blocks) * MIB,
            "allocated_size": used * MIB,
            "blocks": [{"size": size * MIB, "state": state} for size, state in blocks],
        }

    found = list(
        partly_used(
            [
                segment((20, "active_allocated")),
                segment((160, "inactive"), (64, "active_allocated"), (288, "inactive")),
                segment((512, "inactive")),  # goes back to the device before anybody is refused
            ]
        )
    )
    assert found == [(448 * MIB, "512 MiB, pool (0, 0): 160.0 | 64.0 active_allocated | 288.0")]
