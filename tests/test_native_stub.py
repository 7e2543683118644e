"""The stub of the extension says what the extension has: `make stubs` writes it."""

from __future__ import annotations

import ast
from pathlib import Path

import moesaic
from moesaic import _native


def test_stub_names_what_the_extension_has() -> None:
    stub = Path(moesaic.__file__).with_name("_native.pyi").read_text(encoding="utf-8")
    named = {
        node.name: node
        for node in ast.parse(stub).body
        if isinstance(node, ast.FunctionDef | ast.ClassDef | ast.AsyncFunctionDef)
    }
    functions = {name for name, value in vars(_native).items() if callable(value) and not name.startswith("__")}
    assert set(named) == functions


def test_stub_has_the_parameters_of_every_function() -> None:
    stub = Path(moesaic.__file__).with_name("_native.pyi").read_text(encoding="utf-8")
    for node in ast.parse(stub).body:
        if isinstance(node, ast.FunctionDef):
            signature = (getattr(_native, node.name).__doc__ or "").splitlines()[0]
            for argument in node.args.args:
                assert f"{argument.arg}: " in signature, node.name
