"""Both ends of the way on which steps of a runner ask the CPU for experts: the GPU's exchange and who serves it.

It knows which layers ask, and what to do when one side does not answer; neither sequences nor graphs.
"""

from __future__ import annotations

import torch

from moesaic.engine.gpu.paths import EagerPath, GraphPath
from moesaic.engine.gpu.slots import ExpertSlots
from moesaic.engine.gpu.streams import SideStream
from moesaic.engine.gpu.uploads import MissUploads
from moesaic.errors import ExpertTimeoutError, KernelError
from moesaic.kernels.handoff import ExpertServer, Mailbox
from moesaic.kernels.triton.handoff import Exchange
from moesaic.modules.gpu.decoder import GpuDecoder
from moesaic.modules.gpu.step import ExpertPath

__all__ = ["HandOff"]


class HandOff:
    """A mailbox with both its ends.

    Args:
        decoder: the model.
        slots: says which layers' experts are all on the GPU.
        max_batch: most tokens of a request.
        timeout: seconds that GPU and CPU wait for each other.
        reads_ahead: whether captured steps foretell requests, and the CPU reads ahead what is foretold.

    Attributes:
        exchange: the GPU's side.
        server: the CPU's side; None if it has no experts.
        served: layers, of those with routed experts, whose experts the CPU is asked for.
        times: see `ExpertServer.serve`; filled by `serve` if it is set.
    """

    def __init__(
        self, decoder: GpuDecoder, slots: ExpertSlots, max_batch: int, timeout: float, reads_ahead: bool = True
    ) -> None:
        device, self._timeout = decoder.device, timeout
        self._positions, self.served = _request_positions(
            [slots.is_complete(layer) for layer in range(len(decoder.routed))]
        )
        mailbox = None
        self.server: ExpertServer | None = None
        if self.served:
            mailbox = Mailbox.of(max_batch, decoder.hidden_size, decoder.top_k, pinned=device.type == "cuda")
            experts = [experts for experts in decoder.routed if experts is not None]
            assert len(experts) == len(self.served)
            self.server = ExpertServer(mailbox, experts, count_uses=True)
        self.exchange = Exchange(mailbox, device)
        self.exchange.set_timeout(timeout)
        self._failed = torch.zeros(1, dtype=torch.int32, pin_memory=device.type == "cuda")
        self._seen_failed = self._failed.numpy()  # the same memory: a tensor's number takes longer to read
        self.times: torch.Tensor | None = None
        self._forecasts: SideStream | None = None
        self.reads_ahead = reads_ahead

    @property
    def reads_ahead(self) -> bool:
        """As given. Graphs that were captured before foretell as they did: who changes it makes them anew."""
        return self._forecasts is not None

    @reads_ahead.setter
    def reads_ahead(self, is_on: bool) -> None:
        self._forecasts = SideStream(self.exchange.base.device) if is_on else None
        if self.server is not None:
            self.server.read_ahead(is_on)

    def defer(self, count: int) -> None:
        """From the next step on, `count` experts of each token arrive one layer late; see `ExpertServer.defer`.

        Raises:
            KernelError: a token has not so many, or the CPU has none.
        """
        if self.server is None:
            raise KernelError("experts that all lie on the GPU cannot arrive late.")
        self.server.defer(count)

    def graph_path(self, slots: ExpertSlots, uploads: MissUploads | None) -> ExpertPath:
        """Who computes experts in a step that is captured, with these slots and uploads; then `serve` serves it."""
        return GraphPath(self.exchange, slots, self._positions, uploads, self._forecasts)

    def eager_path(self, slots: ExpertSlots, uploads: MissUploads | None, num_tokens: int) -> ExpertPath:
        """The same in a step without a graph, of so many tokens that are no padding; nobody else serves it."""
        if self.server is None:
            return self.graph_path(slots, None)
        return EagerPath(
            self.exchange,
            slots,
            self._positions,
            self.server,
            num_tokens,
            self._timeout,
            uploads,
            self._forecasts,
        )

    def end_step(self) -> None:
        """The last thing that a step's GPU does: count its requests, and let the CPU see whether all were answered."""
        self.exchange.advance(0 if self.server is None else len(self.server.layers), self._failed)

    def serve(self, num_tokens: int, uploads: MissUploads | None) -> None:
        """Answer all requests of a step of so many tokens; with `uploads`, if its graph waits for some.

        Raises:
            ExpertTimeoutError: a request did not come.
            KernelError: the driver refused to copy experts.
        """
        if self.server is not None:
            sender = None if uploads is None else uploads.sender
            self.server.serve(num_tokens, timeout=self._timeout, times=self.times, uploads=sender)

    def check(self) -> None:
        """When a step is over: raise an ExpertTimeoutError if the GPU waited for an answer too long."""
        if self._seen_failed[0]:
            raise ExpertTimeoutError(
                f"the CPU did not answer the GPU within {self._timeout:g} s: the computer is overloaded or the "
                "process was stopped. The request failed; the next one may be tried."
            )

    def recover(self, uploads: MissUploads | None) -> None:
        """After a failure: let the GPU drain, and begin to count requests anew, those of `uploads` too."""
        if self.server is None:
            return
        self.server.give_up()
        if self.exchange.base.is_cuda:
            torch.cuda.synchronize()
        self.server.restart()
        self.exchange.restart()
        if uploads is not None:
            uploads.restart()
        self._failed.zero_()


def _request_positions(on_gpu: list[bool]) -> tuple[list[int | None], list[int]]:
    """Of each layer with routed experts its request's position in a step, and the layers that are asked for."""
    positions: list[int | None] = []
    served: list[int] = []
    for layer, complete in enumerate(on_gpu):
        positions.append(None if complete else len(served))
        if not complete:
            served.append(layer)
    return positions, served
