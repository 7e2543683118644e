"""How fast attention of parts of long prompts is, on a paged bfloat16 cache.

    python benchmarks/prompt_attention.py [--isas amx,avx512] [--threads N] [--seconds S] [--longest S]

In the shapes of Qwen3-30B-A3B and DeepSeek-V3, a part of 64, 256 or 2,048 tokens ends a prompt of 512, 8,192 or 32,768.
Rates are in 10^9 multiply-adds per second, those that the causal mask leaves: by default, that is by tiles where there
are any, and within `independent_rows()`, without them. Times are the best of the repetitions; what would take longer
than `--longest` for one is left out ("-").
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import torch

from moesaic import _native
from moesaic.errors import KernelError
from moesaic.kernels import active_isa, independent_rows, num_threads, peak_ops, set_num_threads
from moesaic.kernels.paged_attention import paged_attention, paged_latent_attention

BLOCK = 64
PARTS, LENGTHS = (64, 256, 2048), (512, 8192, 32768)


def where(part: int, length: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Tables, lengths and starts of one sequence whose blocks lie in any order."""
    tables = torch.randperm(length // BLOCK).int()[None]
    return tables, torch.tensor([length], dtype=torch.int32), torch.tensor([0, part], dtype=torch.int32)


def qwen(part: int, length: int) -> tuple[Callable[[], object], int]:
    """One call, and the multiply-adds of a query and a key: 32 heads of 128 over 4 key/value heads."""
    q = torch.randn(part, 32, 128)
    keys, values = (torch.randn(length // BLOCK, BLOCK, 4, 128).bfloat16() for _ in range(2))
    at = where(part, length)
    return lambda: paged_attention(q, keys, values, *at, scale=128**-0.5), 32 * (128 + 128)


def deepseek(part: int, length: int) -> tuple[Callable[[], object], int]:
    """The same for 128 heads over latents of 512 and rotary keys of 64."""
    q_latent, q_rope = torch.randn(part, 128, 512), torch.randn(part, 128, 64)
    cache = torch.randn(length // BLOCK, BLOCK, 576).bfloat16()
    at = where(part, length)
    return lambda: paged_latent_attention(q_latent, q_rope, cache, *at, scale=192**-0.5), 128 * (576 + 512)


def best_time(call: Callable[[], object], seconds: float) -> float:
    """Shortest time of one call, over repetitions that take about `seconds`, at least one."""
    best, end = float("inf"), time.perf_counter() + seconds
    while best == float("inf") or time.perf_counter() < end:
        start = time.perf_counter()
        call()
        best = min(best, time.perf_counter() - start)
    return best


def peak(kind: str) -> float:
    try:
        return peak_ops(kind).median / 2  # type: ignore[arg-type]
    except KernelError:
        return 0.0


def measure(isa: str, seconds: float, longest: float) -> None:
    _native.set_isa(isa)
    fma, tile = peak("fma_f32"), peak("tile_bf16")
    print(f"{active_isa()}, {num_threads()} threads, peak {fma:.0f} float32, {tile:.0f} bfloat16 tiles (10^9 / s)")
    print(f"{'':<14}{'part':>6}{'prompt':>8}{'default':>10}{'no tiles':>10}")
    for name, make in (("Qwen3-30B-A3B", qwen), ("DeepSeek-V3", deepseek)):
        rates = [0.0, 0.0]
        for length in LENGTHS:
            for part in PARTS:
                if part > length:
                    continue
                pairs = part * (length - part) + part * (part + 1) // 2
                call, work = make(part, length)
                line = ""
                for i, alone in enumerate((False, True) if tile else (False,)):
                    if rates[i] > 0 and pairs * work / rates[i] > longest:
                        line += f"{'-':>10}"
                        continue
                    with independent_rows(alone):
                        if rates[i] == 0:
                            call()
                        rates[i] = pairs * work / best_time(call, seconds)
                    line += f"{rates[i] * 1e-9:10.0f}"
                print(f"{name:<14}{part:>6}{length:>8}{line}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--isas", default=active_isa(), help="instruction sets, with commas between")
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("--seconds", type=float, default=0.2, help="time for each figure")
    parser.add_argument("--longest", type=float, default=3.0, help="of one call, in seconds")
    options = parser.parse_args()
    if options.threads is not None:
        set_num_threads(options.threads)
    for isa in options.isas.split(","):
        measure(isa, options.seconds, options.longest)


if __name__ == "__main__":
    main()
