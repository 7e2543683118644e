"""Fixtures of the placement tests: meta models with their weight maps, and a computer of known size."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tests.tiny_models import save_tiny
from transformers import PreTrainedModel

from moesaic.models import WeightMap, build_meta_model, build_weight_map, config_for
from moesaic.placement import Hardware
from moesaic.placement.hardware import NumaNode
from moesaic.weights import open_checkpoint

GIB = 1024**3


def load_tiny(folder: Path, family: str, **overrides: Any) -> tuple[PreTrainedModel, WeightMap]:
    """Save a tiny model into `folder`; its meta model and the weight map of its checkpoint."""
    save_tiny(folder, family, **overrides)
    checkpoint = open_checkpoint(folder)
    model = build_meta_model(config_for(checkpoint))
    return model, build_weight_map(model, checkpoint)


@pytest.fixture
def hardware() -> Hardware:
    """A computer with 64 GiB, 60 of them free."""
    return Hardware("Test CPU", 8, 16, None, 64 * GIB, 60 * GIB, False, (NumaNode(0, tuple(range(16)), 64 * GIB),))


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[PreTrainedModel, WeightMap]]:
    """Family -> its tiny model on the meta device and the weight map of its checkpoint (each made once)."""
    made: dict[str, tuple[PreTrainedModel, WeightMap]] = {}

    def make(family: str) -> tuple[PreTrainedModel, WeightMap]:
        if family not in made:
            made[family] = load_tiny(tmp_path_factory.mktemp(family), family)
        return made[family]

    return make
