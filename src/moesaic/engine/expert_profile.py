"""Which experts a model used, in a file: what one run has learnt, the next one's expert cache begins with.

A small JSON object: whose it is (model type, layers with routed experts, experts of each), for how many tokens it
counted, and the counts. Files come from anywhere, so everything in them is checked before it is used. This module knows
no device and no policy.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from moesaic.errors import ConfigError
from moesaic.files import write_whole
from moesaic.placement import Plan
from moesaic.placement.roles import layer_of

__all__ = [
    "ExpertProfile",
    "ModelShape",
    "check_profile_target",
    "check_profile_use",
    "read_profile",
    "shape_of",
    "write_profile",
]

_KIND, _VERSION = "moesaic expert profile", 1
_MAX_BYTES = 32 << 20
_MAX_COUNT = 2**48
_KEYS = frozenset({"kind", "version", "model_type", "num_experts", "num_tokens", "uses"})


@dataclass(frozen=True, slots=True)
class ModelShape:
    """Whose counts they are.

    Attributes:
        model_type: as in the model's configuration.
        num_experts: of each layer that has routed experts, in order.
    """

    model_type: str
    num_experts: tuple[int, ...]

    def __str__(self) -> str:
        counts = sorted(set(self.num_experts))
        experts = " or ".join(str(count) for count in counts) or "no"
        return f"{self.model_type}, {len(self.num_experts)} layers with {experts} routed experts each"


@dataclass(frozen=True, slots=True, eq=False)
class ExpertProfile:
    """How often each expert was chosen.

    Attributes:
        shape: whose counts these are.
        num_tokens: for which they were counted.
        uses: int64 `[layers, most experts of a layer]`; 0 where a layer has fewer.
    """

    shape: ModelShape
    num_tokens: int
    uses: np.ndarray


def shape_of(model_type: str, plan: Plan) -> ModelShape:
    """What a profile for a planned model has to fit."""
    return ModelShape(model_type, tuple(entry.num_experts for entry in plan.entries if entry.num_experts))


def check_profile_use(plan: Plan, option: str) -> None:
    """Refuse a profile where no experts are cached.

    Raises:
        ConfigError: the plan uses no GPU, or has no experts in DRAM whose layers are there.
    """
    if not plan.uses_gpu:
        raise ConfigError(
            f"{option}: the plan '{plan.name}' uses no GPU, so there is no cache of experts. Leave it out."
        )
    experts = [entry for entry in plan.entries if entry.role == "experts"]
    cached = [entry for entry in experts if entry.device == "cpu" and layer_of(entry.module) in plan.gpu_layers]
    if not cached or any(entry.device == "gpu" for entry in experts):
        taken = "" if plan.strategy in ("", plan.name) else f", as {plan.strategy}"
        raise ConfigError(
            f"{option}: with the plan '{plan.name}'{taken} no layer's busy experts are cached on the GPU. Leave it "
            "out, or choose the plan 'hybrid'."
        )


def check_profile_target(path: str | Path, option: str) -> None:
    """Refuse a file that could not be written at the end of a run, before it begins.

    Raises:
        ConfigError: it is a folder, or in none.
    """
    target = Path(path).expanduser()
    if target.is_dir() or not target.parent.is_dir():
        raise ConfigError(f"{option} {path}: expected a file in a folder that exists.")


def write_profile(path: str | Path, profile: ExpertProfile) -> None:
    """Write a profile; whoever reads the file meanwhile finds the old one or the new one, whole.

    Raises:
        ConfigError: the file cannot be written.
    """
    target = Path(path).expanduser()
    rows = zip(profile.uses.tolist(), profile.shape.num_experts, strict=True)
    content = {
        "kind": _KIND,
        "version": _VERSION,
        "model_type": profile.shape.model_type,
        "num_experts": list(profile.shape.num_experts),
        "num_tokens": profile.num_tokens,
        "uses": [row[:count] for row, count in rows],
    }
    try:
        write_whole(target, json.dumps(content, separators=(",", ":")))
    except OSError as error:
        raise ConfigError(f"{target}: the expert profile cannot be written: {error.strerror or error}.") from error


def read_profile(path: str | Path, expected: ModelShape) -> ExpertProfile:
    """Read a profile and check that it is one, and this model's.

    Raises:
        ConfigError: it cannot be read, is damaged, or belongs to another model.
    """
    content = _parse(Path(path).expanduser())
    found = ModelShape(_text(path, content, "model_type"), tuple(_counts(path, "num_experts", content["num_experts"])))
    if found != expected:
        raise ConfigError(
            f"{path}: an expert profile of {_short(str(found))}, but the model is {expected}: use a profile that was "
            "saved with this model."
        )
    rows = content["uses"]
    if not isinstance(rows, list) or len(rows) != len(expected.num_experts):
        raise _wrong(path, "uses", _kind_of(rows), f"{len(expected.num_experts)} lists, one for each layer")
    uses = np.zeros((len(rows), max(expected.num_experts, default=0)), np.int64)
    for layer, (row, count) in enumerate(zip(rows, expected.num_experts, strict=True)):
        numbers = _counts(path, f"uses[{layer}]", row)
        if len(numbers) != count:
            raise _wrong(path, f"uses[{layer}]", f"{len(numbers)} numbers", f"{count}, one for each expert")
        uses[layer, :count] = numbers
    (num_tokens,) = _counts(path, "num_tokens", [content["num_tokens"]])
    return ExpertProfile(found, num_tokens, uses)


def _parse(path: Path) -> dict[str, Any]:
    try:
        with path.open("rb") as file:
            data = file.read(_MAX_BYTES + 1)
    except OSError as error:
        raise ConfigError(f"{path}: the expert profile cannot be read: {error.strerror or error}.") from error
    if len(data) > _MAX_BYTES:
        raise ConfigError(f"{path}: more than {_MAX_BYTES >> 20} MiB: an expert profile is much smaller.")
    try:
        content = json.loads(data)
    except (ValueError, RecursionError) as error:  # ValueError: also what is no UTF-8, and numbers of many digits
        reason = "nested too deeply" if isinstance(error, RecursionError) else _short(str(error))
        raise ConfigError(f"{path}: no expert profile: expected JSON, found something else ({reason}).") from None
    if not isinstance(content, dict) or content.get("kind") != _KIND:
        raise ConfigError(f'{path}: no expert profile: expected a JSON object with "kind": "{_KIND}".')
    if content.get("version") != _VERSION:
        found = _short(repr(content.get("version")))
        raise ConfigError(f"{path}: an expert profile of version {found}, expected {_VERSION}: save it anew.")
    if content.keys() != _KEYS:
        odd = sorted(_KEYS ^ content.keys())
        raise ConfigError(f"{path}: missing from or unknown in an expert profile: {_short(', '.join(odd))}.")
    return content


def _text(path: str | Path, content: dict[str, Any], name: str) -> str:
    value = content[name]
    if not isinstance(value, str):
        raise _wrong(path, name, _kind_of(value), "a text")
    return value


def _counts(path: str | Path, name: str, values: object) -> Sequence[int]:
    if not isinstance(values, list):
        raise _wrong(path, name, _kind_of(values), "a list of whole numbers")
    for value in values:
        if type(value) is not int or not 0 <= value <= _MAX_COUNT:
            found = _short(repr(value)) if isinstance(value, int | float) else _kind_of(value)
            raise _wrong(path, name, found, f"whole numbers from 0 to {_MAX_COUNT}")
    return values


def _wrong(path: str | Path, name: str, found: str, expected: str) -> ConfigError:
    return ConfigError(
        f"{path}: '{name}' of the expert profile: found {found}, expected {expected}. It is damaged: save it anew."
    )


def _kind_of(value: object) -> str:
    return f"{len(value)} elements" if isinstance(value, list) else type(value).__name__


def _short(text: str) -> str:
    return text if len(text) <= 120 else f"{text[:117]}..."
