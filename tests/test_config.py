"""What the environment asks for, and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from moesaic.config import Settings, read_settings
from moesaic.errors import ConfigError


def test_nothing_is_asked_for_by_default() -> None:
    settings = read_settings({"XDG_STATE_HOME": "/state", "MOESAIC_THREADS": " ", "MOESAIC_PIN": ""})
    assert settings == Settings(state_dir=Path("/state/moesaic"))


def test_everything_that_can_be_asked_for() -> None:
    asked = {"MOESAIC_ISA": " AVX2 ", "MOESAIC_THREADS": "3", "MOESAIC_NUMA_NODES": "2", "MOESAIC_PIN": "0"}
    settings = read_settings(asked)
    assert (settings.isa, settings.threads, settings.numa_nodes, settings.pin) == ("avx2", 3, 2, False)
    assert settings.visible_gpus is None
    assert read_settings({"CUDA_VISIBLE_DEVICES": ""}).visible_gpus == ()
    assert read_settings({"CUDA_VISIBLE_DEVICES": "1, GPU-ab"}).visible_gpus == ("1", "GPU-ab")


@pytest.mark.parametrize(
    ("name", "value"),
    [("MOESAIC_THREADS", "0"), ("MOESAIC_THREADS", "two"), ("MOESAIC_NUMA_NODES", "-1"), ("MOESAIC_PIN", "yes")],
)
def test_what_is_not_of_its_form_is_refused(name: str, value: str) -> None:
    with pytest.raises(ConfigError, match=f"{name} is '{value}'"):
        read_settings({name: value})


def test_the_key_is_not_shown() -> None:
    settings = read_settings({"MOESAIC_API_KEY": " secret-key\n"})
    assert settings.api_key == "secret-key"
    assert "secret" not in repr(settings)
    assert read_settings({"MOESAIC_API_KEY": " "}).api_key is None
