"""Memory of a quantisation: a process of its own, because peaks are counted per process."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from tests.tiny_models import save_large

# A piece of 16 MiB as floats, its stored form and its blocks. Measured: 47 MB, whatever the size of the model.
_LIMIT = 80e6
# Prints the bytes of the model and the growth of the peak from the moment that everything is imported and planned.
_SCRIPT = """
import resource, sys
from pathlib import Path
from moesaic.engine.quantize import quantize_checkpoint
from moesaic.engine.quantize_plan import make_quantize_plan
from moesaic.quant import get_format
from moesaic.weights import open_checkpoint

peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
source, folder = Path(sys.argv[1]), Path(sys.argv[2])
before = None
for output, name in (("a.gguf", "Q8_0"), ("b.gguf", "Q6_K")):
    checkpoint, fmt = open_checkpoint(source), get_format(name)
    plan = make_quantize_plan(checkpoint, fmt)
    before = before or peak()
    quantize_checkpoint(checkpoint, folder / output, fmt)
    print(plan.source_nbytes, peak() - before)
    source = folder / output
"""


def test_memory_stays_far_below_the_size_of_the_model(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    save_large(
        tmp_path / "model",
        "qwen3_moe",
        hidden_size=1024,
        moe_intermediate_size=1024,
        num_experts=12,
        vocab_size=8192,
    )
    command = [sys.executable, "-c", _SCRIPT, str(tmp_path / "model"), str(tmp_path)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    (safetensors, growth), (gguf, growth_of_both) = (map(int, line.split()) for line in done.stdout.splitlines())
    assert safetensors > 260e6
    assert growth < _LIMIT
    assert gguf > 140e6
    assert growth_of_both < _LIMIT
