"""Which experts the tokens of a load chose: the answers are read once more, with hooks on the experts.

What a token chooses depends on the tokens before it only, so that this shows what decoding did, up to rounding. It
knows modules of the model, and no scheduler.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from moesaic.modules import RoutedExperts

__all__ = ["distinct_experts"]

_TOKENS = 2048
"""That go through the model together."""


def distinct_experts(model: Any, names: Sequence[str], answers: Sequence[tuple[list[int], int]]) -> list[float] | None:
    """Different experts that one step of all users chose, mean over the steps of decode.

    Args:
        model: a loaded model on the CPU.
        names: modules of routed experts, one for each layer that has some.
        answers: of each user, tokens of prompt and answer, and how many of them the prompt has.

    Returns:
        Of each layer; None if some of these layers do not run on packed experts of ours, so that nobody sees them.
    """
    modules = dict(model.named_modules())
    layers = [modules.get(name) for name in names]
    if not all(isinstance(layer, RoutedExperts) for layer in layers):
        return None
    steps = min((len(ids) - prompt - 1 for ids, prompt in answers), default=0)
    if steps < 1:
        return None
    chosen = [torch.zeros(steps, layer.num_experts, dtype=torch.bool) for layer in layers if layer is not None]
    together: Sequence[tuple[list[int], int]] = ()

    def note(index: int) -> Any:
        def hook(_: Any, inputs: tuple[torch.Tensor, ...]) -> None:
            for experts, (_, prompt) in zip(inputs[1].chunk(len(together)), together, strict=True):
                # The first token after the prompt goes into the first step.
                chosen[index].scatter_(1, experts[prompt : prompt + steps], True)

        return hook

    handles = [layer.register_forward_pre_hook(note(index)) for index, layer in enumerate(layers) if layer is not None]
    longest = max(prompt for _, prompt in answers) + steps
    count = max(1, _TOKENS // longest)
    try:
        with torch.no_grad():
            for start in range(0, len(answers), count):
                together = answers[start : start + count]
                rows = [(ids[: prompt + steps] + [0] * longest)[:longest] for ids, prompt in together]
                model.get_decoder()(torch.tensor(rows), use_cache=False)  # what stands behind an answer changes nothing
    finally:
        for handle in handles:
            handle.remove()
    return [float(layer.sum(1, dtype=torch.float32).mean()) for layer in chosen]
