"""Placement files: YAML rules that choose implementation, device and weight format of modules.

    description: attention in 8 bits, one layer as transformers has it      # optional
    rules:                                                                  # the first rule that matches a module wins
      - match: {name: "model.layers.3.*"}          # glob over the qualified name, or "re:" and a regular expression
        implementation: transformers               # moesaic | transformers; left out: moesaic where it has one
      - match: {role: [attention, shared_experts]} # every key given must match; a list matches any of its items
        format: Q8_0                               # keep | a format
      - match: {role: experts, class: "Qwen3*"}    # glob over the class name
        device: cpu                                # auto | cpu
        format: {gate: keep, up: keep, down: Q6_K} # by projection

A module that no rule matches is placed as by `auto`. This module checks files and matches names; it knows no model,
no memory and no weights.
"""

from __future__ import annotations

import difflib
import fnmatch
import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any

import yaml

from moesaic.errors import PlanError, RuleError, UnsupportedFormatError
from moesaic.placement.roles import ROLES
from moesaic.quant import FORMATS, get_format

__all__ = ["DEFAULT_RULE", "KEEP", "TEMPLATES", "Rule", "Rules", "load_plan", "parse_rules"]

KEEP = "keep"
TEMPLATES = ("auto", "cpu")
_LATER_TEMPLATES = ("hybrid", "layers", "gpu")
_IMPLEMENTATIONS = ("moesaic", "transformers")
_DEVICES = ("auto", "cpu")
_PROJECTIONS = ("gate", "up", "down")
_MAX_FILE_BYTES = 1 << 20  # a plan is written by a person; anything longer is not one


