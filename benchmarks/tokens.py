"""What a product costs by its number of tokens: where one way of multiplying should give way to another.

    python benchmarks/tokens.py [--formats Q4_K,Q6_K] [--isas amx,avx512] [--tokens 1,2,4,8,...]

One matrix of 2048 x 2048 a step, another each time, all threads. Prints 10^9 multiply-adds per second.
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch

from kernels import random_stack  # benchmarks/kernels.py
from moesaic import kernels
from moesaic.kernels import linear

ROWS, COLS, MATRICES = 2048, 2048, 48


def rate(weights: kernels.PackedTensor, num_tokens: int, seconds: float) -> float:
    """Median rate of a step in 10^9 multiply-adds per second."""
    x = torch.randn(num_tokens, COLS)
    times, step, end = [], 0, time.perf_counter() + seconds
    while time.perf_counter() < end or step < 5:
        start = time.perf_counter()
        linear(x, weights, index=step % MATRICES)
        times.append(time.perf_counter() - start)
        step += 1
    return ROWS * COLS * num_tokens / 1e9 / statistics.median(times)


def main() -> None:
    """Print a table per format: a row per instruction set, a column per number of tokens."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--formats", default="Q4_K,Q6_K,Q8_0,BF16")
    parser.add_argument("--isas", default=",".join(kernels.isas()))
    parser.add_argument("--tokens", default="1,2,4,6,8,12,16,24,32,40,48,64,128,256,512")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--seconds", type=float, default=0.15, help="for each figure")
    args = parser.parse_args()
    if args.threads:
        kernels.set_num_threads(args.threads)
    counts = [int(count) for count in args.tokens.split(",")]
    print(f"{kernels.num_threads()} threads; 10^9 multiply-adds per second by number of tokens")
    print(f"{'':8} {'':12}" + "".join(f"{count:7}" for count in counts))
    for name in args.formats.split(","):
        weights = random_stack(name, ROWS, COLS, MATRICES)
        for isa in args.isas.split(","):
            kernels.set_isa(isa)
            print(
                f"{name:8} {isa:12}" + "".join(f"{rate(weights, count, args.seconds):7.0f}" for count in counts),
                flush=True,
            )


if __name__ == "__main__":
    main()
