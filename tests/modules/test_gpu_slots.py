"""How experts get into slots of a GPU's memory: here, into memory of the CPU."""

from __future__ import annotations

import gc
from dataclasses import replace

import pytest
import torch
from tests.kernels.oracle import packed
from tests.kernels.test_nodes import cut

pytest.importorskip("triton")

from moesaic.errors import KernelError
from moesaic.kernels.experts import PackedExperts
from moesaic.modules.gpu.experts import copy_experts, page_lock, slot_bytes, slot_layout

CPU = torch.device("cpu")
NUM_EXPERTS, INTERMEDIATE = 5, 768


def whole() -> PackedExperts:
    shapes = (("Q4_K", INTERMEDIATE, 256), ("Q8_0", INTERMEDIATE, 256), ("Q4_K", 256, INTERMEDIATE))
    return PackedExperts(
        *(packed(fmt, rows, cols, NUM_EXPERTS, seed)[0] for seed, (fmt, rows, cols) in enumerate(shapes))
    )


def sliced(experts: PackedExperts) -> PackedExperts:
    """The same on two memory nodes."""
    sizes = (512, 256)
    gate, up = (cut(part, sizes, "rows") for part in (experts.gate, experts.up))
    return replace(experts, gate=gate, up=up, down=cut(experts.down, sizes, "cols"))


def matrices(layout, arena: torch.Tensor, slot: int) -> list[torch.Tensor]:
    parts = (layout.kernel.gate, layout.kernel.up, layout.kernel.down)
    begins = [part.offset + slot * part.stride for part in parts]
    return [arena[begin : begin + part.nbytes] for begin, part in zip(begins, parts, strict=True)]


@pytest.mark.parametrize("form", ["one by one", "far apart", "by matrix"])
@pytest.mark.parametrize("is_sliced", [False, True])
def test_neighbours_come_into_neighbouring_slots(form: str, is_sliced: bool) -> None:
    experts = whole()
    size = slot_bytes(experts)
    options = {"one by one": {}, "far apart": {"stride": size + 192}, "by matrix": {"by_matrix": 4}}[form]
    layout = slot_layout(experts, CPU, **options)
    arena = torch.zeros(layout.kernel.arena_bytes(4), dtype=torch.uint8)
    copy_experts(sliced(experts) if is_sliced else experts, 2, 3, layout, arena, 1)
    for expert, slot in ((2, 1), (3, 2), (4, 3)):
        for part, found in zip((experts.gate, experts.up, experts.down), matrices(layout, arena, slot), strict=True):
            first = expert * part.matrix_bytes
            assert torch.equal(found, part.data[first : first + part.matrix_bytes])
    assert not any(found.any() for found in matrices(layout, arena, 0))


class FakeRuntime:
    """What locks pages, as CUDA's runtime does; refuses the `refused`-th range."""

    def __init__(self, refused: int = -1) -> None:
        self.locked: dict[int, int] = {}
        self._refused, self._calls = refused, 0

    def cudaHostRegister(self, address: int, nbytes: int, flags: int) -> int:
        self._calls += 1
        if self._calls == self._refused:
            return 712
        assert address not in self.locked
        self.locked[address] = nbytes
        return 0

    def cudaHostUnregister(self, address: int) -> int:
        del self.locked[address]
        return 0


def copied(part):
    return replace(part, data=part.data.clone())


def own_experts() -> PackedExperts:
    """With memory of their own: matrices of tests are kept and shared."""
    experts = whole()
    return replace(experts, gate=copied(experts.gate), up=copied(experts.up), down=copied(experts.down))


def test_page_locks_end_with_the_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    runtime = FakeRuntime()
    monkeypatch.setattr(torch.cuda, "cudart", lambda: runtime)
    experts = own_experts()
    page_lock(experts)
    parts = (experts.gate, experts.up, experts.down)
    assert runtime.locked == {part.data.data_ptr(): part.data.nbytes for part in parts}
    del experts, parts
    gc.collect()
    assert not runtime.locked


def test_memory_that_cannot_be_locked_is_said_so(monkeypatch: pytest.MonkeyPatch) -> None:
    runtime = FakeRuntime(refused=2)
    monkeypatch.setattr(torch.cuda, "cudart", lambda: runtime)
    with pytest.raises(KernelError, match="cannot be page-locked"):
        page_lock(own_experts())
