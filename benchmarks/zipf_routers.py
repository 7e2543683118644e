"""Routers of a synthetic model on a GPU that choose experts at random, some of them often.

Logits are Zipf log-probabilities with Gumbel noise, drawn inside the graph. For steps of few tokens one launch draws
those of all layers, in the first layer that asks, into memory that later layers only read: so a benchmark's routers add
about 2 us to a step, and no kernel to a layer. Numbers come from a counter (Philox: the layer, the token and how often
was drawn before), which lies in device memory, so that every replay of a graph draws anew, independent of all others.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from moesaic.engine.gpu.runner import ModelRunner
from moesaic.kernels.triton.loading import expected
from routing import zipf_log_probabilities

__all__ = ["NOISE", "ZipfLogits", "ZipfRouters"]

NOISE = 0.25  # of the logits: a sigmoid tells large ones apart no more, and only their order matters
_SEED = 20_251_126
_SMALLEST: tl.constexpr = tl.constexpr(1e-10)  # a logarithm is taken of it
_LARGEST: tl.constexpr = tl.constexpr(1 - 1e-7)


@triton.jit
def _draw_kernel(scores, drawn, out, seed, factor, num_experts, max_tokens, EXPERTS: tl.constexpr):
    """A program draws for one layer and token, and has a counter of its own: nobody else writes it."""
    layer, token = tl.program_id(0), tl.program_id(1)
    place = layer * max_tokens + token
    count = tl.load(drawn + place)
    expert = tl.arange(0, EXPERTS)
    nothing = expert * 0
    bits, _, _, _ = tl.philox(seed, expert, nothing + token, nothing + layer, nothing + count)
    uniform = tl.minimum(tl.maximum(tl.uint_to_uniform_float(bits), _SMALLEST), _LARGEST)
    inside = expert < num_experts
    score = tl.load(scores + layer * num_experts + expert, mask=inside, other=0.0)
    tl.store(out + place * num_experts + expert, factor * (score - tl.log(-tl.log(uniform))), mask=inside)
    tl.store(drawn + place, count + 1)


class ZipfLogits:
    """Logits of the routers of some layers.

    Args:
        num_layers: with routers.
        num_experts: of each.
        max_tokens: of a step whose layers' logits are drawn together.
        device: where.
    """

    def __init__(self, num_layers: int, num_experts: int, max_tokens: int, device: torch.device) -> None:
        self._max_tokens = max_tokens
        self._scores = torch.zeros(num_layers, num_experts, device=device)
        self._drawn = torch.zeros(num_layers, max_tokens, dtype=torch.int32, device=device)
        self._logits = torch.zeros(num_layers, max_tokens, num_experts, device=device)

    def set_exponent(self, exponent: float) -> None:
        """In place: graphs that were captured follow."""
        self._scores.copy_(torch.from_numpy(zipf_log_probabilities(*self._scores.shape, exponent)).float())

    def draw(self, num_tokens: int) -> None:
        """Draw for a step of so many tokens."""
        num_layers, num_experts = self._scores.shape
        _draw_kernel[(num_layers, num_tokens)](
            self._scores, self._drawn, self._logits, _SEED, NOISE, num_experts, self._max_tokens,
            EXPERTS=triton.next_power_of_2(num_experts),
        )  # fmt: skip

    def of_layer(self, layer: int, logits: torch.Tensor) -> torch.Tensor:
        """In the place of a layer's logits, `[tokens, num_experts]`; the first layer's are asked for first."""
        if len(logits) > self._max_tokens:
            gumbel = -torch.log(-torch.log(torch.rand_like(logits).clamp_(1e-20, 1 - 1e-7)))
            return (gumbel + self._scores[layer]).mul_(NOISE)
        if layer == 0:
            self.draw(len(logits))
        return self._logits[layer, : len(logits)]


class ZipfRouters:
    """Replaces the logits of all routers of a runner's model; layers choose like each other, but other experts often.

    Args:
        runner: of a loaded model; its graphs are captured anew.
    """

    def __init__(self, runner: ModelRunner) -> None:
        blocks = [layer.feed_forward for layer in runner.decoder.layers if layer.feed_forward.router is not None]
        most = max(runner.options.max_batch, 8)
        self._logits = ZipfLogits(len(blocks), _num_experts(blocks), most, runner.decoder.device)
        for layer, block in enumerate(blocks):
            block.logits_of = functools.partial(self._logits.of_layer, layer)
        with expected():  # nobody waits for the compiler in a step
            self._logits.draw(1)
        runner.steps.buckets = {}  # graphs that were captured before know nothing of it

    def set_exponent(self, exponent: float) -> None:
        """See `ZipfLogits`."""
        self._logits.set_exponent(exponent)


def _num_experts(blocks: Sequence[object]) -> int:
    counts = {block.router.weight.shape[0] for block in blocks}  # type: ignore[attr-defined]
    assert len(counts) == 1, f"layers have {sorted(counts)} experts: expected as many in each"
    return int(counts.pop())
