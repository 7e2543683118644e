"""Typed, range-checked access to the key-values of a GGUF file: what `Family` reads a config from.

It does not know what the values mean. Files are an attacker's: a size that a model would be built with is checked
against the tensors that the file really holds.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from moesaic.errors import CheckpointError, UnsupportedModelError
from moesaic.weights import Checkpoint

__all__ = ["GgufMetadata"]

_MAX_INTEGER = (1 << 31) - 1


class GgufMetadata:
    """The metadata of one GGUF checkpoint, with keys named without the architecture's prefix.

    Raises:
        CheckpointError: `general.architecture`, the token embedding or the number of layers is missing or wrong.
    """

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._checkpoint = checkpoint
        architecture = checkpoint.metadata.get("general.architecture")
        if not isinstance(architecture, str):
            raise self._error("general.architecture", f"is {architecture!r}: expected the name of an architecture")
        self.architecture = architecture
        embedding = checkpoint.tensors.get("token_embd.weight")
        if embedding is None or len(embedding.shape) != 2:
            raise self._error("token_embd.weight", "is missing or not a matrix")
        self.vocab_size = embedding.shape[0]
        num_blocks = len({name.split(".")[1] for name in checkpoint.tensors if name.startswith("blk.")})
        num_extra = self.integer("nextn_predict_layers", 0, least=0)
        self.num_layers = self.integer("block_count") - num_extra
        if not 1 <= self.num_layers <= num_blocks:
            raise self._error(
                f"{architecture}.block_count", f"gives {self.num_layers} layers but the file has {num_blocks} blocks"
            )

    def _error(self, key: str, message: str) -> CheckpointError:
        return CheckpointError(self._checkpoint.path, f"{message}.", tensor=key)

    def has(self, key: str) -> bool:
        """Whether the file has `<architecture>.<key>`."""
        return f"{self.architecture}.{key}" in self._checkpoint.metadata

    def has_tensor(self, name: str) -> bool:
        """Whether the file has a tensor of this name."""
        return name in self._checkpoint.tensors

    def tensor_shape(self, name: str) -> tuple[int, ...] | None:
        """Shape of a tensor, K last; None if there is none."""
        info = self._checkpoint.tensors.get(name)
        return None if info is None else info.shape

    def layers_with(self, name: str) -> list[int]:
        """Layers whose block holds a tensor `blk.<layer>.<name>`."""
        return [layer for layer in range(self.num_layers) if self.has_tensor(f"blk.{layer}.{name}")]

    def value(self, key: str, kind: type) -> Any:
        """A value of type `kind` (int, float or bool) that must be there; counts may be 0."""
        if kind is int:
            return self.integer(key, least=0)
        return self.real(key) if kind is float else self.flag(key)

    def integer(self, key: str, default: int | None = None, least: int = 1) -> int:
        """A count or size in `[least, 2^31)`; CheckpointError if it is missing (without default) or out of range."""
        value = self._get(key, default)
        if type(value) is not int or not least <= value <= _MAX_INTEGER:
            raise self._error(f"{self.architecture}.{key}", f"is {_short(value)}: expected an integer from {least} on")
        return value

    def real(self, key: str, default: float | None = None) -> float:
        """A finite number, as the decimal that was meant (files store float32)."""
        value = self._get(key, default)
        if type(value) not in (int, float) or not math.isfinite(value):  # type: ignore[arg-type]
            raise self._error(f"{self.architecture}.{key}", f"is {_short(value)}: expected a finite number")
        return float(str(np.float32(value)))  # type: ignore[arg-type]

    def flag(self, key: str, default: bool | None = None) -> bool:
        """A boolean."""
        value = self._get(key, default)
        if type(value) is not bool:
            raise self._error(f"{self.architecture}.{key}", f"is {_short(value)}: expected true or false")
        return value

    def text(self, key: str, default: str | None = None) -> str:
        """A string."""
        value = self._get(key, default)
        if not isinstance(value, str):
            raise self._error(f"{self.architecture}.{key}", f"is {_short(value)}: expected a string")
        return value

    def flags(self, key: str) -> list[bool] | None:
        """An array with one boolean per layer, or None if the file has none."""
        value = self._checkpoint.metadata.get(f"{self.architecture}.{key}")
        if value is None:
            return None
        if not isinstance(value, np.ndarray) or value.dtype != np.bool_ or len(value) < self.num_layers:
            raise self._error(f"{self.architecture}.{key}", f"is {_short(value)}: expected a boolean for each layer")
        return [bool(item) for item in value[: self.num_layers]]

    def special_tokens(self) -> dict[str, int | list[int] | None]:
        """Ids of the begin, padding and end tokens; None where the file names none.

        Ends of a turn and of a message end an answer too, so there may be several end tokens.
        """
        ends = [number for key in ("eos", "eot", "eom") if (number := self._token_id(key)) is not None]
        ends = list(dict.fromkeys(ends))
        return {
            "bos_token_id": self._token_id("bos"),
            "pad_token_id": self._token_id("padding"),
            "eos_token_id": ends if len(ends) > 1 else next(iter(ends), None),
        }

    def _token_id(self, key: str) -> int | None:
        value = self._checkpoint.metadata.get(f"tokenizer.ggml.{key}_token_id")
        return value if type(value) is int and 0 <= value < self.vocab_size else None

    def unsupported(self, key: str, found: object, expected: str) -> UnsupportedModelError:
        """The error for a value that is well formed but asks for something that we cannot do."""
        return UnsupportedModelError(
            f"{self._checkpoint.path}: '{self.architecture}.{key}' is {_short(found)}: this version knows {expected}."
        )

    def _get(self, key: str, default: object) -> object:
        value = self._checkpoint.metadata.get(f"{self.architecture}.{key}", default)
        if value is None:
            raise self._error(f"{self.architecture}.{key}", "is missing from the metadata")
        return value


def _short(value: object) -> str:
    text = f"an array of {len(value)}" if isinstance(value, np.ndarray | tuple) else repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
