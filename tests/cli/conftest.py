"""Fixtures of the command-line tests: a folder with a tiny model and its tokenizer."""

from __future__ import annotations

from pathlib import Path

import pytest
from tests.tiny_models import save_tiny
from tests.tiny_tokenizer import save_tiny_tokenizer


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Qwen3-MoE in F32 safetensors with a byte-level tokenizer and a chat template."""
    folder = tmp_path_factory.mktemp("tiny")
    save_tiny(folder, "qwen3_moe", vocab_size=272)
    save_tiny_tokenizer(folder)
    return folder
