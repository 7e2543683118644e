"""Damaged headers: whatever the bytes, only the two typed errors come out, in bounded time and memory."""

from __future__ import annotations

import json
import struct
import time
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tests.weights import gguf_bytes as raw
from tests.weights.gguf_bytes import Tensor, gguf

from moesaic.errors import CheckpointError, UnsupportedFormatError
from moesaic.weights import open_checkpoint

SECONDS, MEGABYTES = 5.0, 64  # far above what the files of a few hundred bytes need, far below what would hurt
INTERESTING = (0, 1, 31, 32, 255, (1 << 31) - 1, 1 << 31, (1 << 32) - 1, 1 << 62, (1 << 63) - 1, (1 << 64) - 1)
FUZZ = settings(
    max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)


def sound_gguf() -> bytes:
    keys = [
        raw.key("general.architecture", raw.STRING, raw.string("olmoe")),
        raw.key("general.alignment", raw.U32, raw.scalar(raw.U32, 32)),
        raw.key("olmoe.block_count", raw.U32, raw.scalar(raw.U32, 1)),
        raw.key("flag", raw.BOOL, b"\1"),
        raw.key("tokens", raw.ARRAY, raw.array(raw.STRING, [raw.string("ab"), raw.string("c")])),
        raw.key("scores", raw.ARRAY, raw.array(raw.F32, [raw.scalar(raw.F32, 1.5)] * 3)),
        raw.key("nested", raw.ARRAY, raw.array(raw.ARRAY, [raw.array(raw.U8, [b"x"])])),
    ]
    tensors = [Tensor("token_embd.weight", (32, 2), 8, 0), Tensor("v", (4,), 0, 96)]
    return gguf(keys, tensors, bytes(112))


def sound_safetensors() -> bytes:
    header = {
        "__metadata__": {"format": "pt"},
        "a.weight": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]},
        "b.weight": {"dtype": "BF16", "shape": [4], "data_offsets": [24, 32]},
    }
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + bytes(32)


def place(folder: Path, kind: str, content: bytes) -> Path:
    if kind == "gguf":
        (folder / "model.gguf").write_bytes(content)
        return folder / "model.gguf"
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(content)
    return folder


def open_safely(path: Path) -> bool:
    """Open and read everything; whether the file was taken as sound. Any other error than the two fails the test."""
    tracemalloc.start()
    start = time.process_time()
    try:
        checkpoint = open_checkpoint(path)
        for name in checkpoint.tensors:
            assert checkpoint.raw(name).nbytes == checkpoint.tensors[name].nbytes
            checkpoint.raw(name).max()
        return True
    except (CheckpointError, UnsupportedFormatError):
        return False
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert time.process_time() - start < SECONDS
        assert peak < MEGABYTES << 20


SOUND = {"gguf": sound_gguf, "safetensors": sound_safetensors}


@pytest.mark.parametrize("kind", SOUND)
def test_the_seed_files_are_sound(kind: str, tmp_path: Path) -> None:
    assert open_safely(place(tmp_path, kind, SOUND[kind]()))


@pytest.mark.parametrize("kind", SOUND)
def test_every_truncation(kind: str, tmp_path: Path) -> None:
    content = SOUND[kind]()
    for length in range(len(content)):
        assert not open_safely(place(tmp_path, kind, content[:length])), f"truncated to {length} bytes"


@pytest.mark.parametrize("kind", SOUND)
@FUZZ
@given(edits=st.lists(st.tuples(st.integers(0, 10_000), st.integers(0, 255)), min_size=1, max_size=8))
def test_flipped_bytes(kind: str, tmp_path: Path, edits: list[tuple[int, int]]) -> None:
    content = bytearray(SOUND[kind]())
    for position, value in edits:
        content[position % len(content)] = value
    open_safely(place(tmp_path, kind, bytes(content)))


@pytest.mark.parametrize("kind", SOUND)
@FUZZ
@given(position=st.integers(0, 10_000), value=st.sampled_from(INTERESTING), width=st.sampled_from([4, 8]))
def test_huge_integers(kind: str, tmp_path: Path, position: int, value: int, width: int) -> None:
    content = bytearray(SOUND[kind]())
    start = position % (len(content) - width)
    content[start : start + width] = (value & ((1 << 8 * width) - 1)).to_bytes(width, "little")
    open_safely(place(tmp_path, kind, bytes(content)))


@FUZZ
@given(content=st.binary(max_size=400))
def test_random_gguf_bodies(tmp_path: Path, content: bytes) -> None:
    open_safely(place(tmp_path, "gguf", b"GGUF\3\0\0\0" + content))


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(1 << 70), 1 << 70) | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=12), inner, max_size=4),
    max_leaves=12,
)


@FUZZ
@given(
    header=st.dictionaries(
        st.text(max_size=6),
        st.fixed_dictionaries({}, optional={"dtype": JSON | st.just("F32"), "shape": JSON, "data_offsets": JSON})
        | JSON,
        max_size=4,
    )
)
def test_random_safetensors_headers(tmp_path: Path, header: dict[str, object]) -> None:
    text = json.dumps(header).encode()
    open_safely(place(tmp_path, "safetensors", struct.pack("<Q", len(text)) + text + bytes(64)))


def test_many_tiny_declarations_stay_bounded(tmp_path: Path) -> None:
    """A header of a megabyte cannot be made to cost much more than its size."""
    empty_strings = raw.key("a", raw.ARRAY, raw.array(raw.STRING, [bytes(8)] * 100_000))
    assert open_safely(place(tmp_path, "gguf", gguf([empty_strings], [Tensor("v", (8,), 0, 0)], bytes(32))))
    numbers = raw.key("a", raw.ARRAY, raw.array(raw.U8, [bytes(1_000_000)], 1_000_000))
    path = place(tmp_path, "gguf", gguf([numbers], [Tensor("v", (8,), 0, 0)], bytes(32)))
    checkpoint = open_checkpoint(path)
    assert isinstance(checkpoint.metadata["a"], np.ndarray) and not checkpoint.metadata["a"].flags.owndata
