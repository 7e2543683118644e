"""Who computes routed experts in a step, for steps of few tokens: the CPU through the mailbox, the GPU from slots.

`GraphPath` is for capture: it only launches, and somebody serves all requests when the graph runs. `EagerPath` serves
each request where the layer needs it. Neither decides which experts lie on the GPU.
"""

from __future__ import annotations

import torch

from moesaic.engine.gpu.slots import ExpertSlots
from moesaic.engine.gpu.uploads import MissUploads
from moesaic.kernels.handoff import ExpertServer
from moesaic.kernels.triton.activations import Lanes
from moesaic.kernels.triton.combine_norm import NormBefore
from moesaic.kernels.triton.handoff import Exchange
from moesaic.kernels.triton.route import Request
from moesaic.modules.gpu.step import Routed

__all__ = ["EagerPath", "GraphPath"]


class GraphPath:
    """Asks, goes on, and takes the answer; the requests are served by whoever replays the graph.

    Args:
        exchange: the GPU's side of the mailbox.
        slots: experts on the GPU.
        positions: of each layer, the position of its request in a step; None for layers without requests.
        uploads: some misses come to the GPU instead; None: all are the CPU's.
    """

    def __init__(
        self,
        exchange: Exchange,
        slots: ExpertSlots,
        positions: list[int | None],
        uploads: MissUploads | None = None,
    ) -> None:
        self._exchange, self._slots, self._positions, self._uploads = exchange, slots, positions, uploads

    def table(self, layer: int) -> torch.Tensor | None:
        """As `ExpertPath`."""
        return self._slots.table(layer)

    def request(self, layer: int) -> Request | None:
        """As `ExpertPath`."""
        position = self._positions[layer]
        return None if position is None else self._exchange.request(position)

    def start(self, routed: Routed) -> None:
        """Ask the CPU, unless the router has."""
        position = self._positions[routed.layer]
        if position is not None and routed.request is None:
            self._exchange.hand_off(position, routed.hidden, routed.chosen, routed.misses, routed.weights)

    def finish(
        self,
        routed: Routed,
        residual: torch.Tensor,
        shared: torch.Tensor | None,
        shared_gate: torch.Tensor | None,
        scale: float,
        then: NormBefore | None = None,
    ) -> Lanes | None:
        """Compute what lies on the GPU, and add everything up."""
        cached = self._slots.compute(routed)
        position = self._positions[routed.layer]
        if self._uploads is None or position is None:
            self._answer(position)
        else:
            if then is not None and then.ahead is not None:  # while experts are on their way
                then.ahead.launch()
                then = then._replace(ahead=None)
            self._answer(position)
            cached = self._uploads.compute(self._exchange, position, routed, cached)
        return self._exchange.take_back(
            position, residual, shared=shared, shared_gate=shared_gate, cached=cached, scale=scale, then=then
        )

    def _answer(self, position: int | None) -> None:
        """The CPU answers when the graph runs."""


class EagerPath(GraphPath):
    """The same without a graph: the calling thread serves each request in its turn.

    Args:
        exchange: as `GraphPath`.
        slots: as `GraphPath`.
        positions: as `GraphPath`.
        server: serves the requests.
        num_tokens: of the step that are no padding.
        timeout: seconds to wait for a request.
        uploads: as `GraphPath`.
    """

    def __init__(
        self,
        exchange: Exchange,
        slots: ExpertSlots,
        positions: list[int | None],
        server: ExpertServer,
        num_tokens: int,
        timeout: float,
        uploads: MissUploads | None = None,
    ) -> None:
        super().__init__(exchange, slots, positions, uploads)
        self._server, self._num_tokens, self._timeout = server, num_tokens, timeout

    def _answer(self, position: int | None) -> None:
        if position is not None:
            sender = None if self._uploads is None else self._uploads.sender
            self._server.serve(
                self._num_tokens, first_layer=position, num_layers=1, timeout=self._timeout, uploads=sender
            )
