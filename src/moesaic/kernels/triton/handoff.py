"""The GPU's side of the hand-off: ask the CPU for routed experts, go on, and take the answer.

The kernels work on memory of the CPU that the GPU sees (a `Mailbox`). For few tokens a router writes most of a request,
and often all (`request`); otherwise it is written when the router has decided (`hand_off`). Request numbers come from a
counter in device memory, so that a captured graph asks with new numbers each time. Only one warp polls: more of them
make each read over PCIe slower. It does not know who answers.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from moesaic import _native
from moesaic.kernels.handoff import Mailbox
from moesaic.kernels.triton.activations import Lanes
from moesaic.kernels.triton.combine_norm import NormBefore, combine_norm
from moesaic.kernels.triton.elementwise import combine
from moesaic.kernels.triton.route import Request

__all__ = ["Exchange"]

_SECONDS_PER_POLL = 1e-6  # a read over PCIe, until it is measured


@triton.jit(do_not_specialize=["position", "num_choices"])
def _hand_off(
    hidden_ptr, chosen_ptr, experts_ptr, weights_ptr,
    box_hidden_ptr, box_chosen_ptr, box_experts_ptr, box_weights_ptr,
    requested_ptr, base_ptr, position, num_values, num_choices, BLOCK: tl.constexpr, CHOICES: tl.constexpr,
):  # fmt: skip
    for start in range(0, num_values, BLOCK):
        offsets = start + tl.arange(0, BLOCK)
        inside = offsets < num_values
        tl.store(box_hidden_ptr + offsets, tl.load(hidden_ptr + offsets, mask=inside), mask=inside)
    choice = tl.arange(0, CHOICES)
    inside = choice < num_choices
    tl.store(box_chosen_ptr + choice, tl.load(chosen_ptr + choice, mask=inside), mask=inside)
    tl.store(box_experts_ptr + choice, tl.load(experts_ptr + choice, mask=inside), mask=inside)
    tl.store(box_weights_ptr + choice, tl.load(weights_ptr + choice, mask=inside), mask=inside)
    number = tl.load(base_ptr) + position + 1
    # All threads' stores come before the barrier, and with it before the release of the one that stores the number.
    tl.debug_barrier()
    tl.atomic_xchg(requested_ptr, number, sem="release", scope="sys")


@triton.jit(do_not_specialize=["position", "max_polls"])
def _wait(answered_ptr, base_ptr, failed_ptr, position, max_polls):
    """One warp polls; a kernel that comes after it reads the answer like any memory."""
    number = tl.load(base_ptr) + position + 1
    seen = tl.load(answered_ptr, volatile=True)
    failed = tl.load(failed_ptr)
    polls = 0
    while (seen < number) & (polls < max_polls) & (failed == 0):
        seen = tl.load(answered_ptr, volatile=True)
        polls += 1
    if seen < number:
        tl.store(failed_ptr, 1)


@triton.jit(do_not_specialize=["position", "max_polls"])
def _wait_there(arrived_ptr, answered_ptr, base_ptr, failed_ptr, position, max_polls, GAVE_UP: tl.constexpr):
    """As `_wait`, for a number in the GPU's own memory; whoever gives up does so where answers are awaited."""
    number = tl.load(base_ptr) + position + 1
    seen = tl.load(arrived_ptr, volatile=True)
    answered = tl.load(answered_ptr, volatile=True)
    failed = tl.load(failed_ptr)
    polls = 0
    while (seen < number) & (answered < GAVE_UP) & (polls < max_polls) & (failed == 0):
        seen = tl.load(arrived_ptr, volatile=True)
        answered = tl.load(answered_ptr, volatile=True)
        polls += 1
    if (seen < number) & (answered < GAVE_UP):
        tl.store(failed_ptr, 1)


@triton.jit(do_not_specialize=["count"])
def _advance(base_ptr, failed_ptr, report_ptr, count):
    tl.store(base_ptr, tl.load(base_ptr) + count)
    tl.store(report_ptr, tl.load(failed_ptr))


