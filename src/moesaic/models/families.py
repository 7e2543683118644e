"""Finds the family (`models/<model_type>.py`) of a model: by its model type, or by what a GGUF says of itself."""

from __future__ import annotations

import importlib
import importlib.util
import pkgutil
import re

from moesaic import models
from moesaic.errors import UnsupportedModelError
from moesaic.models.base import Family
from moesaic.models.gguf_metadata import GgufMetadata

__all__ = ["all_families", "family_for", "family_of"]


def family_for(model_type: str) -> Family:
    """The family in `models/<model_type>.py`.

    Raises:
        UnsupportedModelError: there is no such file; the message lists the families there are.
    """
    name = f"moesaic.models.{model_type}"
    if re.fullmatch(r"[a-z][a-z0-9_]*", model_type) and importlib.util.find_spec(name) is not None:
        found = _family_in(name)
        if found is not None and found.model_type == model_type:
            return found
    known = ", ".join(sorted(family.model_type for family in all_families()))
    raise UnsupportedModelError(f"GGUF files of model type '{model_type}' are not known here: expected one of {known}.")


def family_of(metadata: GgufMetadata) -> Family:
    """The family that claims a GGUF file.

    Raises:
        UnsupportedModelError: none does; the message lists the architectures there are.
    """
    for family in all_families():
        if family.architecture == metadata.architecture and family.claims(metadata):
            return family
    known = ", ".join(sorted({family.architecture for family in all_families()}))
    raise UnsupportedModelError(
        f"GGUF architecture '{metadata.architecture}' (of this kind) cannot be run: this version knows "
        f"mixture-of-experts models of {known}."
    )


def all_families() -> list[Family]:
    """One instance of every family in this package."""
    found = (_family_in(f"moesaic.models.{module.name}") for module in pkgutil.iter_modules(models.__path__))
    return [family for family in found if family is not None]


def _family_in(module_name: str) -> Family | None:
    """The family that a module defines (its own, not one that it imports)."""
    for value in vars(importlib.import_module(module_name)).values():
        if (
            isinstance(value, type)
            and issubclass(value, Family)
            and value.__module__ == module_name != Family.__module__
        ):
            return value()
    return None
