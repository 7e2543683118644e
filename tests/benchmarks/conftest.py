"""Scripts of benchmarks/ are imported as they import each other: by their folder."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
for folder in map(str, (BENCHMARKS, BENCHMARKS / "peers")):
    if folder not in sys.path:
        sys.path.insert(0, folder)
