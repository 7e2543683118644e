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
        uploads: brings some misses to the GPU; None: all are the CPU's.
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
        table = self._slots.table(layer)
        return self._uploads.landing.nowhere(layer) if table is None and self._uploads is not None else table

    def request(self, layer: int) -> Request | None:
        """As `ExpertPath`; with uploads, the choices of all tokens are looked at together before the CPU is asked."""
        position = self._positions[layer]
        if position is None:
            return None
        return self._exchange.request(position)._replace(completes=self._uploads is None)

    def start(self, routed: Routed) -> None:
        """Ask the CPU, unless the router has."""
        position = self._positions[routed.layer]
        if position is None:
            return
        if self._uploads is not None:
            self._uploads.hand_off(self._exchange, position, routed)
        elif routed.request is None:
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
        if self._uploads is not None and position is not None:
            if then is not None and then.ahead is not None:  # while experts are on their way
                then.ahead.launch()
                then = then._replace(ahead=None)
            cached = self._uploads.compute(routed, cached)
        self._answer(position)
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
            self._server.serve(self._num_tokens, first_layer=position, num_layers=1, timeout=self._timeout)
