"""Scripts of benchmarks/ are imported as they import each other: by their folder."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

FOLDER = str(Path(__file__).resolve().parents[2] / "benchmarks")
if FOLDER not in sys.path:
    sys.path.insert(0, FOLDER)
