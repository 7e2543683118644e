"""The layers of the package: a package imports only from packages to its left (docs/architecture.md)."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

SOURCE = Path(__file__).resolve().parent.parent / "src" / "moesaic"

# Packages on the same rank may not import each other, unless they are the same package.
RANKS: tuple[frozenset[str], ...] = (
    frozenset({"errors"}),
    frozenset({"config", "files", "_native", "demo"}),
    frozenset({"quant"}),
    frozenset({"weights", "kernels"}),
    frozenset({"kvcache"}),
    frozenset({"modules"}),
    frozenset({"models"}),
    frozenset({"placement"}),
    frozenset({"engine"}),
    frozenset({"server"}),
    frozenset({"cli"}),
)
RANK_OF = {package: rank for rank, packages in enumerate(RANKS) for package in packages}


def imported_packages(tree: ast.AST, inside: tuple[str, ...]) -> Iterator[tuple[str, int]]:
    """Yield (top-level package of moesaic, line) for every import, wherever it stands, TYPE_CHECKING included."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parents = inside[: len(inside) - node.level + 1]
                base = ".".join((*parents, base)) if base else ".".join(parents)
            names = [f"{base}.{alias.name}" for alias in node.names]
        else:
            continue
        for name in names:
            parts = name.split(".")
            if parts[0] == "moesaic" and len(parts) > 1:
                yield parts[1], node.lineno


def violations(relative: Path, text: str) -> list[str]:
    """Return one line for each import in the file that points to the right or sideways."""
    package = relative.parts[0].removesuffix(".py")
    inside = ("moesaic", *relative.parts[:-1])
    found = []
    for target, line in imported_packages(ast.parse(text), inside):
        if target == package or target not in RANK_OF:
            continue  # a public name of moesaic/__init__.py, such as __version__
        if RANK_OF[target] >= RANK_OF[package]:
            found.append(f"{relative}:{line}: {package} imports {target}")
    return found


def source_files() -> list[Path]:
    return sorted(path.relative_to(SOURCE) for path in SOURCE.rglob("*.py") if path.parent != SOURCE)


def test_every_package_has_a_rank() -> None:
    packages = {path.name for path in SOURCE.iterdir() if path.is_dir() and any(path.rglob("*.py"))}
    assert packages - RANK_OF.keys() == set()


@pytest.mark.parametrize("relative", source_files(), ids=str)
def test_imports_point_left(relative: Path) -> None:
    assert violations(relative, (SOURCE / relative).read_text(encoding="utf-8")) == []


@pytest.mark.parametrize(
    "text",
    [
        "import moesaic.engine.loader",
        "from moesaic.cli import main",
        "from moesaic import engine",
        "from .. import engine",
        "def f():\n    from ..engine.loader import load",
    ],
)
def test_the_check_sees_a_wrong_import(text: str) -> None:
    assert violations(Path("weights/resolve.py"), text) != []


def test_the_check_accepts_a_right_import() -> None:
    assert violations(Path("weights/resolve.py"), "from ..quant.formats import get_format\nfrom . import hub") == []
