"""Memory of a quantisation: a process of its own, because peaks are counted per process."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import torch
from tests.tiny_models import save_tiny

# A piece of 16 MiB as floats, its stored form and its blocks; the model has 340 MB. Measured: 47 MB.
_LIMIT = 80e6
# Reports the growth of the peak from the moment that everything is imported and planned.
_SCRIPT = """
import resource, sys
from pathlib import Path
from moesaic.engine.quantize import quantize_checkpoint
from moesaic.engine.quantize_plan import make_quantize_plan
from moesaic.quant import get_format
from moesaic.weights import open_checkpoint

checkpoint = open_checkpoint(Path(sys.argv[1]))
nbytes = make_quantize_plan(checkpoint, get_format(sys.argv[3])).source_nbytes
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
quantize_checkpoint(checkpoint, Path(sys.argv[2]), get_format(sys.argv[3]))
after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print(nbytes, (after - before) * 1024)
"""


def peak_growth(source: Path, output: Path, name: str) -> tuple[int, int]:
    command = [sys.executable, "-c", _SCRIPT, str(source), str(output), name]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    nbytes, growth = done.stdout.split()
    return int(nbytes), int(growth)


def test_memory_stays_far_below_the_size_of_the_model(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    save_tiny(
        tmp_path / "model",
        "qwen3_moe",
        dtype=torch.bfloat16,
        hidden_size=1024,
        moe_intermediate_size=1024,
        num_experts=16,
        vocab_size=8192,
    )
    for source, name, least in (("model", "Q8_0", 320e6), ("out.gguf", "Q4_K", 160e6)):
        nbytes, growth = peak_growth(
            tmp_path / source, tmp_path / ("out.gguf" if name == "Q8_0" else "again.gguf"), name
        )
        assert nbytes > least
        assert growth < _LIMIT
