"""Who computes routed experts in a step, for steps of few tokens: the CPU through the mailbox, the GPU from slots.

`GraphPath` is for capture: it only launches, and somebody serves all requests when the graph runs. `EagerPath` serves
each request where the layer needs it. Neither decides which experts lie on the GPU.
"""

from __future__ import annotations

from contextlib import AbstractContextManager

import torch

from moesaic.engine.gpu.slots import ExpertSlots
from moesaic.engine.gpu.streams import SideStream
from moesaic.engine.gpu.uploads import MissUploads
from moesaic.kernels.handoff import ExpertServer
from moesaic.kernels.triton.activations import Lanes
from moesaic.kernels.triton.combine_norm import NormBefore
from moesaic.kernels.triton.handoff import Exchange
from moesaic.kernels.triton.route import Request
from moesaic.modules.gpu.step import Forecast, Routed

__all__ = ["MAX_FORECAST_TOKENS", "EagerPath", "GraphPath"]

MAX_FORECAST_TOKENS = 8
"""What more tokens ask for is nearly everything."""


class GraphPath:
    """Asks, goes on, and takes the answer; the requests are served by whoever replays the graph.

    Args:
        exchange: the GPU's side of the mailbox.
        slots: experts on the GPU.
        positions: of each layer, the position of its request in a step; None for layers without requests.
        uploads: some misses come to the GPU instead; None: all are the CPU's.
        forecasts: where routers say beforehand what they will probably ask for; None: they do not.
    """

    def __init__(
        self,
        exchange: Exchange,
        slots: ExpertSlots,
        positions: list[int | None],
        uploads: MissUploads | None = None,
        forecasts: SideStream | None = None,
    ) -> None:
        self._exchange, self._slots, self._positions, self._uploads = exchange, slots, positions, uploads
        self._forecasts = forecasts
        self._kept: torch.Tensor | None = None  # what a forecast reads that has not been waited for

    def table(self, layer: int) -> torch.Tensor | None:
        """As `ExpertPath`."""
        return self._slots.table(layer)

    def request(self, layer: int) -> Request | None:
        """As `ExpertPath`."""
        position = self._positions[layer]
        return None if position is None else self._exchange.request(position)

    def forecast(self, layer: int, num_tokens: int) -> Forecast | None:
        """As `ExpertPath`."""
        position = self._positions[layer]
        if self._forecasts is None or position is None or num_tokens > MAX_FORECAST_TOKENS:
            return None
        return Forecast(self._exchange.forecast(position), self._beside)

    def _beside(self, kept: torch.Tensor) -> AbstractContextManager[object]:
        """As `Forecast`; `finish` of the layer that is foretold waits for it, while it waits for the CPU anyway."""
        assert self._forecasts is not None
        self._kept = kept
        self._forecasts.follow()
        return self._forecasts.use()

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
        if self._kept is not None and self._forecasts is not None:
            self._forecasts.join()
            self._kept = None
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
        forecasts: as `GraphPath`.
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
        forecasts: SideStream | None = None,
    ) -> None:
        super().__init__(exchange, slots, positions, uploads, forecasts)
        self._server, self._num_tokens, self._timeout = server, num_tokens, timeout

    def _answer(self, position: int | None) -> None:
        if position is not None:
            sender = None if self._uploads is None else self._uploads.sender
            self._server.serve(
                self._num_tokens, first_layer=position, num_layers=1, timeout=self._timeout, uploads=sender
            )
