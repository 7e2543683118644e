"""A GPU that is not there: Triton's compiler works for it, and kernels are noted and compiled but never launched.

For processes of their own, because kernels that Triton's interpreter runs cannot be compiled: `in_process` starts one.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


class FakeDriver:
    """What the compiler asks an active driver for."""

    def get_current_target(self):
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


def install() -> None:
    """Make it the driver of this process."""
    from triton.runtime import driver

    driver.set_active(FakeDriver())


def in_process(script: str, cache: Path) -> str:
    """Run Python code in which kernels are compiled.

    Args:
        script: begins with the fake driver installed.
        cache: Triton's folder.

    Returns:
        What it printed.
    """
    env = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    # One thread: nothing that is computed there matters, and several would wait busily for each other.
    env |= {"TRITON_CACHE_DIR": str(cache), "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    code = f"from tests import fake_gpu\nfake_gpu.install()\n{script}"
    done = subprocess.run(
        [sys.executable, "-c", code], env=env, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout
