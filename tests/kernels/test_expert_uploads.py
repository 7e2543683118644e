"""Which experts of a request the CPU sends to a GPU, that their bytes arrive as they are, and what is left to it."""

from __future__ import annotations

import ctypes
import threading
import time
from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
from tests.kernels.oracle import packed
from tests.kernels.test_handoff import ask
from tests.kernels.test_nodes import cut

from moesaic.errors import ExpertTimeoutError, KernelError
from moesaic.kernels import moe_forward
from moesaic.kernels.expert_uploads import NO_QUEUE, CopyQueue, ExpertUploads, SlotOffsets, UploadTargets
from moesaic.kernels.experts import PackedExperts
from moesaic.kernels.handoff import ExpertServer, Mailbox

HIDDEN, INTERMEDIATE, NUM_EXPERTS, MAX_TOKENS, NUM_SLOTS = 64, 32, 12, 8, 5
COPY = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_uint64, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p)


def make_experts(seed: int, gated: bool = True) -> PackedExperts:
    gate, up = (packed("Q8_0", INTERMEDIATE, HIDDEN, NUM_EXPERTS, seed + part)[0] for part in range(2))
    return PackedExperts(gate if gated else None, up, packed("Q4_1", HIDDEN, INTERMEDIATE, NUM_EXPERTS, seed + 2)[0])


class Device:
    """What a GPU would have: slots with a gap between matrices, and what it is told."""

    def __init__(self, layers: list[PackedExperts], top_k: int, queue: CopyQueue = NO_QUEUE) -> None:
        first = layers[0]
        sizes = [0 if part is None else part.matrix_bytes for part in (first.gate, first.up, first.down)]
        self.offsets = SlotOffsets(0, sizes[0] + 64, sizes[0] + sizes[1] + 128)
        self.slot_bytes = sum(sizes) + 192
        self.arena = torch.full((NUM_SLOTS * self.slot_bytes,), 7, dtype=torch.uint8)
        self.slots = torch.full((MAX_TOKENS, top_k), 99, dtype=torch.int32)
        self.arrived = torch.zeros(2, dtype=torch.int64)
        targets = UploadTargets(self.arena, self.slot_bytes, self.slots, self.arrived)
        self.uploads = ExpertUploads(layers, [self.offsets] * len(layers), targets, queue)

    def expected(self, experts: PackedExperts, brought: list[int]) -> torch.Tensor:
        """The arena, if nothing came before."""
        arena = torch.full_like(self.arena, 7)
        for slot, expert in enumerate(brought):
            for part, offset in zip((experts.gate, experts.up, experts.down), self.offsets, strict=True):
                if part is None:
                    continue
                source = part.data[expert * part.matrix_bytes : (expert + 1) * part.matrix_bytes]
                begin = slot * self.slot_bytes + offset
                arena[begin : begin + part.matrix_bytes] = source
        return arena


def expected_picks(misses: np.ndarray, numbers: list[int]) -> list[int]:
    """The experts that are brought, by slot: most chosen first, then in order of appearance."""
    flat = [int(each) for each in misses.ravel() if each >= 0]
    order = sorted(set(flat), key=lambda each: (-Counter(flat)[each], flat.index(each)))
    return order[: min(numbers[len(order)], NUM_SLOTS)]


def serve(server: ExpertServer, inputs: tuple[torch.Tensor, ...], number: int, **options: Any) -> torch.Tensor:
    answers: list[torch.Tensor] = []
    gpu = threading.Thread(target=lambda: answers.append(ask(server.mailbox, number, inputs)))
    gpu.start()
    server.serve(len(inputs[0]), **options)
    gpu.join()
    return answers[0]


