"""Pairs of a stock model (the oracle) and the same checkpoint loaded by moesaic, made once per test session."""

from __future__ import annotations

import functools
import tempfile
from pathlib import Path

import torch
from tests.tiny_models import save_tiny
from transformers import PreTrainedModel

from moesaic.engine.loader import load, prepare
from moesaic.placement import Rules

__all__ = ["checkpoint_of", "load_tiny", "pair", "relative_error"]


@functools.cache
def checkpoint_of(family: str) -> tuple[PreTrainedModel, Path]:
    """The stock tiny model of a family and the folder that it was saved to, float32."""
    folder = Path(tempfile.mkdtemp(prefix=f"moesaic-{family}-"))
    stock = save_tiny(folder, family)
    # Random models end at random: without an end token both sides generate as many tokens as asked for.
    stock.generation_config.eos_token_id = None
    stock.generation_config.pad_token_id = 0
    return stock, folder


def load_tiny(family: str, plan: str | Rules = "auto") -> PreTrainedModel:
    """The tiny checkpoint of a family, loaded by moesaic; no end token."""
    model = load(prepare(str(checkpoint_of(family)[1]), plan=plan), progress=False)
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    return model


@functools.cache
def pair(family: str) -> tuple[PreTrainedModel, PreTrainedModel]:
    """(stock, ours) of a family in float32."""
    return checkpoint_of(family)[0], load_tiny(family)


def relative_error(ours: torch.Tensor, expected: torch.Tensor) -> float:
    """Largest difference divided by the largest expected magnitude."""
    return float((ours.double() - expected.double()).abs().max() / expected.double().abs().max())
