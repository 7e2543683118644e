"""What routers of benchmarks draw, on a GPU if there is one, otherwise in Triton's interpreter."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from tests.kernels.triton.conftest import DEVICE

pytest.importorskip("triton")

from routing import zipf_log_probabilities
from zipf_routers import NOISE, ZipfLogits

LAYERS, EXPERTS, TOKENS, STEPS, EXPONENT = 3, 40, 2, 50, 0.7


@pytest.fixture(scope="module")
def noise() -> np.ndarray:
    """What was added to log-probabilities, float64 `[steps, layers, tokens, experts]`."""
    logits = ZipfLogits(LAYERS, EXPERTS, TOKENS, torch.device(DEVICE))
    logits.set_exponent(EXPONENT)
    like = torch.zeros(TOKENS, EXPERTS, device=DEVICE)
    steps = [torch.stack([logits.of_layer(layer, like).clone() for layer in range(LAYERS)]) for _ in range(STEPS)]
    drawn = torch.stack(steps).double().cpu().numpy() / NOISE
    return drawn - zipf_log_probabilities(LAYERS, EXPERTS, EXPONENT)[:, None]


def test_noise_is_gumbel_with_which_the_largest_is_chosen_as_often_as_its_probability_says(noise: np.ndarray) -> None:
    """Kolmogorov and Smirnov's distance, over all and over the experts of each layer; 1.95 is passed by 1 in 1000."""
    for some in (noise, *noise.transpose(1, 0, 2, 3)):
        below = np.exp(-np.exp(-np.sort(some.ravel())))
        count = len(below)
        distance = np.abs(below - (np.arange(count) + 0.5) / count).max()
        assert distance * count**0.5 < 1.95


def test_draws_are_independent_over_steps_layers_and_tokens(noise: np.ndarray) -> None:
    assert len(np.unique(noise)) > 0.99 * noise.size
    columns = np.corrcoef(noise.reshape(STEPS, -1).T)  # layers, tokens and experts
    np.fill_diagonal(columns, 0)
    steps = np.corrcoef(noise.reshape(STEPS, -1))
    np.fill_diagonal(steps, 0)
    assert np.abs(columns).max() < 6 / STEPS**0.5
    assert np.abs(steps).max() < 6 / noise[0].size ** 0.5


def test_steps_of_many_tokens_draw_for_themselves() -> None:
    logits = ZipfLogits(LAYERS, EXPERTS, TOKENS, torch.device(DEVICE))
    many = logits.of_layer(1, torch.zeros(TOKENS + 1, EXPERTS, device=DEVICE))
    assert many.shape == (TOKENS + 1, EXPERTS) and len(many.unique()) == many.numel()
    assert not logits._logits.any()
