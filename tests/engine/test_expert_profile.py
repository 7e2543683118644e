"""What one run saves of its experts' use, and what a file must be for the next run to begin with it."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest

from moesaic.engine.expert_profile import ExpertProfile, ModelShape, read_profile, write_profile
from moesaic.engine.gpu.promotion import PromotionPolicy
from moesaic.engine.serving.start import ServingOptions, make_engine
from moesaic.errors import ConfigError

SHAPE = ModelShape("some_moe", (4, 3))
USES = np.array([[5, 0, 7, 1], [2, 9, 0, 0]], np.int64)


def save(folder: Path) -> Path:
    path = folder / "experts.json"
    write_profile(path, ExpertProfile(SHAPE, 6, USES))
    return path


def test_what_was_written_is_read(tmp_path: Path) -> None:
    found = read_profile(save(tmp_path), SHAPE)
    assert (found.shape, found.num_tokens) == (SHAPE, 6)
    assert found.uses.tolist() == USES.tolist()
    assert [path.name for path in tmp_path.iterdir()] == ["experts.json"]


def test_a_file_that_cannot_be_written_leaves_the_old_one(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be written"):
        write_profile(tmp_path / "no" / "experts.json", ExpertProfile(SHAPE, 6, USES))
    path = save(tmp_path)
    before = path.read_text()
    (tmp_path / f".experts.json.{os.getpid()}.partial").mkdir()
    with pytest.raises(ConfigError, match="cannot be written"):
        write_profile(path, ExpertProfile(SHAPE, 7, USES))
    assert path.read_text() == before


DAMAGE = [
    ("num_tokens", -1, "found -1, expected whole numbers from 0"),
    ("num_tokens", 1.5, "found 1.5"),
    ("num_tokens", True, "found True"),
    ("num_tokens", 10**30, "found 1000000000000000000000000000000,"),
    ("uses", [[5, 0, 7, 1]], "found 1 elements, expected 2 lists"),
    ("uses", [[5, 0, 7, 1], [2, 9]], r"'uses\[1\]'.*found 2 numbers, expected 3"),
    ("uses", [[5, 0, 7, -4], [2, 9, 0]], "found -4"),
    ("uses", [[5, 0, 7, "1"], [2, 9, 0]], "found str"),
    ("uses", {"0": [1]}, "found dict"),
    ("uses", [7, 8], r"'uses\[0\]'.*found int, expected a list"),
    ("num_experts", "4", "found str"),
    ("num_experts", [4, 4], "of some_moe, 2 layers with 4 routed experts"),
    ("model_type", ["some_moe"], "expected a text"),
    ("model_type", "other_moe", "of other_moe, .* but the model is some_moe, 2 layers with 3 or 4"),
    ("version", 2, "of version 2, expected 1"),
    ("kind", "something", 'expected a JSON object with "kind"'),
    ("more", 1, "unknown in an expert profile: more"),
]


@pytest.mark.parametrize(("key", "value", "message"), DAMAGE)
def test_damaged_files_are_refused(key: str, value: object, message: str, tmp_path: Path) -> None:
    path = save(tmp_path)
    path.write_text(json.dumps(json.loads(path.read_text()) | {key: value}))
    with pytest.raises(ConfigError, match=message) as caught:
        read_profile(path, SHAPE)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "expected JSON"),
        (b"\xff\xfe\x00", "expected JSON"),
        (b"[" * 200_000, "nested too deeply"),
        (b'{"kind": ' + b"9" * 10_000 + b"}", "expected JSON"),
        (b"[]", "expected a JSON object"),
        (b'{"kind": "moesaic expert profile", "version": 1}', "missing"),
        (b" " * (33 << 20), "more than 32 MiB"),
    ],
)
def test_hostile_files_are_refused(content: bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / "experts.json"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=message):
        read_profile(path, SHAPE)
    with pytest.raises(ConfigError, match="cannot be read"):
        read_profile(tmp_path, SHAPE)


def test_slots_go_to_the_busiest_of_all_layers() -> None:
    policy = PromotionPolicy(2, 4, num_slots=4)
    policy.seed(USES, 6)
    moves = policy.fill([4, 3])
    assert [(move.layer, move.expert) for move in moves] == [(1, 1), (0, 2), (0, 0), (1, 0)]
    rest = PromotionPolicy(2, 4, num_slots=7)
    rest.seed(USES * (np.arange(2) == 1)[:, None], 6)  # nothing is known of the first layer
    assert [(move.layer, move.expert) for move in rest.fill([4, 3])[:4]] == [(1, 1), (1, 0), (0, 0), (0, 1)]


def test_what_is_known_counts_as_what_has_just_happened() -> None:
    lived, told = (PromotionPolicy(1, 2, num_slots=1) for _ in range(2))
    for _ in range(2000):
        lived.record(np.array([[1, 0]]), 1)
    told.seed(np.array([[2_000_000, 0]]), 2_000_000)
    assert told.score[0, 0] == pytest.approx(lived.score[0, 0], rel=0.01)
    told.seed(np.array([[3, 1]]), 4)
    assert told.score.tolist() == [[3.0, 1.0]]  # little is known, and is not made more of


def test_a_plan_without_a_gpu_has_no_use_for_it(tmp_path: Path) -> None:
    for name, value in (("expert_profile", save(tmp_path)), ("save_expert_profile", "x")):
        with pytest.raises(ConfigError, match=r"plan 'cpu' uses no GPU"):
            make_engine("demo", ServingOptions(plan="cpu", **{name: value}), progress=False)
