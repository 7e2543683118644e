"""The CPU's side of the hand-off, asked by a thread that does what a GPU does."""

from __future__ import annotations

import threading
import time

import pytest
import torch

from moesaic.errors import ExpertTimeoutError, KernelError
from moesaic.kernels import PackedExperts, PackedTensor, moe_forward
from moesaic.kernels.handoff import ExpertServer, Mailbox
from moesaic.quant import get_format, quantize

HIDDEN, INTERMEDIATE, NUM_EXPERTS, TOP_K, MAX_TOKENS = 64, 32, 6, 3, 4


def make_experts(seed: int) -> PackedExperts:
    random = torch.Generator().manual_seed(seed)
    fmt = get_format("Q8_0")

    def stack(rows: int, cols: int) -> PackedTensor:
        packed = PackedTensor.empty(fmt, rows, cols, NUM_EXPERTS)
        for expert in range(NUM_EXPERTS):
            packed.pack_(expert, quantize(torch.randn(rows, cols, generator=random).numpy(), fmt))
        return packed

    return PackedExperts(stack(INTERMEDIATE, HIDDEN), stack(INTERMEDIATE, HIDDEN), stack(HIDDEN, INTERMEDIATE))


@pytest.fixture
def mailbox() -> Mailbox:
    return Mailbox.of(MAX_TOKENS, HIDDEN, TOP_K, pinned=False)


def request(box: Mailbox, seed: int, num_tokens: int, hits: int = 0) -> tuple[torch.Tensor, ...]:
    """Random inputs of one request; the first `hits` experts of each token are computed elsewhere."""
    random = torch.Generator().manual_seed(seed)
    x = torch.randn(num_tokens, HIDDEN, generator=random)
    chosen = torch.stack([torch.randperm(NUM_EXPERTS, generator=random)[:TOP_K] for _ in range(num_tokens)])
    experts = chosen.clone()
    experts[:, :hits] = -1
    return x, chosen, experts, torch.rand(num_tokens, TOP_K, generator=random)


def ask(box: Mailbox, number: int, inputs: tuple[torch.Tensor, ...]) -> torch.Tensor:
    """What a GPU does: write a request, wait, take the answer."""
    num_tokens = len(inputs[0])
    for field, values in zip((box.hidden, box.chosen, box.experts, box.weights), inputs, strict=True):
        field[:num_tokens] = values
    box.requested[0] = number
    while int(box.answered[0]) < number:
        time.sleep(0)
    return box.output[:num_tokens].clone()


def test_every_layer_of_every_step_gets_its_own_answer(mailbox: Mailbox) -> None:
    layers = [make_experts(seed) for seed in range(3)]
    server = ExpertServer(mailbox, layers, count_uses=True)
    answers: list[torch.Tensor] = []
    sizes = [2, 2]  # tokens of the two steps
    inputs = [request(mailbox, seed, sizes[seed // 3], hits=seed % 2) for seed in range(6)]
    gpu = threading.Thread(
        target=lambda: answers.extend(ask(mailbox, number, inputs[number - 1]) for number in range(1, 7))
    )
    gpu.start()
    times = torch.zeros(3, 2, dtype=torch.int64)
    server.serve(sizes[0], times=times)
    server.serve(sizes[1], num_layers=1)
    server.serve(sizes[1], first_layer=1)
    gpu.join()
    for index, (x, _, experts, weights) in enumerate(inputs):
        expected = moe_forward(x, experts, weights, layers[index % 3])
        torch.testing.assert_close(answers[index], expected, rtol=0, atol=0)
    assert (times[:, 1] >= times[:, 0]).all() and (times[1:, 0] >= times[:-1, 1]).all()
    for layer in range(3):
        chosen = torch.cat([inputs[layer][1].flatten(), inputs[layer + 3][1].flatten()])
        assert server.uses[layer].tolist() == torch.bincount(chosen, minlength=NUM_EXPERTS).tolist()


def test_hits_alone_leave_nothing_to_add(mailbox: Mailbox) -> None:
    server = ExpertServer(mailbox, [make_experts(0)])
    inputs = request(mailbox, 1, num_tokens=2, hits=TOP_K)
    mailbox.output.fill_(7.0)
    answers: list[torch.Tensor] = []
    gpu = threading.Thread(target=lambda: answers.append(ask(mailbox, 1, inputs)))
    gpu.start()
    server.serve(2)
    gpu.join()
    assert not answers[0].any()


def test_a_request_that_does_not_come_frees_whoever_waits(mailbox: Mailbox) -> None:
    layers = [make_experts(0), make_experts(1)]
    server = ExpertServer(mailbox, layers)
    answers: list[torch.Tensor] = []
    gpu = threading.Thread(target=lambda: answers.append(ask(mailbox, 1, request(mailbox, 0, 1))))
    gpu.start()
    started = time.perf_counter()
    with pytest.raises(ExpertTimeoutError, match=r"layer 1 within 0\.2 s"):
        server.serve(1, timeout=0.2)
    assert 0.15 < time.perf_counter() - started < 5
    gpu.join()
    ask(mailbox, 2, request(mailbox, 0, 1))  # a later poll passes: nobody serves, and it returns
    server.restart()
    x, chosen, experts, weights = request(mailbox, 5, 1)
    gpu = threading.Thread(target=lambda: answers.append(ask(mailbox, 1, (x, chosen, experts, weights))))
    gpu.start()
    server.serve(1, num_layers=1)
    gpu.join()
    torch.testing.assert_close(answers[-1], moe_forward(x, experts, weights, layers[0]), rtol=0, atol=0)


def test_more_tokens_than_the_mailbox_holds_are_refused(mailbox: Mailbox) -> None:
    server = ExpertServer(mailbox, [make_experts(0)])
    with pytest.raises(KernelError, match="5 tokens in a mailbox for 1 to 4"):
        server.serve(MAX_TOKENS + 1)