class Exchange:
    """A mailbox as the GPU uses it.

    Args:
        mailbox: in page-locked memory; None if the CPU computes nothing.
        device: the GPU.

    Attributes:
        base: int64 `[1]`, on the device: number of the last request of the steps before.
        failed: int32 `[1]`, on the device: not 0 after a poll that waited too long.
    """

    def __init__(self, mailbox: Mailbox | None, device: torch.device) -> None:
        self.mailbox = mailbox
        self.base = torch.zeros(1, dtype=torch.int64, device=device)
        self.failed = torch.zeros(1, dtype=torch.int32, device=device)
        self._arrivals = torch.zeros(1, dtype=torch.int32, device=device)
        self._foretold: Request | None = None
        self.max_polls = round(30.0 / _SECONDS_PER_POLL)

    def set_timeout(self, seconds: float, seconds_per_poll: float = _SECONDS_PER_POLL) -> None:
        """Let polls of kernels that are launched (or captured) from now on wait for about `seconds`."""
        self.max_polls = max(1, min(round(seconds / seconds_per_poll), 2**31 - 1))

    def request(self, position: int) -> Request:
        """For routers: where to write a request, `position` of its step; see `route` and `router_logits`."""
        box = self._box()
        return Request(
            box.hidden, box.chosen, box.experts, box.weights, box.requested, self.base, self._arrivals, position
        )

    def forecast(self, position: int) -> Request:
        """As `request`, for what a router says of a request before it is made: only its experts reach the CPU."""
        if self._foretold is None:
            box, device = self._box(), self.base.device
            chosen = torch.zeros(box.chosen.shape, dtype=torch.int64, device=device)
            weights = torch.zeros(box.weights.shape, device=device)
            arrivals = torch.zeros_like(self._arrivals)  # it may be under way while a request is
            self._foretold = Request(
                box.hidden, chosen, box.likely, weights, box.foretold, self.base, arrivals, position
            )
        return self._foretold._replace(position=position)

    def hand_off(
        self,
        position: int,
        hidden: torch.Tensor,
        chosen: torch.Tensor,
        experts: torch.Tensor,
        weights: torch.Tensor,
    ) -> None:
        """Ask for experts.

        Args:
            position: which request of the step this is, from 0 on.
            hidden: float32 `[tokens, hidden_size]`, contiguous.
            chosen: int64 `[tokens, top_k]`, the router's choice.
            experts: int64 `[tokens, top_k]`, those that do not lie on the GPU, and -1 in the other places.
            weights: float32 `[tokens, top_k]`.
        """
        box = self._box()
        _hand_off[(1,)](
            hidden, chosen, experts, weights, box.hidden, box.chosen, box.experts, box.weights, box.requested,
            self.base, position, hidden.numel(), chosen.numel(), BLOCK=4096,
            CHOICES=triton.next_power_of_2(chosen.numel()), num_warps=16,
        )  # fmt: skip

    def wait_there(self, position: int, arrived: torch.Tensor) -> None:
        """Let what follows wait until something that the CPU sends has arrived.

        Args:
            position: of the request that it belongs to.
            arrived: int64 `[1]` on the device, which then becomes the number of that request, or a later one.
        """
        box = self._box()
        _wait_there[(1,)](
            arrived, box.answered, self.base, self.failed, position, self.max_polls, _native.GAVE_UP, num_warps=1
        )  # fmt: skip

    def take_back(
        self,
        position: int | None,
        hidden: torch.Tensor,
        *,
        shared: torch.Tensor | None = None,
        shared_gate: torch.Tensor | None = None,
        cached: torch.Tensor | None = None,
        scale: float = 1.0,
        then: NormBefore | None = None,
    ) -> Lanes | None:
        """`hidden += scale * (answer + sigmoid(gate) * shared + cached)`, in place, when the answer is there.

        Args:
            position: of the request; None: nothing was asked.
            hidden: float32 `[tokens, hidden_size]`, contiguous.
            shared: output of the shared experts, like hidden.
            shared_gate: float32 `[tokens, 1]`, or None.
            cached: output of the experts on the GPU, like hidden.
            scale: of all that is added.
            then: the norm of what follows, for few tokens.

        Returns:
            What follows reads, if `then` is given.
        """
        answer = None
        if position is not None:
            box = self._box()
            if then is not None and then.ahead is not None:
                then.ahead.launch()
            _wait[(1,)](box.answered, self.base, self.failed, position, self.max_polls, num_warps=1)
            answer = box.output[: len(hidden)]
        if then is not None:
            return combine_norm(hidden, shared, cached, answer, scale, shared_gate, then)
        combine(hidden, shared, cached, answer, scale, shared_gate)
        return None

    def advance(self, count: int, report: torch.Tensor | None = None) -> None:
        """Count the requests of a step; the last thing that a step does.

        Args:
            count: how many there were.
            report: int32 `[1]` in page-locked memory, which gets what `failed` is.
        """
        _advance[(1,)](self.base, self.failed, self.failed if report is None else report, count)

    def restart(self) -> None:
        """Begin to count anew after a failure, together with the server."""
        self.base.zero_()
        self.failed.zero_()

    def _box(self) -> Mailbox:
        assert self.mailbox is not None
        return self.mailbox
