"""The CPU's side of the hand-off: the memory through which a GPU asks for routed experts, and who answers.

The protocol is in csrc/handoff.h and docs/architecture.md ("Hand-off"). This module knows no GPU: where its tensors can
be seen by one is the business of whoever allocates them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from moesaic import _native
from moesaic.errors import ExpertTimeoutError, KernelError
from moesaic.kernels.expert_uploads import ExpertUploads
from moesaic.kernels.experts import PackedExperts

__all__ = ["ExpertServer", "Mailbox"]


@dataclass(frozen=True, slots=True, eq=False)
class Mailbox:
    """One request and its answer; requests follow each other, so one mailbox serves all layers.

    Attributes:
        hidden: float32 `[max_tokens, hidden_size]`, the experts' input.
        chosen: int64 `[max_tokens, top_k]`, the experts that the router chose.
        experts: int64 `[max_tokens, top_k]`, those of them that the CPU computes; -1: none.
        weights: float32 `[max_tokens, top_k]`.
        output: float32 `[max_tokens, hidden_size]`, the answer.
        requested: int64 `[1]`, number of the last complete request.
        answered: int64 `[1]`, number of the last complete answer.
        likely: int64 `[max_tokens, top_k]`, like `experts`, of a request that will come: what it will probably be, the
            surest of each token first.
        foretold: int64 `[1]`, number of the request that `likely` is of.
    """

    hidden: torch.Tensor
    chosen: torch.Tensor
    experts: torch.Tensor
    weights: torch.Tensor
    output: torch.Tensor
    requested: torch.Tensor
    answered: torch.Tensor
    likely: torch.Tensor
    foretold: torch.Tensor

    @classmethod
    def of(cls, max_tokens: int, hidden_size: int, top_k: int, *, pinned: bool) -> Mailbox:
        """A mailbox with room for `max_tokens` tokens.

        Args:
            max_tokens: of a request.
            hidden_size: width of a hidden state.
            top_k: experts per token.
            pinned: in page-locked memory, which a GPU can read and write while it computes.
        """

        def zeros(*shape: int, dtype: torch.dtype) -> torch.Tensor:
            return torch.zeros(shape, dtype=dtype, pin_memory=pinned)

        return cls(
            hidden=zeros(max_tokens, hidden_size, dtype=torch.float32),
            chosen=zeros(max_tokens, top_k, dtype=torch.int64),
            experts=zeros(max_tokens, top_k, dtype=torch.int64),
            weights=zeros(max_tokens, top_k, dtype=torch.float32),
            output=zeros(max_tokens, hidden_size, dtype=torch.float32),
            # Apart from each other: one is polled by the CPU, the other by the GPU.
            requested=zeros(64, dtype=torch.int64)[:1],
            answered=zeros(64, dtype=torch.int64)[:1],
            likely=zeros(max_tokens, top_k, dtype=torch.int64),
            foretold=zeros(64, dtype=torch.int64)[:1],
        )

    @property
    def max_tokens(self) -> int:
        """Tokens of a request, at most."""
        return self.hidden.shape[0]

    @property
    def nbytes(self) -> int:
        """Bytes of page-locked memory held."""
        return sum(
            getattr(self, name).nbytes for name in ("hidden", "chosen", "experts", "weights", "output", "likely")
        )


@dataclass(eq=False)
class ExpertServer:
    """Answers the requests of a step, on the thread that calls `serve` and those of the pool.

    Attributes:
        mailbox: where requests come in.
        layers: routed experts of the layers that are served, in order.
        count_uses: whether to count how often each expert is chosen.
        uses: int32 `[num_layers, num_experts]`, how often so far (a uint32; whoever reads it may set it back).
        next_request: number of the next request.
        deferred: experts of each token that come with the next layer's answer; see `defer`.
        reads_ahead: whether experts of requests that are foretold are read into the CPU's caches; see `read_ahead`.
    """

    mailbox: Mailbox
    layers: Sequence[PackedExperts]
    count_uses: bool = False
    uses: torch.Tensor = field(init=False)
    next_request: int = field(default=1, init=False)
    deferred: int = field(default=0, init=False)
    reads_ahead: bool = field(default=False, init=False)

    def __post_init__(self) -> None:
        box = self.mailbox
        for experts in self.layers:
            if experts.hidden != box.hidden.shape[1]:
                raise KernelError(
                    f"experts {experts.hidden} wide do not fit a mailbox that is {box.hidden.shape[1]} wide."
                )
        self.uses = torch.zeros(
            len(self.layers), max((experts.num_experts for experts in self.layers), default=0), dtype=torch.int32
        )
        described = [
            (experts.handle, self.uses[index].data_ptr() if self.count_uses else 0)
            for index, experts in enumerate(self.layers)
        ]
        self._native = _native.ExpertServer(
            box.requested.data_ptr(),
            box.answered.data_ptr(),
            box.hidden.data_ptr(),
            box.chosen.data_ptr(),
            box.experts.data_ptr(),
            box.weights.data_ptr(),
            box.output.data_ptr(),
            box.hidden.shape[0],
            box.hidden.shape[1],
            box.chosen.shape[1],
            described,
        )

    def defer(self, count: int) -> None:
        """From the next step on, compute some experts of a layer after its answer: they come with the next layer's.

        They are those of all `top_k` experts of a token whose weights are lowest, as far as they are the CPU's. Nothing
        of the last layer is put off.

        Args:
            count: how many; 0: none.

        Raises:
            KernelError: at least one expert of a token has to be on time.
        """
        top_k = self.mailbox.chosen.shape[1]
        if not 0 <= count < max(1, top_k):
            raise KernelError(f"{count} of {top_k} experts are to come a layer late: expected 0 to {top_k - 1}.")
        self._native.defer(count)
        self.deferred = count

    def read_ahead(self, is_on: bool) -> None:
        """From the next step on: whether to read what is foretold while nobody asks. Answers are the same anyway."""
        box = self.mailbox
        self._native.set_forecast(*((box.foretold.data_ptr(), box.likely.data_ptr()) if is_on else (0, 0)))
        self.reads_ahead = is_on

    @property
    def num_read(self) -> int:
        """Experts that were read ahead so far, of all layers."""
        return int(self._native.num_read)

    @property
    def num_asked(self) -> int:
        """Of these, those that requests then asked for."""
        return int(self._native.num_asked)

    def serve(
        self,
        num_tokens: int,
        *,
        first_layer: int = 0,
        num_layers: int | None = None,
        timeout: float = 30.0,
        times: torch.Tensor | None = None,
        uploads: ExpertUploads | None = None,
    ) -> None:
        """Answer one request for each of these layers, in order.

        Args:
            num_tokens: of every request.
            first_layer: position in `layers`.
            num_layers: how many; all from the first on if None.
            timeout: seconds to wait for each request.
            times: int64 `[num_layers, 3]` to be filled with the nanoseconds (of the monotonic clock) at which requests
                were seen, were answered, and what had been put off was computed, too.
            uploads: brings some of the experts to the GPU; made of the same `layers`.

        Raises:
            ExpertTimeoutError: a request did not come. All polls that wait for this mailbox pass from then on, until
                `restart`.
            KernelError: more tokens than the mailbox holds; the driver refused to copy experts.
        """
        count = len(self.layers) - first_layer if num_layers is None else num_layers
        if not 1 <= num_tokens <= self.mailbox.max_tokens:
            raise KernelError(f"{num_tokens} tokens in a mailbox for 1 to {self.mailbox.max_tokens}.")
        address = 0 if times is None else times.data_ptr()
        brings = None if uploads is None else uploads.native
        try:
            served = self._native.serve(first_layer, count, self.next_request, num_tokens, timeout, address, brings)
        except _native.CopyRefused as error:
            raise KernelError(f"Experts of a step could not be brought to the GPU: {error}.") from error
        if served < count:
            raise ExpertTimeoutError(
                f"the GPU did not ask for the experts of layer {first_layer + served} within {timeout:g} s: it is "
                "stuck or died. The request failed; the next one may be tried."
            )
        self.next_request += count

    def give_up(self) -> None:
        """Let everything on the GPU that waits for an answer pass, now and until `restart`."""
        self.mailbox.answered.fill_(_native.GAVE_UP)

    def restart(self) -> None:
        """Serve again after a failure; nothing on the GPU may be waiting."""
        self.next_request = 1
        self._native.forget()
        self.mailbox.requested.zero_()
        self.mailbox.foretold.zero_()
        self.mailbox.answered.zero_()
