"""Placement files: YAML rules that choose implementation, device and weight format of modules.

    description: attention in 8 bits, one layer as transformers has it      # optional
    strategy: hybrid                                # optional: where modules go whose rule names no device (auto)
    ternary: auto                                   # optional: IQ1_S and IQ1_M as ternary digits: auto | always | never
    rules:                                                                  # the first rule that matches a module wins
      - match: {name: "model.layers.3.*"}          # glob over the qualified name, or "re:" and a regular expression
        implementation: transformers               # moesaic | transformers; left out: moesaic where it has one
      - match: {role: [attention, shared_experts]} # every key given must match; a list matches any of its items
        format: Q8_0                               # keep | a format
      - match: {role: experts, class: "Qwen3*"}    # glob over the class name
        device: cpu                                # auto | cpu | gpu
        format: {gate: keep, up: keep, down: Q6_K} # by projection

A strategy is the name of a template. A module that no rule matches is placed by the strategy, its format kept.
This module checks files; it knows no model, no memory and no weights.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Collection, Iterator
from importlib import resources
from pathlib import Path
from typing import Any

import yaml

from moesaic.errors import PlanError, RuleError
from moesaic.placement.roles import ROLES
from moesaic.placement.rule import DEFAULT_RULE, FORM_CHOICES, KEEP, TEMPLATES, Rule, Rules
from moesaic.quant import FORMATS

__all__ = ["DEFAULT_RULE", "KEEP", "TEMPLATES", "Rule", "Rules", "load_plan", "parse_rules"]

_IMPLEMENTATIONS = ("moesaic", "transformers")
_DEVICES = ("auto", "cpu", "gpu")
_GPU_WORDS = r"(?:gpu|cuda|hip|rocm)(?::(\d+))?"
_PROJECTIONS = ("gate", "up", "down")
_MAX_FILE_BYTES = 1 << 20  # a plan is written by a person; anything longer is not one


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
    path = Path(path_or_template)
    if not path.is_file():
        if path.suffix in {".yaml", ".yml"} or len(path.parts) > 1:
            raise PlanError(f"{path}: there is no such placement file.")
        hint = _did_you_mean(text, TEMPLATES)
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
        keys = self._mapping(root, "the file", ("description", "strategy", "ternary", "rules"), required=("rules",))
        options: dict[str, Any] = {}
        if "description" in keys:
            options["description"] = self._text(keys["description"], "description")
        if "strategy" in keys:
            options["strategy"] = self._choice(keys["strategy"], "strategy", TEMPLATES)
        if "ternary" in keys:
            options["ternary"] = self._choice(keys["ternary"], "ternary", FORM_CHOICES)
        return Rules(self._source, tuple(self._rule(node) for node in self._items(keys["rules"], "rules")), **options)

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
        known = [name for name, fmt in FORMATS.items() if fmt.recodes is None]
        if text.upper() in known:
            return text.upper()
        if text.upper() in FORMATS:
            message = "another form of a file's blocks, which 'ternary' chooses: write 'keep' here."
            raise self._error(node, f"format '{text}' is {message}")
        message = f"unknown format '{text}': expected keep, {_listing(known)}."
        raise self._error(node, message + _did_you_mean(text.upper(), known))

    def _device(self, node: yaml.Node) -> str:
        text = self._text(node, "device")
        card = re.fullmatch(_GPU_WORDS, text)
        if card is None:
            return self._choice(node, "device", _DEVICES)
        if int(card[1] or 0) > 0:
            raise self._error(
                node,
                f"device '{text}': one GPU is used, number 0: write 'gpu' (CUDA_VISIBLE_DEVICES chooses which it is).",
            )
        return "gpu"

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
