"""What a round trip between GPU and CPU costs inside a CUDA graph, beside the experts' work itself.

    python benchmarks/handoff.py [--layers 61] [--hidden 7168] [--top-k 8] [--tokens 1,8]

A graph asks for the experts of each layer and takes the answer; the experts are all computed elsewhere, so the CPU has
nothing to do but to answer. Printed: microseconds per layer, median of the replays, the same without asking, and the
difference, which is the round trip. As steps of few tokens do it, the router writes the request and the norm of what
follows reads the answer ("router"); as others do it, that takes a launch of its own ("launch"). Without asking, the
same router chooses and the same norm follows. Then the CPU stays away: the graph has to end by itself, the failure to
be seen, and the next step to work.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch

from moesaic.errors import ExpertTimeoutError
from moesaic.kernels import PackedExperts, PackedTensor
from moesaic.kernels.block_parts import RouteOptions
from moesaic.kernels.handoff import ExpertServer, Mailbox
from moesaic.kernels.triton.combine_norm import NormBefore
from moesaic.kernels.triton.formats import device_format
from moesaic.kernels.triton.handoff import Exchange
from moesaic.kernels.triton.route import route, router_logits
from moesaic.quant import get_format

NUM_EXPERTS = 256  # that the router chooses from


def make_experts(hidden: int) -> PackedExperts:
    """Two experts as small as they get; their values do not matter."""
    fmt = get_format("F32")
    up, down = PackedTensor.empty(fmt, 32, hidden, 2), PackedTensor.empty(fmt, hidden, 32, 2)
    for packed in (up, down):
        packed.data.zero_()
    return PackedExperts(up, up, down)


class RoundTrips:
    """A graph of `layers` requests of `num_tokens` tokens, which the router writes, or a launch of its own."""

    def __init__(self, layers: int, hidden: int, top_k: int, num_tokens: int, by_router: bool = True) -> None:
        device = torch.device("cuda")
        self.by_router = by_router
        experts = make_experts(hidden)
        self.layers, self.num_tokens = layers, num_tokens
        self.server = ExpertServer(Mailbox.of(num_tokens, hidden, top_k, pinned=True), [experts] * layers)
        self.exchange = Exchange(self.server.mailbox, device)
        self.x = torch.randn(num_tokens, hidden, device=device)
        self.chosen = torch.zeros(num_tokens, top_k, dtype=torch.int64, device=device)
        self.misses = torch.full_like(self.chosen, -1)
        self.weights = torch.ones(num_tokens, top_k, device=device)
        self.out = torch.zeros_like(self.x)
        self.router = torch.randn(NUM_EXPERTS, hidden, device=device)
        self.options = RouteOptions(top_k, score="sigmoid", normalize=True)
        self.slots = torch.zeros(NUM_EXPERTS, dtype=torch.int32, device=device)  # nothing is left to the CPU
        self.norm = NormBefore(torch.ones(hidden, device=device), 1e-6, device_format(get_format("Q4_K"), hidden))
        self._load_kernels()

    def _load_kernels(self) -> None:
        """Compile and load everything: a GPU on which a kernel waits may not load another one."""
        self.server.give_up()
        self.step(ask=True)
        self.step(ask=False)
        torch.cuda.synchronize()
        self.server.restart()
        self.exchange.restart()

    def step(self, ask: bool) -> None:
        """The kernels of one step."""
        for layer in range(self.layers):
            if self.by_router:
                request = self.exchange.request(layer) if ask else None
                box = None if request is None else request.hidden
                logits = router_logits(self.x, self.router, box_hidden=box)
                route(logits, self.options, slot_of_expert=self.slots, request=request)
            elif ask:
                self.exchange.hand_off(layer, self.x, self.chosen, self.misses, self.weights)
            then = self.norm if self.by_router else None
            self.exchange.take_back(layer if ask else None, self.out, shared=self.x, then=then)
        self.exchange.advance(self.layers if ask else 0)

    def capture(self, ask: bool) -> torch.cuda.CUDAGraph:
        """The step as a graph; kernels are compiled before."""
        self.step(ask)
        if ask:
            self.server.serve(self.num_tokens)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self.step(ask)
        return graph

    def time(self, ask: bool, repeat: int = 30) -> float:
        """Microseconds per layer."""
        graph = self.capture(ask)
        times = []
        for _ in range(repeat):
            started = time.perf_counter()
            graph.replay()
            if ask:
                self.server.serve(self.num_tokens)
            torch.cuda.synchronize()
            times.append((time.perf_counter() - started) / self.layers * 1e6)
        return statistics.median(times)


def check_answers(trips: RoundTrips) -> None:
    """An answer of all zeros adds nothing: the output is the sum of the shared part."""
    trips.out.zero_()
    trips.step(ask=True)
    trips.server.serve(trips.num_tokens)
    torch.cuda.synchronize()
    torch.testing.assert_close(trips.out, trips.x * trips.layers, rtol=1e-5, atol=1e-5)
    print("answers: right")


def check_silence(trips: RoundTrips, seconds: float = 0.5) -> None:
    """Nobody serves; then somebody does, too late; then all is well again."""
    trips.exchange.set_timeout(seconds)
    graph = trips.capture(ask=True)
    started = time.perf_counter()
    graph.replay()
    torch.cuda.synchronize()
    elapsed = time.perf_counter() - started
    print(
        f"silent CPU: the graph ended after {elapsed:.2f} s (asked: {seconds}), failed = {int(trips.exchange.failed)}"
    )
    assert int(trips.exchange.failed) == 1 and elapsed < 20 * seconds
    trips.server.restart()
    trips.exchange.restart()
    graph.replay()
    trips.server.serve(trips.num_tokens)
    torch.cuda.synchronize()
    assert int(trips.exchange.failed) == 0
    try:
        trips.server.serve(trips.num_tokens, timeout=0.2)
        raise AssertionError("a request that nobody made was served")
    except ExpertTimeoutError as error:
        print(f"silent GPU: {error}")
    trips.server.restart()
    trips.exchange.restart()
    graph.replay()
    trips.server.serve(trips.num_tokens)
    torch.cuda.synchronize()
    print("after both failures: works")


def main(argv: list[str] | None = None, say: Callable[[str], None] = print) -> None:
    """Measure and check."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=61)
    parser.add_argument("--hidden", type=int, default=7168)
    parser.add_argument("--top-k", type=int, default=8)
    parser.add_argument("--tokens", default="1,8")
    arguments = parser.parse_args(argv)
    for num_tokens in map(int, arguments.tokens.split(",")):
        for by_router in (True, False):
            trips = RoundTrips(arguments.layers, arguments.hidden, arguments.top_k, num_tokens, by_router)
            check_answers(trips)
            with_cpu, without = trips.time(ask=True), trips.time(ask=False)
            way = "router" if by_router else "launch"
            say(
                f"{num_tokens} tokens, {way}: {with_cpu:.2f} us per layer with the CPU, {without:.2f} without: "
                f"{with_cpu - without:.2f} us for the round trip"
            )
    check_silence(RoundTrips(arguments.layers, arguments.hidden, arguments.top_k, 1))


if __name__ == "__main__":
    main()