@pytest.mark.parametrize(("tokens", "top_k"), [(1, 8), (1, 3), (4, 3), (8, 5)])
@pytest.mark.parametrize("gated", [True, False])
def test_the_most_wanted_missing_experts_are_sent_and_the_rest_is_computed(
    tokens: int, top_k: int, gated: bool
) -> None:
    layers = [make_experts(seed, gated) for seed in (0, 10)]
    server = ExpertServer(Mailbox.of(MAX_TOKENS, HIDDEN, top_k, pinned=False), layers)
    device = Device(layers, top_k)
    numbers = [min(7, (missing + 1) // 2) for missing in range(tokens * top_k + 1)]
    device.uploads.set_numbers(numbers)
    missing = brought_so_far = 0
    for step in range(3):
        for layer in range(2):
            rng = np.random.default_rng((step, layer))
            chosen = np.stack([rng.permutation(NUM_EXPERTS)[:top_k] for _ in range(tokens)])
            misses = np.where(rng.random(chosen.shape) < 0.3, -1, chosen)
            brought = expected_picks(misses, numbers)
            x, weights = torch.randn(tokens, HIDDEN), torch.rand(tokens, top_k)
            device.arena.fill_(7)
            number = 2 * step + layer + 1
            inputs = (x, torch.from_numpy(chosen), torch.from_numpy(misses), weights)
            answer = serve(server, inputs, number, first_layer=layer, num_layers=1, uploads=device.uploads)
            assert torch.equal(device.arena, device.expected(layers[layer], brought))
            slots = [[brought.index(e) if e in brought else -1 for e in row] for row in misses.tolist()]
            assert device.slots.tolist() == slots + [[-1] * top_k] * (MAX_TOKENS - tokens)
            assert torch.equal(device.uploads.last_slots(layer), device.slots)
            assert device.arrived.tolist() == [number, number]
            left = torch.from_numpy(np.where(np.isin(misses, brought), -1, misses))
            torch.testing.assert_close(answer, moe_forward(x, left, weights, layers[layer]), rtol=0, atol=0)
            missing += len(set(misses[misses >= 0].tolist()))
            brought_so_far += len(brought)
    assert (device.uploads.num_missing, device.uploads.num_brought) == (missing, brought_so_far)
    assert brought_so_far > 0


def test_the_device_is_told_after_what_it_is_told_of() -> None:
    """Where slots are comes first, then gates and ups and that they are there, then downs and the same of them."""
    layers = [make_experts(0)]
    order: list[str] = []

    def copy(to: int, source: int, num_bytes: int, _: int) -> int:
        names = {device.slots.data_ptr(): "slots", device.arrived.data_ptr(): "inner"}
        names[device.arrived.data_ptr() + 8] = "down"
        at = (to - device.arena.data_ptr()) % device.slot_bytes
        order.append(names.get(to, f"matrix {device.offsets.index(at)}" if to not in names else ""))
        ctypes.memmove(to, source, num_bytes)
        return 0

    function = COPY(copy)
    address = ctypes.cast(function, ctypes.c_void_p).value
    assert address is not None
    device = Device(layers, 3, CopyQueue(address, 0))
    server = ExpertServer(Mailbox.of(MAX_TOKENS, HIDDEN, 3, pinned=False), layers)
    device.uploads.set_numbers([0, 1, 2, 2])
    chosen = torch.tensor([[4, 2, 9]])
    inputs = (torch.randn(1, HIDDEN), chosen, chosen, torch.ones(1, 3))
    serve(server, inputs, 1, uploads=device.uploads)
    assert order == ["slots", "matrix 0", "matrix 0", "matrix 1", "matrix 1", "inner", "matrix 2", "matrix 2", "down"]
    assert torch.equal(device.arena, device.expected(layers[0], [4, 2]))


def test_all_of_a_request_may_be_sent() -> None:
    layers = [make_experts(0)]
    device, server = Device(layers, 2), ExpertServer(Mailbox.of(MAX_TOKENS, HIDDEN, 2, pinned=False), layers)
    device.uploads.set_numbers([0, 1, 2])
    chosen = torch.tensor([[11, 0]])
    server.mailbox.output.fill_(7.0)
    answer = serve(server, (torch.randn(1, HIDDEN), chosen, chosen, torch.ones(1, 2)), 1, uploads=device.uploads)
    assert not answer.any() and torch.equal(device.arena, device.expected(layers[0], [11, 0]))


def test_nothing_is_sent_before_somebody_says_how_much() -> None:
    layers = [make_experts(0)]
    device, server = Device(layers, 2), ExpertServer(Mailbox.of(MAX_TOKENS, HIDDEN, 2, pinned=False), layers)
    chosen = torch.tensor([[11, 0]])
    inputs = (torch.randn(1, HIDDEN), chosen, chosen, torch.ones(1, 2))
    answer = serve(server, inputs, 1, uploads=device.uploads)
    torch.testing.assert_close(answer, moe_forward(inputs[0], chosen, inputs[3], layers[0]), rtol=0, atol=0)
    assert (device.arena == 7).all() and (device.slots == -1).all() and device.arrived.tolist() == [1, 1]
    serve(server, inputs, 2)  # a step without uploads tells the device nothing
    assert device.arrived.tolist() == [1, 1]


def test_experts_can_be_sent_outside_of_a_step() -> None:
    layers = [make_experts(0), make_experts(3)]
    device = Device(layers, 2)
    device.uploads.bring(1, [3, 1])
    assert torch.equal(device.arena, device.expected(layers[1], [3, 1])) and device.arrived.tolist() == [0, 0]
    with pytest.raises(ValueError, match="more experts than there are slots"):
        device.uploads.bring(0, list(range(NUM_SLOTS + 1)))


def test_a_driver_that_refuses_fails_the_step_and_frees_whoever_waits() -> None:
    layers = [make_experts(0)]
    function = COPY(lambda *_: 700)
    address = ctypes.cast(function, ctypes.c_void_p).value
    assert address is not None
    device = Device(layers, 2, CopyQueue(address, 0))
    device.uploads.set_numbers([0, 1, 1])
    server = ExpertServer(Mailbox.of(MAX_TOKENS, HIDDEN, 2, pinned=False), layers)
    chosen = torch.tensor([[11, 0]])
    inputs = (torch.randn(1, HIDDEN), chosen, chosen, torch.ones(1, 2))
    gpu = threading.Thread(target=lambda: ask(server.mailbox, 1, inputs))
    gpu.start()
    with pytest.raises(
        KernelError, match=r"not be brought to the GPU: the driver refused to copy \d+ bytes .* status 700"
    ):
        server.serve(1, uploads=device.uploads)
    gpu.join()
    server.restart()
    answer = serve(server, inputs, 1)
    torch.testing.assert_close(answer, moe_forward(inputs[0], chosen, inputs[3], layers[0]), rtol=0, atol=0)


def test_what_cannot_be_sent_is_refused() -> None:
    parts = [packed("F32", 32, 32, 2, seed)[0] for seed in range(3)]
    gate, up, down = (cut(part, (16, 16), axis) for part, axis in zip(parts, ("rows", "rows", "cols"), strict=True))
    targets = UploadTargets(
        torch.zeros(64, dtype=torch.uint8), 64, torch.zeros(1, 2, dtype=torch.int32), torch.zeros(2, dtype=torch.int64)
    )
    with pytest.raises(KernelError, match="cut over several memory nodes"):
        ExpertUploads([PackedExperts(gate, up, down)], [SlotOffsets(0, 0, 0)], targets)
    wrong = UploadTargets(targets.arena, 64, targets.slots.long(), targets.arrived)
    with pytest.raises(KernelError, match="int32 "):
        ExpertUploads([make_experts(0)], [SlotOffsets(0, 0, 0)], wrong)
    wrong = UploadTargets(targets.arena, 64, targets.slots, targets.arrived[:1])
    with pytest.raises(KernelError, match=r"int64 \[2\]"):
        ExpertUploads([make_experts(0)], [SlotOffsets(0, 0, 0)], wrong)


def foretold_request(
    server: ExpertServer,
    likely: list[int],
    asked: list[int],
    uploads: ExpertUploads,
    weights: torch.Tensor,
    **options: Any,
) -> torch.Tensor:
    """One token's request, some time after the GPU has said what it will probably ask for; the answer."""
    box, number = server.mailbox, server.next_request
    inputs = (torch.ones(1, HIDDEN), torch.tensor([asked]), torch.tensor([asked]), weights)
    box.likely[0] = torch.tensor(likely)
    box.foretold[0] = number
    answers: list[torch.Tensor] = []
    gpu = threading.Thread(target=lambda: (time.sleep(0.005), answers.append(ask(box, number, inputs))))
    gpu.start()
    server.serve(1, uploads=uploads, **options)
    gpu.join()
    return answers[0]


def test_what_is_surest_is_sent_before_it_is_asked_for_while_that_is_mostly_right() -> None:
    top_k, weights = 4, torch.rand(1, 4)
    layers = [make_experts(0)]
    server = ExpertServer(Mailbox.of(MAX_TOKENS, HIDDEN, top_k, pinned=False), layers)
    server.read_ahead(True)
    device = Device(layers, top_k)
    device.uploads.set_numbers([0, 1, 1, 2, 2])

    def answer_without(asked: list[int], brought: list[int]) -> torch.Tensor:
        left = torch.tensor([[-1 if each in brought else each for each in asked]])
        return moe_forward(torch.ones(1, HIDDEN), left, weights, layers[0])

    def check(likely: list[int], asked: list[int], slots: dict[int, int]) -> None:
        """`slots` of experts that came; the rest is the CPU's."""
        answer = foretold_request(server, likely, asked, device.uploads, weights)
        assert device.slots[0].tolist() == [slots.get(each, -1) for each in asked]
        for expert, slot in slots.items():
            expected = device.expected(layers[0], [expert])[: device.slot_bytes]
            for part, offset in zip((layers[0].gate, layers[0].up, layers[0].down), device.offsets, strict=True):
                begin = slot * device.slot_bytes + offset
                came = device.arena[begin : begin + part.matrix_bytes]
                assert torch.equal(came, expected[offset : offset + part.matrix_bytes])
        torch.testing.assert_close(answer, answer_without(asked, list(slots)), rtol=0, atol=0)
        assert device.arrived.tolist() == [server.next_request - 1] * 2

    # Nothing is sent before it is known how often that would be right; what was read ahead is left to the CPU.
    check([5, 6, 7, 8], [5, 1, 2, 3], {1: 0, 2: 1})
    assert device.uploads.num_ahead == 0
    for _ in range(60):
        foretold_request(server, [5, 6, 7, 8], [5, 1, 2, 3], device.uploads, weights)
    before = device.uploads.num_ahead
    assert 0 < before == device.uploads.num_asked
    check([5, 6, 7, 8], [1, 5, 2, 3], {5: 0, 1: 1})  # first the one that was sent
    check([4, 6, 7, 8], [5, 1, 6, 3], {5: 1, 1: 2})  # for nothing: its slot is still being written to
    check([-1, 9, 7, 8], [5, 1, 9, 3], {9: 0, 5: 1})  # the first is in a cache
    check([-1, -1, -1, -1], [5, 1, 9, 3], {5: 0, 1: 1})  # all are
    assert (device.uploads.num_ahead - before, device.uploads.num_asked - before) == (3, 2)
    for _ in range(40):
        foretold_request(server, [4, 6, 7, 8], [5, 1, 2, 3], device.uploads, weights)
    before = device.uploads.num_ahead
    check([4, 6, 7, 8], [5, 1, 2, 3], {5: 0, 1: 1})
    assert device.uploads.num_ahead == before  # mostly wrong by now


def test_what_was_sent_before_a_failure_is_sent_again() -> None:
    """After a failure requests are counted anew: the same number is another request, whose experts have to come."""
    top_k, weights = 4, torch.rand(1, 4)
    layers = [make_experts(0), make_experts(10)]
    server = ExpertServer(Mailbox.of(MAX_TOKENS, HIDDEN, top_k, pinned=False), [layers[0]] * 2)
    server.read_ahead(True)
    device = Device([layers[0]] * 2, top_k)
    device.uploads.set_numbers([0, 1, 1, 1, 1])
    asked = [5, 1, 2, 3]
    for _ in range(40):  # two requests each
        for layer in range(2):
            foretold_request(server, asked, asked, device.uploads, weights, first_layer=layer, num_layers=1)
    assert device.uploads.num_ahead > 0
    server.restart()
    server.mailbox.likely[0] = torch.tensor(asked)
    server.mailbox.foretold[0] = 1
    with pytest.raises(ExpertTimeoutError):
        server.serve(1, num_layers=1, timeout=0.05, uploads=device.uploads)  # 5 is in slot 0 now
    server.restart()
    device.arena.fill_(7)  # whatever else landed there
    inputs = (torch.ones(1, HIDDEN), torch.tensor([asked]), torch.tensor([asked]), weights)
    serve(server, inputs, 1, num_layers=1, uploads=device.uploads)
    assert torch.equal(device.arena, device.expected(layers[0], [5]))
