"""Whether decode steps bring misses to the GPU at all, and what they are told; on memory of the CPU."""

from __future__ import annotations

import os

import pytest
import torch
from tests.kernels.oracle import packed
from tests.kernels.test_nodes import cut

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
pytest.importorskip("triton")

from moesaic.engine.gpu.shares import Costs
from moesaic.engine.gpu.upload_shares import ALL, UploadShares
from moesaic.engine.gpu.uploads import MissUploads, start_uploads
from moesaic.kernels.experts import PackedExperts
from moesaic.modules.gpu.experts import page_lock, slot_bytes
from moesaic.modules.gpu.landing import LandingSlots

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def experts(is_sliced: bool = False) -> PackedExperts:
    gate, up, down = (packed("F32", 32, 32, 6, seed)[0] for seed in range(3))
    if is_sliced:
        gate, up, down = (cut(part, (16, 16), axis) for part, axis in ((gate, "rows"), (up, "rows"), (down, "cols")))
    made = PackedExperts(gate, up, down)
    if DEVICE.type == "cuda":
        page_lock(made)
    return made


def costs(per_read: float) -> Costs:
    return Costs(per_upload=1.0, fixed=0.0, per_row=0.0, per_read=per_read, per_token=0.0)


def test_uploads_are_tried_where_the_link_is_quick_enough() -> None:
    routed = [experts(), experts()]
    slow_cpu = start_uploads(routed, 4, 2, DEVICE, costs(per_read=100.0))
    assert isinstance(slow_cpu, MissUploads)
    assert slow_cpu.landing.num_slots == 4 and slow_cpu.landing.nbytes == 4 * slot_bytes(routed[0])
    quick_cpu = start_uploads(routed, 4, 2, DEVICE, costs(per_read=1e-9))
    assert isinstance(quick_cpu, str) and "over the link, and the CPU computes 2 in 0.00 ms" in quick_cpu


def test_experts_on_several_memory_nodes_stay_there() -> None:
    found = start_uploads([experts(), experts(is_sliced=True)], 4, 2, DEVICE, costs(per_read=100.0))
    assert found == "experts are cut over several memory nodes"


def test_a_step_is_told_how_many_experts_to_bring(monkeypatch: pytest.MonkeyPatch) -> None:
    uploads = MissUploads(LandingSlots([experts()], 3, 2, DEVICE), UploadShares())
    seen: list[tuple[int, bool]] = []
    told: list[list[int]] = []
    monkeypatch.setattr(uploads.sender, "set_numbers", lambda numbers: told.append(list(numbers)))
    monkeypatch.setattr(uploads.shares, "begin", lambda batch, is_quiet: seen.append((batch, is_quiet)) or ALL // 2)
    assert uploads.before_step(2, is_quiet=True) and uploads.share == ALL // 2
    assert told[-1] == [min(3, (missing + 1) // 2) for missing in range(17)]
    monkeypatch.setattr(uploads.shares, "begin", lambda batch, is_quiet: 0)
    assert not uploads.before_step(2, is_quiet=False) and uploads.share == 0
    uploads.fixed = [0] + [1] * 16
    assert uploads.before_step(1, is_quiet=True)
    assert told[-1] == uploads.fixed and len(told) == 2
    assert uploads.before_step(1, is_quiet=True) and len(told) == 2
    done = uploads.statistics()
    assert (done.share, done.steps, done.missing, done.brought) == (None, 3, 0, 0) and seen == [(2, True)]


def test_fixed_numbers_are_settled(monkeypatch: pytest.MonkeyPatch) -> None:
    uploads = MissUploads(LandingSlots([experts()], 3, 2, DEVICE), UploadShares())
    assert not uploads.is_settled(1)
    monkeypatch.setattr(uploads.shares, "is_settled", lambda batch: batch == 2)
    assert uploads.is_settled(2) and not uploads.is_settled(1)
    uploads.fixed = [0] + [1] * 16
    assert uploads.is_settled(1)


def test_large_steps_bring_nothing() -> None:
    uploads = MissUploads(LandingSlots([experts()], 3, 2, DEVICE), UploadShares())
    assert uploads.takes(8) and not uploads.takes(9)