@dataclass(frozen=True, slots=True, eq=False)
class Rule:
    """One rule of a placement file; two rules are equal only if they are the same line of the same file.

    Attributes:
        roles, names, classes: alternatives that a module must match; empty matches every module.
        implementation: "moesaic", "transformers", or None for moesaic where it has an implementation.
        device: "cpu", or "auto".
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

    def format_of(self, projection: str) -> str:
        """The format this rule gives to a projection ("gate", "up", "down", or another name), or "keep"."""
        return self.formats.get(projection, self.formats.get("*", KEEP))

    def __str__(self) -> str:
        parts = [("role", self.roles), ("name", self.names), ("class", self.classes)]
        return ", ".join(f"{key}: {' | '.join(values)}" for key, values in parts if values) or "everything"


DEFAULT_RULE = Rule()


@dataclass(frozen=True, slots=True)
class Rules:
    """The rules of one placement file, in order; the first that matches a module places it."""

    source: str
    rules: tuple[Rule, ...]
    description: str = ""

    def find(self, name: str, role: str, class_name: str) -> Rule:
        """The first rule that matches, or `DEFAULT_RULE`."""
        return next((rule for rule in self.rules if rule.matches(name, role, class_name)), DEFAULT_RULE)


def load_plan(path_or_template: str | Path) -> Rules:
    """Read a placement file, or one of the templates in `TEMPLATES` by its name.

    Raises:
        PlanError: there is no such template or file, or it belongs to a later version.
        RuleError: the file is wrong; the message names the file and the line.
    """
    text = str(path_or_template)
    if text in TEMPLATES:
        source = resources.files("moesaic.placement") / "templates" / f"{text}.yaml"
        return parse_rules(source.read_text(encoding="utf-8"), f"{text}.yaml")
    if text in _LATER_TEMPLATES:
        raise PlanError(
            f"plan '{text}' places modules on a GPU, which this version cannot do yet: use 'auto' or 'cpu'."
        )
    path = Path(path_or_template)
    if not path.is_file():
        if path.suffix in {".yaml", ".yml"} or len(path.parts) > 1:
            raise PlanError(f"{path}: there is no such placement file.")
        hint = _did_you_mean(text, (*TEMPLATES, *_LATER_TEMPLATES))
        raise PlanError(f"'{text}' is no plan: expected {_listing(TEMPLATES)} or a YAML file.{hint}")
    if path.stat().st_size > _MAX_FILE_BYTES:
        raise RuleError(path, 1, f"the file has {path.stat().st_size} bytes: expected a placement of at most 1 MiB.")
    try:
        return parse_rules(path.read_text(encoding="utf-8"), str(path))
    except UnicodeDecodeError as error:
        raise RuleError(path, 1, f"the file is not UTF-8 text ({error.reason} at byte {error.start}).") from error


def parse_rules(text: str, source: str) -> Rules:
    """Check and read the text of a placement file; `source` is named in errors.

    Raises:
        RuleError: with the line of the first defect.
    """
    try:
        root = yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        raise RuleError(source, mark.line + 1 if mark else 1, f"not valid YAML: {error.problem}.") from error
    except (yaml.YAMLError, RecursionError) as error:
        raise RuleError(source, 1, f"not valid YAML: {error}.") from error
    if root is None:
        raise RuleError(source, 1, "the file is empty: expected 'rules:' and a list of rules.")
    return _Reader(source).rules(root)


class _Reader:
    """Turns YAML nodes, which know their lines, into rules; the schema's depth bounds what aliases can expand to."""

    def __init__(self, source: str) -> None:
        self._source = source

    def rules(self, root: yaml.Node) -> Rules:
        keys = self._mapping(root, "the file", ("description", "rules"), required=("rules",))
        description = self._text(keys["description"], "description") if "description" in keys else ""
        return Rules(self._source, tuple(self._rule(node) for node in self._items(keys["rules"], "rules")), description)

    def _rule(self, node: yaml.Node) -> Rule:
        keys = self._mapping(node, "a rule", ("match", "implementation", "device", "format"), required=("match",))
        if len(keys) == 1:
            raise self._error(node, "the rule only matches: expected 'implementation', 'device' or 'format' as well.")
        options: dict[str, Any] = dict(self._match(keys["match"]))
        if "implementation" in keys:
            options["implementation"] = self._choice(keys["implementation"], "implementation", _IMPLEMENTATIONS)
        if "device" in keys:
            options["device"] = self._device(keys["device"])
        if "format" in keys:
            options["formats"] = self._formats(keys["format"])
            if options.get("implementation") == "transformers" and set(options["formats"].values()) != {KEEP}:
                raise self._error(keys["format"], "a transformers module holds F32 weights: leave 'format' out.")
        return Rule(**options, line=node.start_mark.line + 1)

    def _match(self, node: yaml.Node) -> dict[str, tuple[str, ...]]:
        keys = self._mapping(node, "match", ("role", "name", "class"))
        if not keys:
            raise self._error(node, "'match' is empty: expected role, name or class (name: \"*\" matches everything).")
        match: dict[str, tuple[str, ...]] = {}
        if "role" in keys:
            match["roles"] = tuple(self._choice(item, "role", ROLES) for item in self._one_or_more(keys["role"]))
        if "name" in keys:
            match["names"] = tuple(self._pattern(item) for item in self._one_or_more(keys["name"]))
        if "class" in keys:
            match["classes"] = tuple(self._text(item, "class") for item in self._one_or_more(keys["class"]))
        return match

    def _formats(self, node: yaml.Node) -> dict[str, str]:
        if not isinstance(node, yaml.MappingNode):
            return {"*": self._format(node)}
        keys = self._mapping(node, "format", _PROJECTIONS)
        if not keys:
            raise self._error(node, f"'format' is empty: expected a format, or some of {_listing(_PROJECTIONS)}.")
        return {projection: self._format(item) for projection, item in keys.items()}

    def _format(self, node: yaml.Node) -> str:
        text = self._text(node, "format")
        if text.lower() == KEEP:
            return KEEP
        try:
            return get_format(text.upper()).name
        except UnsupportedFormatError as error:
            message = f"unknown format '{text}': expected keep, {_listing(tuple(FORMATS))}."
            raise self._error(node, message + _did_you_mean(text.upper(), FORMATS)) from error

    def _device(self, node: yaml.Node) -> str:
        text = self._text(node, "device")
        if re.fullmatch(r"(gpu|cuda|hip|rocm|xpu|mps)(:\d+)?", text):
            raise self._error(node, f"device '{text}': this version places modules on the CPU only; write 'cpu'.")
        return self._choice(node, "device", _DEVICES)

    def _pattern(self, node: yaml.Node) -> str:
        text = self._text(node, "name")
        if text.startswith("re:"):
            try:
                re.compile(text[3:])
            except re.error as error:
                raise self._error(node, f"'{text[3:]}' is not a regular expression: {error}.") from error
        return text

    def _mapping(
        self, node: yaml.Node, what: str, allowed: tuple[str, ...], required: tuple[str, ...] = ()
    ) -> dict[str, yaml.Node]:
        if not isinstance(node, yaml.MappingNode):
            raise self._error(node, f"{what} is {_kind(node)}: expected a mapping with {_listing(allowed)}.")
        found: dict[str, yaml.Node] = {}
        for key_node, value in node.value:
            key = self._text(key_node, "a key")
            if key not in allowed:
                hint = _did_you_mean(key, allowed)
                raise self._error(key_node, f"unknown key '{key}' in {what}: expected {_listing(allowed)}.{hint}")
            if key in found:
                raise self._error(key_node, f"key '{key}' is given twice in {what}.")
            found[key] = value
        for key in required:
            if key not in found:
                raise self._error(node, f"{what} has no '{key}'.")
        return found

    def _items(self, node: yaml.Node, what: str) -> Iterator[yaml.Node]:
        if not isinstance(node, yaml.SequenceNode):
            raise self._error(node, f"'{what}' is {_kind(node)}: expected a list, each item starting with '-'.")
        if not node.value:
            raise self._error(node, f"'{what}' is an empty list: expected at least one item.")
        yield from node.value

    def _one_or_more(self, node: yaml.Node) -> list[yaml.Node]:
        return list(self._items(node, "match")) if isinstance(node, yaml.SequenceNode) else [node]

    def _choice(self, node: yaml.Node, what: str, allowed: tuple[str, ...]) -> str:
        text = self._text(node, what)
        if text not in allowed:
            raise self._error(
                node, f"unknown {what} '{text}': expected {_listing(allowed)}.{_did_you_mean(text, allowed)}"
            )
        return text

    def _text(self, node: yaml.Node, what: str) -> str:
        if not isinstance(node, yaml.ScalarNode) or not node.value:
            raise self._error(node, f"{what} is {_kind(node)}: expected a word.")
        return str(node.value)

    def _error(self, node: yaml.Node, message: str) -> RuleError:
        return RuleError(self._source, node.start_mark.line + 1, message)


def _name_matches(pattern: str, name: str) -> bool:
    if pattern.startswith("re:"):
        return re.fullmatch(pattern[3:], name) is not None
    return fnmatch.fnmatchcase(name, pattern)


def _kind(node: yaml.Node) -> str:
    if isinstance(node, yaml.ScalarNode):
        return f"'{node.value}'" if node.value else "empty"
    return "a list" if isinstance(node, yaml.SequenceNode) else "a mapping"


def _listing(words: Collection[str]) -> str:
    *first, last = words
    return f"{', '.join(first)} or {last}" if first else last


def _did_you_mean(word: str, known: Collection[str]) -> str:
    close = difflib.get_close_matches(word, list(known), n=1)
    return f" Did you mean '{close[0]}'?" if close else ""
