"""Presets: the stock model of each has the published number of parameters, and cutting layers keeps the rest."""

from __future__ import annotations

import pytest

from moesaic.engine.presets import PRESETS, get_preset
from moesaic.errors import ConfigError
from moesaic.models import build_meta_model

# 10^9 parameters without multi-token prediction layers, from the models' cards and papers.
PUBLISHED = {
    "qwen3-30b-a3b": 30.5,
    "qwen3-235b-a22b": 235.1,
    "deepseek-v3": 671.0,
    "kimi-k2": 1026.4,
    "glm-4.5": 352.8,
    "gpt-oss-120b": 116.8,
    "mixtral-8x7b": 46.7,
}


def test_there_is_a_figure_for_every_preset() -> None:
    assert PUBLISHED.keys() == PRESETS.keys()


@pytest.mark.parametrize("name", PRESETS)
def test_number_of_parameters(name: str) -> None:
    model = build_meta_model(PRESETS[name].config())
    assert sum(parameter.numel() for parameter in model.parameters()) / 1e9 == pytest.approx(PUBLISHED[name], abs=0.05)


@pytest.mark.parametrize("name", PRESETS)
def test_a_cut_model_has_moe_layers_of_the_same_size(name: str) -> None:
    whole, cut = build_meta_model(PRESETS[name].config()), build_meta_model(get_preset(name.upper()).config(2))
    assert len(cut.model.layers) == 2

    def shapes(layer: object) -> dict[str, tuple[int, ...]]:
        return {key: tuple(value.shape) for key, value in layer.state_dict().items()}  # type: ignore[attr-defined]

    assert shapes(cut.model.layers[0]) == shapes(cut.model.layers[1]) == shapes(whole.model.layers[-1])


def test_what_there_is_not() -> None:
    with pytest.raises(ConfigError, match="expected one of qwen3-30b-a3b"):
        get_preset("gpt-2")
    with pytest.raises(ConfigError, match="32 layers"):
        get_preset("mixtral-8x7b").config(33)
