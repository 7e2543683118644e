"""What all layers of a step on the GPU need to know: where its tokens are, and who computes routed experts."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import NamedTuple, Protocol

import torch

from moesaic.errors import KernelError
from moesaic.kernels.triton.activations import Lanes
from moesaic.kernels.triton.combine_norm import NormBefore
from moesaic.kernels.triton.rotary import RotaryTable
from moesaic.kernels.triton.route import Request
from moesaic.kvcache.paged import PoolLayer
from moesaic.kvcache.states import StateLayer
from moesaic.kvcache.step_input import StepInput

__all__ = ["ExpertPath", "Forecast", "GpuStep", "Routed"]


@dataclass(frozen=True, slots=True)
class Routed:
    """What a router decided for the tokens of a step, and what goes into their experts.

    Attributes:
        layer: position among the layers with routed experts.
        hidden: float32 `[tokens, hidden_size]`, normalised.
        chosen: int64 `[tokens, top_k]`.
        weights: float32 `[tokens, top_k]`.
        slots: int32 `[tokens, top_k]`: where the chosen experts lie on the GPU, -1: nowhere; None if none does.
        misses: int64 `[tokens, top_k]`: chosen experts that do not lie on the GPU, -1 in the other places.
        request: to the CPU, which the router has written; None: it has not.
    """

    layer: int
    hidden: torch.Tensor
    chosen: torch.Tensor
    weights: torch.Tensor
    slots: torch.Tensor | None
    misses: torch.Tensor
    request: Request | None = None


class Forecast(NamedTuple):
    """How a router says beforehand what it will probably ask the CPU for.

    Attributes:
        request: where.
        beside: makes what is launched inside come after what was launched so far, while what follows does not wait for
            it; its arguments are what is read inside, and nowhere else.
    """

    request: Request
    beside: Callable[[torch.Tensor], AbstractContextManager[object]]


class ExpertPath(Protocol):
    """Who computes routed experts, and how the result comes back."""

    def table(self, layer: int) -> torch.Tensor | None:
        """int32 `[num_experts]`, the slot of each expert on the GPU or -1; None if there are no slots at all."""

    def request(self, layer: int) -> Request | None:
        """The request that the router of few tokens writes; None: nothing."""

    def forecast(self, layer: int, num_tokens: int) -> Forecast | None:
        """For a router of so many tokens to say, before attention, what it will probably ask for; None: it does not."""

    def start(self, routed: Routed) -> None:
        """The router has decided; the GPU will do something else in the meantime."""

    def finish(
        self,
        routed: Routed,
        residual: torch.Tensor,
        shared: torch.Tensor | None,
        shared_gate: torch.Tensor | None,
        scale: float,
        then: NormBefore | None = None,
    ) -> Lanes | None:
        """`residual += scale * (experts + sigmoid(shared_gate) * shared)`, in place.

        Returns:
            The norm of that, as what follows reads it, if `then` is given: for few tokens.
        """


@dataclass(frozen=True, slots=True)
class GpuStep:
    """One pass of tokens through the layers.

    Attributes:
        input: where the tokens are.
        caches: of every layer: keys and values, or recurrent states.
        angles: cosines and sines of all positions.
        max_query_len: most tokens that a sequence has in this step.
        experts: who computes routed experts.
    """

    input: StepInput
    caches: list[PoolLayer | StateLayer]
    angles: RotaryTable
    max_query_len: int
    experts: ExpertPath

    def behind_attention(self, rows: torch.Tensor) -> GpuStep:
        """Of some tokens, int64 on the device, what the rest of a layer needs to know."""
        return replace(self, input=replace(self.input, slot_mapping=self.input.slot_mapping[rows]))

    def pool(self, layer: int) -> PoolLayer:
        """Where keys and values of a layer are."""
        cache = self.caches[layer]
        if not isinstance(cache, PoolLayer):
            raise KernelError(f"layer {layer} has recurrent states, but attends to keys.")
        return cache

    def states(self, layer: int) -> StateLayer:
        """Where recurrent states of a layer are."""
        cache = self.caches[layer]
        if not isinstance(cache, StateLayer):
            raise KernelError(f"layer {layer} has keys and values, but needs recurrent states.")
        return cache
