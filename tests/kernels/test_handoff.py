"""The CPU's side of the hand-off, asked by a thread that does what a GPU does."""

from __future__ import annotations

import threading
import time
from typing import Any

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
    times = torch.zeros(3, 3, dtype=torch.int64)
    server.serve(sizes[0], times=times)
    server.serve(sizes[1], num_layers=1)
    server.serve(sizes[1], first_layer=1)
    gpu.join()
    for index, (x, _, experts, weights) in enumerate(inputs):
        expected = moe_forward(x, experts, weights, layers[index % 3])
        torch.testing.assert_close(answers[index], expected, rtol=0, atol=0)
    assert (times[:, 1] >= times[:, 0]).all() and (times[1:, 0] >= times[:-1, 1]).all()
    assert torch.equal(times[:, 1], times[:, 2])
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


def split_by_weight(inputs: tuple[torch.Tensor, ...], count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Experts that are on time, and those of the lowest weights, which are late; -1 in the other places."""
    _, _, experts, weights = inputs
    now, late = experts.clone(), torch.full_like(experts, -1)
    for token in range(len(experts)):
        for place in sorted(range(TOP_K), key=lambda place: (float(weights[token, place]), -place))[:count]:
            late[token, place], now[token, place] = experts[token, place], -1
    return now, late


def serve_answers(server: ExpertServer, inputs: list[tuple[torch.Tensor, ...]], **options: Any) -> list[torch.Tensor]:
    """Ask for one layer after the other, and serve; the answers."""
    answers: list[torch.Tensor] = []
    first = server.next_request
    gpu = threading.Thread(
        target=lambda: answers.extend(ask(server.mailbox, first + i, each) for i, each in enumerate(inputs))
    )
    gpu.start()
    try:
        server.serve(len(inputs[0][0]), **options)
    finally:
        gpu.join()
    return answers


@pytest.mark.parametrize("count", [1, 2])
def test_what_is_put_off_comes_with_the_next_answer(mailbox: Mailbox, count: int) -> None:
    """Row by row; the last layer puts nothing off, and steps know nothing of each other."""
    layers = [make_experts(seed) for seed in range(3)]
    server = ExpertServer(mailbox, layers)
    server.defer(count)
    for step in range(2):
        inputs = [request(mailbox, 10 * step + layer, num_tokens=3, hits=layer % 2) for layer in range(3)]
        for each in inputs:
            each[3][0] = 0.5  # equal weights: the later are late
        times = torch.zeros(3, 3, dtype=torch.int64)
        answers = serve_answers(server, inputs, times=times)
        carried = torch.zeros(3, HIDDEN)
        for layer, (x, _, experts, weights) in enumerate(inputs):
            now, late = (experts, torch.full_like(experts, -1)) if layer == 2 else split_by_weight(inputs[layer], count)
            expected = moe_forward(x, now, weights, layers[layer]) + carried
            torch.testing.assert_close(answers[layer], expected, rtol=0, atol=0)
            carried = moe_forward(x, late, weights, layers[layer])
            assert bool(carried.any()) == (layer < 2)
        assert (times[:, 2] > times[:, 1]).tolist() == [True, True, False]
        assert (times[1:, 0] >= times[:-1, 2]).all()


def test_what_is_put_off_outlives_a_call_but_no_failure(mailbox: Mailbox) -> None:
    layers = [make_experts(0), make_experts(1)]
    server = ExpertServer(mailbox, layers)
    server.defer(2)
    first, second = request(mailbox, 0, 2), request(mailbox, 1, 2)
    _, late = split_by_weight(first, 2)
    x, _, experts, weights = second
    alone = moe_forward(x, experts, weights, layers[1])
    serve_answers(server, [first], num_layers=1)
    answers = serve_answers(server, [second], first_layer=1)
    torch.testing.assert_close(answers[0], alone + moe_forward(first[0], late, first[3], layers[0]), rtol=0, atol=0)

    with pytest.raises(ExpertTimeoutError, match="layer 1"):
        serve_answers(server, [first], timeout=0.2)
    server.restart()
    torch.testing.assert_close(serve_answers(server, [second], first_layer=1)[0], alone, rtol=0, atol=0)

    serve_answers(server, [first], num_layers=1)
    server.restart()  # somebody else failed
    torch.testing.assert_close(serve_answers(server, [second], first_layer=1)[0], alone, rtol=0, atol=0)


def test_a_failure_in_what_was_put_off_frees_whoever_waits(mailbox: Mailbox) -> None:
    """The next layer has fewer tokens, to which what was put off cannot be added."""
    server = ExpertServer(mailbox, [make_experts(0), make_experts(1)])
    server.defer(1)
    serve_answers(server, [request(mailbox, 0, 2)], num_layers=1)
    with pytest.raises(RuntimeError, match="different numbers of tokens"):
        serve_answers(server, [request(mailbox, 1, 1)], first_layer=1)
    assert int(mailbox.answered) > 2**62
    server.restart()
    x, _, experts, weights = inputs = request(mailbox, 2, 1)
    expected = moe_forward(x, experts, weights, server.layers[1])
    torch.testing.assert_close(serve_answers(server, [inputs], first_layer=1)[0], expected, rtol=0, atol=0)


def test_weights_that_are_no_numbers_break_nothing(mailbox: Mailbox) -> None:
    server = ExpertServer(mailbox, [make_experts(0), make_experts(1)])
    server.defer(1)
    inputs = [request(mailbox, seed, 2) for seed in range(2)]
    inputs[0][3][0] = float("nan")
    assert torch.isfinite(serve_answers(server, inputs)[1][1]).all()


def test_at_least_one_expert_is_on_time(mailbox: Mailbox) -> None:
    server = ExpertServer(mailbox, [make_experts(0)])
    for count in (-1, TOP_K):
        with pytest.raises(KernelError, match=f"{count} of {TOP_K} experts .* expected 0 to {TOP_K - 1}"):
            server.defer(count)
    assert server.deferred == 0


def foretell(box: Mailbox, number: int, experts: torch.Tensor) -> None:
    """What a GPU does before it asks."""
    box.likely[: len(experts)] = experts
    box.foretold[0] = number


@pytest.mark.parametrize("likely", ["right", "partly", "none"])
def test_what_is_foretold_is_read_ahead_and_changes_no_answer(mailbox: Mailbox, likely: str) -> None:
    layers = [make_experts(0), make_experts(1)]
    server = ExpertServer(mailbox, layers)
    server.read_ahead(True)
    first, second = request(mailbox, 1, 2), request(mailbox, 2, 2, hits=1)
    asked = sorted({int(expert) for expert in second[2].flatten() if expert >= 0})
    rows = {
        "right": second[2],
        "partly": torch.tensor([[asked[0], -1, 99], [asked[1], asked[0], (asked[-1] + 1) % NUM_EXPERTS]]),
        "none": torch.full((2, TOP_K), -1),
    }[likely]
    answers: list[torch.Tensor] = []

    def gpu() -> None:
        answers.append(ask(mailbox, 1, first))
        foretell(mailbox, 2, rows)
        time.sleep(0.1)
        answers.append(ask(mailbox, 2, second))

    thread = threading.Thread(target=gpu)
    thread.start()
    server.serve(2)
    thread.join()
    for (x, _, experts, weights), answer, layer in zip((first, second), answers, layers, strict=True):
        torch.testing.assert_close(answer, moe_forward(x, experts, weights, layer), rtol=0, atol=0)
    read = {int(expert) for expert in rows.flatten() if 0 <= expert < NUM_EXPERTS}
    assert (server.num_read, server.num_asked) == (len(read), len(read.intersection(asked)))


def test_nothing_is_read_ahead_for_another_request_or_unasked(mailbox: Mailbox) -> None:
    server = ExpertServer(mailbox, [make_experts(0)] * 3)
    inputs = [request(mailbox, seed, 1) for seed in range(3)]
    foretell(mailbox, 1, inputs[0][2])
    serve_answers(server, inputs)  # nobody switched it on
    server.read_ahead(True)
    foretell(mailbox, 2, inputs[0][2])  # of a request that is over
    serve_answers(server, inputs)
    assert server.num_read == 0
    server.read_ahead(False)
    foretell(mailbox, server.next_request, inputs[0][2])
    serve_answers(server, inputs)
    assert server.num_read == 0


def test_a_failure_forgets_what_was_foretold(mailbox: Mailbox) -> None:
    server = ExpertServer(mailbox, [make_experts(0)])
    server.read_ahead(True)
    foretell(mailbox, 1, torch.zeros(1, TOP_K, dtype=torch.int64))
    with pytest.raises(ExpertTimeoutError, match="layer 0"):
        server.serve(1, timeout=0.05)
    assert server.num_read == 0  # nobody asked
    server.restart()
    assert int(mailbox.foretold[0]) == 0
