"""A placement as data: rules that match modules, and a strategy for what they leave open.

It knows no files (`rules`), no model and no memory.
"""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Mapping
from dataclasses import dataclass, field

__all__ = ["DEFAULT_RULE", "FORM_CHOICES", "KEEP", "TEMPLATES", "Rule", "Rules", "plan_name"]

KEEP = "keep"
TEMPLATES = ("auto", "cpu", "hybrid", "layers", "gpu")
"""Built-in placements, a file each in `templates/`; what a strategy may be, too."""
FORM_CHOICES = ("auto", "always", "never")
"""Whether IQ1_S and IQ1_M are held as ternary digits: see `forms`."""


@dataclass(frozen=True, slots=True, eq=False)
class Rule:
    """One rule of a placement file; two rules are equal only if they are the same line of the same file.

    Attributes:
        roles, names, classes: alternatives that a module must match; empty matches every module.
        implementation: "moesaic", "transformers", or None for moesaic where it has an implementation.
        device: "cpu", "gpu", or "auto": as the strategy of the file places it.
        formats: projection ("gate", "up", "down", or "*" for every matrix) -> name of a format, or "keep".
        line: line of the file, counted from 1; 0 for the built-in default.
    """

    roles: tuple[str, ...] = ()
    names: tuple[str, ...] = ()
    classes: tuple[str, ...] = ()
    implementation: str | None = None
    device: str = "auto"
    formats: Mapping[str, str] = field(default_factory=lambda: {"*": KEEP})
    line: int = 0

    def matches(self, name: str, role: str, class_name: str) -> bool:
        """Whether the module of this qualified name, role and class is placed by this rule."""
        return (
            (not self.roles or role in self.roles)
            and (not self.names or any(_name_matches(pattern, name) for pattern in self.names))
            and (not self.classes or any(fnmatch.fnmatchcase(class_name, pattern) for pattern in self.classes))
        )

    @property
    def matches_everything(self) -> bool:
        """Whether it is the last rule that can count."""
        return not self.roles and not self.classes and (not self.names or "*" in self.names)

    def format_of(self, projection: str) -> str:
        """The format this rule gives to a projection ("gate", "up", "down", or another name), or "keep"."""
        return self.formats.get(projection, self.formats.get("*", KEEP))

    def __str__(self) -> str:
        parts = [("role", self.roles), ("name", self.names), ("class", self.classes)]
        return ", ".join(f"{key}: {' | '.join(values)}" for key, values in parts if values) or "everything"


DEFAULT_RULE = Rule()


@dataclass(frozen=True, slots=True)
class Rules:
    """The rules of one placement file, in order; the first that matches a module places it.

    Attributes:
        source: the file; `NAME.yaml` for a template.
        rules: in the order of the file.
        description: for people.
        strategy: one of `TEMPLATES`: how modules are placed whose rule names no device.
        ternary: one of `FORM_CHOICES`.
    """

    source: str
    rules: tuple[Rule, ...]
    description: str = ""
    strategy: str = "auto"
    ternary: str = "auto"

    @property
    def name(self) -> str:
        """What a person calls it: see `plan_name`."""
        return plan_name(self.source)

    @property
    def may_use_gpu(self) -> bool:
        """Whether any module could be placed on a GPU, whatever the model and the computer are."""
        for rule in self.rules:
            if rule.device == "gpu":
                return True
            if rule.device == "cpu" and rule.matches_everything:
                return False
        return self.strategy != "cpu"

    @property
    def needs_gpu(self) -> bool:
        """Whether the rules ask for a GPU, so that there is no plan without one."""
        if any(rule.device == "gpu" for rule in self.rules):
            return True
        return self.may_use_gpu and self.strategy != "auto"

    def find(self, name: str, role: str, class_name: str) -> Rule:
        """The first rule that matches, or `DEFAULT_RULE`."""
        return next((rule for rule in self.rules if rule.matches(name, role, class_name)), DEFAULT_RULE)


def plan_name(source: str) -> str:
    """What a person calls a placement: "hybrid" for the template `hybrid.yaml`, the path of any other file."""
    template = source.removesuffix(".yaml")
    return template if template in TEMPLATES else source


def _name_matches(pattern: str, name: str) -> bool:
    if pattern.startswith("re:"):
        return re.fullmatch(pattern[3:], name) is not None
    return fnmatch.fnmatchcase(name, pattern)
