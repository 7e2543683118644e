"""Which missing experts a step brings to the GPU, and that their bytes come as they are."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
from tests.kernels.oracle import packed
from tests.kernels.triton.conftest import DEVICE

from moesaic.errors import KernelError
from moesaic.kernels.experts import PackedExperts
from moesaic.kernels.handoff import Mailbox
from moesaic.kernels.triton.handoff import Exchange
from moesaic.kernels.triton.uploads import MAX_PICKED, Picks, bring_experts
from moesaic.modules.gpu.experts import page_lock, slot_layout
from moesaic.placement.vram import MAX_UPLOADS

ON_GPU = DEVICE == "cuda"


def expected(misses: np.ndarray, numbers: list[int], num_slots: int) -> list[int]:
    """The experts that are brought, by slot: most chosen first, then in order of appearance."""
    flat = [int(each) for each in misses.ravel() if each >= 0]
    order = sorted(set(flat), key=lambda each: (-Counter(flat)[each], flat.index(each)))
    return order[: min(numbers[len(order)], num_slots)]


@pytest.mark.parametrize(("tokens", "top_k"), [(1, 8), (1, 3), (4, 3), (8, 5)])
@pytest.mark.parametrize("seed", range(3))
def test_the_most_wanted_missing_experts_are_taken_from_the_cpu(tokens: int, top_k: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    chosen = np.stack([rng.permutation(12)[:top_k] for _ in range(tokens)])
    misses = np.where(rng.random(chosen.shape) < 0.3, -1, chosen)
    num_slots, room = 5, tokens * top_k
    numbers = [min(7, (missing + 1) // 2) for missing in range(room + 1)]
    box = Mailbox.of(tokens, 16, top_k, pinned=ON_GPU)
    exchange = Exchange(box, torch.device(DEVICE))
    picks = Picks(
        torch.tensor(numbers, dtype=torch.int32, device=DEVICE),
        torch.full((num_slots,), 99, dtype=torch.int32, device=DEVICE),
        torch.full((tokens, top_k), 99, dtype=torch.int32, device=DEVICE),
        torch.tensor([100, 1000], device=DEVICE),
    )
    x = torch.randn(tokens, 16, device=DEVICE)
    weights = torch.rand(tokens, top_k, device=DEVICE)
    exchange.hand_off(0, x, torch.from_numpy(chosen).to(DEVICE), torch.from_numpy(misses).to(DEVICE), weights, picks)
    if ON_GPU:
        torch.cuda.synchronize()
    brought = expected(misses, numbers, num_slots)
    assert brought
    assert picks.landing.tolist() == brought + [-1] * (num_slots - len(brought))
    assert picks.slots.tolist() == [[brought.index(e) if e in brought else -1 for e in row] for row in misses.tolist()]
    assert box.experts.tolist() == np.where(np.isin(misses, brought), -1, misses).tolist()
    assert torch.equal(box.chosen, torch.from_numpy(chosen)) and torch.equal(box.hidden, x.cpu())
    assert torch.equal(box.weights, weights.cpu()) and int(box.requested) == 1
    assert picks.counts.tolist() == [100 + len(set(misses[misses >= 0].tolist())), 1000 + len(brought)]


@pytest.mark.parametrize("halves", [["all"], ["inner", "down"]])
@pytest.mark.parametrize("gated", [True, False])
def test_experts_land_as_they_lie_in_dram(gated: bool, halves: list[Any]) -> None:
    shapes = (("Q4_K", 48, 256), ("Q8_0", 48, 256), ("Q4_1", 256, 64))
    parts = [packed(fmt, rows, cols, 5, seed)[0] for seed, (fmt, rows, cols) in enumerate(shapes)]
    parts[1] = packed("Q8_0", 64, 256, 5, 7)[0]
    parts[0] = packed("Q4_K", 64, 256, 5, 8)[0]
    experts = PackedExperts(parts[0] if gated else None, parts[1], parts[2])
    if ON_GPU:
        page_lock(experts)
    layout = slot_layout(experts, torch.device(DEVICE), stride=slot_layout(experts, torch.device("cpu")).nbytes + 128)
    arena = torch.full((layout.kernel.arena_bytes(3) + 128,), 7, dtype=torch.uint8, device=DEVICE)
    landing = torch.tensor([4, -1, 0], dtype=torch.int32, device=DEVICE)
    gate = None if experts.gate is None else experts.gate.data
    for half in halves:
        untouched = arena.clone()
        bring_experts(landing, gate, experts.up.data, experts.down.data, arena, layout.kernel, half)
        if half == "inner":  # down comes later
            first = layout.kernel.down.offset
            assert torch.equal(arena[first : layout.nbytes], untouched[first : layout.nbytes])
    found = arena.cpu()
    named = [
        (part, getattr(experts, name)) for name in ("gate", "up", "down") if (part := getattr(layout.kernel, name))
    ]
    assert len(named) == (3 if gated else 2)
    for slot, expert in ((0, 4), (2, 0)):
        for part, source in named:
            first = expert * source.matrix_bytes
            begin = part.offset + slot * part.stride
            assert torch.equal(
                found[begin : begin + source.matrix_bytes], source.data[first : first + source.matrix_bytes]
            )
        end = slot * layout.kernel.up.stride + layout.nbytes
        assert (found[end : end + 128] == 7).all()
    assert (found[layout.kernel.up.stride : 2 * layout.kernel.up.stride] == 7).all()


def test_wrong_calls_are_refused() -> None:
    parts = [packed("F32", 16, 16, 2, seed)[0] for seed in range(3)]
    experts = PackedExperts(*parts)
    layout = slot_layout(experts, torch.device(DEVICE))
    arena = torch.zeros(layout.kernel.arena_bytes(2), dtype=torch.uint8, device=DEVICE)
    gate, up, down = (part.data for part in parts)
    landing = torch.zeros(2, dtype=torch.int32, device=DEVICE)
    with pytest.raises(KernelError, match="a layout that has none"):
        bring_experts(landing, None, up, down, arena, layout.kernel)
    with pytest.raises(KernelError, match=r"landing is .* expected int32"):
        bring_experts(landing.long(), gate, up, down, arena, layout.kernel)
    with pytest.raises(KernelError, match="room for 3 slots"):
        bring_experts(landing.new_zeros(3), gate, up, down, arena, layout.kernel)
    with pytest.raises(KernelError, match="The experts' down"):
        bring_experts(landing, gate, up, down[:-64], arena, layout.kernel)
    uneven = PackedExperts(parts[0], parts[1], packed("BF16", 16, 16, 2, 3)[0])
    apart = slot_layout(uneven, torch.device(DEVICE), by_matrix=2).kernel
    with pytest.raises(KernelError, match="different distances"):
        bring_experts(landing, gate, up, uneven.down.data, arena, apart)


def test_plans_leave_room_for_as_many_as_kernels_take() -> None:
    assert MAX_PICKED == MAX_UPLOADS
