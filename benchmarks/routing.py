"""Traces of routing to replay: which experts each token chose in each layer, of a Zipf router and of the demo model."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator

import numpy as np
import torch

__all__ = ["chosen_shares", "demo_trace", "zipf_log_probabilities", "zipf_trace"]

DRIFT_TOKENS = 512
"""Tokens after which a tenth of a Zipf router's experts change places in its ranking."""


def zipf_log_probabilities(num_layers: int, num_experts: int, exponent: float, seed: int = 0) -> np.ndarray:
    """float64 `[num_layers, num_experts]`: rank r is chosen like r ** -exponent; ranks differ by layer."""
    rng = np.random.default_rng(seed)
    weights = np.arange(1, num_experts + 1) ** -exponent
    ranks = rng.permuted(np.tile(np.arange(num_experts), (num_layers, 1)), axis=1)
    return np.log(weights / weights.sum())[ranks]


def zipf_trace(
    num_tokens: int, num_layers: int, num_experts: int, top_k: int, exponent: float, seed: int = 0
) -> np.ndarray:
    """Choices int64 `[num_tokens, num_layers, top_k]`, tokens independent of each other, with a slow drift.

    The top k of log-probabilities with Gumbel noise are a sample without replacement.
    """
    rng = np.random.default_rng(seed)
    scores = zipf_log_probabilities(num_layers, num_experts, exponent, seed)
    out = np.empty((num_tokens, num_layers, top_k), np.int64)
    for start in range(0, num_tokens, DRIFT_TOKENS):
        count = min(DRIFT_TOKENS, num_tokens - start)
        noisy = scores + rng.gumbel(size=(count, num_layers, num_experts))
        out[start : start + count] = np.argpartition(-noisy, top_k - 1, axis=-1)[..., :top_k]
        for layer in scores:
            moving = rng.choice(num_experts, max(2, num_experts // 10), replace=False)
            layer[moving] = layer[np.roll(moving, 1)]
    return out


def chosen_shares(log_probabilities: np.ndarray, top_k: int) -> np.ndarray:
    """How many of the tokens choose each expert, if they choose the top k of these with Gumbel noise.

    That is a race: expert i arrives after an exponential time of rate p_i, and the first k are chosen. So i is, if
    fewer than k of the others have arrived before; this is integrated over the logarithm of its time of arrival.

    Args:
        log_probabilities: float64 `[num_layers, num_experts]`, the same numbers in each layer, in any order.
        top_k: experts of a token.

    Returns:
        float64 `[num_layers, num_experts]`, of whose rows each has the sum `top_k`.
    """
    rates = np.sort(np.exp(log_probabilities[0]))[::-1]
    log_times, width = np.linspace(math.log(1e-9), math.log(1e3 / rates.min()), 1024, retstep=True)
    times = np.exp(log_times)
    # others[i, t, n]: n of those besides i have arrived by t; k stands for k and more, which nobody asks for
    others = np.zeros((len(rates), len(times), top_k))
    others[:, :, 0] = 1.0
    for index, rate in enumerate(rates):
        arrived = np.broadcast_to(-np.expm1(-rate * times), (len(rates), len(times))).copy()
        arrived[index] = 0.0
        moved = others * arrived[:, :, None]
        others -= moved
        others[:, :, 1:] += moved[:, :, :-1]
    density = rates[:, None] * times * np.exp(-rates[:, None] * times)
    shares = (density * others.sum(axis=2)).sum(axis=1) * width
    order = np.argsort(-log_probabilities, axis=1, kind="stable")
    out = np.empty_like(log_probabilities)
    np.put_along_axis(out, order, np.broadcast_to(shares, out.shape), axis=1)
    return out


def _conversations(seed: int = 0) -> Iterator[tuple[str, str]]:
    """Questions and answers; ten of one task and language, then ten of another, as somebody works."""
    from demo.items import LANGUAGES
    from demo.tasks import TASKS

    rng = random.Random(seed)
    while True:
        task, language, size = rng.choice(list(TASKS)), rng.choice(LANGUAGES), rng.choice((100, 200, 400))
        for _ in range(10):
            item = TASKS[task](rng, language, lambda key: True, size)
            yield item.turn.prompt, item.turn.answer


def demo_trace(num_tokens: int) -> tuple[np.ndarray, int]:
    """Choices int64 `[num_tokens, layers, top_k]` of the demo model on its own tasks, and its experts per layer.

    What a token chooses depends on the tokens before it only, so one pass over a question and its answer shows what
    decoding would.
    """
    from moesaic import AutoModelForCausalLM, AutoTokenizer
    from moesaic.modules import RoutedExperts

    model = AutoModelForCausalLM.from_pretrained("demo", plan="cpu", progress=False)
    tokenizer = AutoTokenizer.from_pretrained("demo")
    layers = [module for module in model.modules() if isinstance(module, RoutedExperts)]
    chosen: list[list[torch.Tensor]] = [[] for _ in layers]
    for index, module in enumerate(layers):
        module.register_forward_pre_hook(lambda _, inputs, index=index: chosen[index].append(inputs[1].clone()))
    done = 0
    for prompt, answer in _conversations():
        turns = [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]
        ids = tokenizer.apply_chat_template(turns, return_dict=True, return_tensors="pt")["input_ids"]
        with torch.inference_mode():
            model(ids)
        done += ids.shape[1]
        if done >= num_tokens:
            break
    trace = torch.stack([torch.cat(parts) for parts in chosen], dim=1)[:num_tokens]
    return trace.numpy(), layers[0].packed.num_experts
