"""How fast the operations besides matrix products are, in the shapes of Qwen3-30B-A3B and DeepSeek-V3.

    python benchmarks/ops.py [--threads N] [--seconds S] [--json]

Attention is compared with torch's scaled_dot_product_attention on the same tensors and threads. Decode is a question of
bandwidth (bytes of keys and values read per second, beside what plain reading reaches), prefill one of arithmetic
(operations per second, beside what multiply-adds in registers reach). Times are the best of the repetitions, bandwidth
and peak are medians.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass

import torch

from moesaic.kernels import active_isa, num_threads, ops, peak_ops, read_bandwidth, set_num_threads
from moesaic.placement import detect_hardware

DTYPES = (torch.float32, torch.bfloat16)


@dataclass(frozen=True)
class Result:
    """One line: microseconds of ours and of torch, and the rate of ours."""

    name: str
    microseconds: float
    torch_microseconds: float | None
    gigabytes_per_second: float | None = None
    gigaflops: float | None = None


def best_time(seconds: float, function: Callable[..., object], *arguments: object, **options: object) -> float:
    """Shortest time of one call in microseconds, over repetitions that take about `seconds`."""
    function(*arguments, **options)
    best, end = float("inf"), time.perf_counter() + seconds
    while time.perf_counter() < end:
        start = time.perf_counter()
        function(*arguments, **options)
        best = min(best, time.perf_counter() - start)
    return best * 1e6


def type_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def gqa(num_queries: int, num_keys: int, dtype: torch.dtype, seconds: float) -> Result:
    """Attention of Qwen3-30B-A3B: 32 heads of 128 over 4 key/value heads."""
    q = torch.randn(1, num_queries, 32, 128).transpose(1, 2)
    k, v = (torch.randn(1, 4, num_keys, 128).to(dtype) for _ in range(2))
    offset = num_keys - num_queries
    ours = best_time(seconds, ops.attention, q, k, v, scale=128**-0.5, causal_offset=offset)
    sdpa = torch.nn.functional.scaled_dot_product_attention
    theirs = best_time(seconds, sdpa, q.to(dtype), k, v, is_causal=num_queries > 1, enable_gqa=True)
    name = f"attention Qwen3-30B-A3B {num_queries} x {num_keys} {type_name(dtype)}"
    if num_queries == 1:
        return Result(name, ours, theirs, gigabytes_per_second=2 * k.nbytes / ours * 1e-3)
    pairs = num_queries * (offset + (num_queries + 1) / 2)
    return Result(name, ours, theirs, gigaflops=32 * pairs * 128 * 4 / ours * 1e-3)


def mla(num_queries: int, num_keys: int, dtype: torch.dtype, seconds: float) -> Result:
    """Absorbed attention of DeepSeek-V3: 128 heads over latents of 512 and rotary keys of 64."""
    q_latent, q_rope = torch.randn(1, 128, num_queries, 512), torch.randn(1, 128, num_queries, 64)
    latent, rope = torch.randn(1, num_keys, 512).to(dtype), torch.randn(1, num_keys, 64).to(dtype)
    offset = num_keys - num_queries
    caches = (latent, rope)
    ours = best_time(seconds, ops.mla_attention, q_latent, q_rope, *caches, scale=192**-0.5, causal_offset=offset)
    q = torch.cat([q_latent, q_rope], -1).to(dtype)
    k, v = torch.cat([latent, rope], -1).unsqueeze(1), latent.unsqueeze(1)
    sdpa = torch.nn.functional.scaled_dot_product_attention
    theirs = None
    if num_queries == 1 and num_keys <= 512:  # torch copies the keys for every head: longer ones take seconds
        theirs = best_time(seconds, sdpa, q, k, v, scale=192**-0.5, enable_gqa=True)
    pairs = num_queries * (offset + (num_queries + 1) / 2)
    name = f"attention DeepSeek-V3 {num_queries} x {num_keys} {type_name(dtype)}"
    return Result(name, ours, theirs, gigaflops=128 * pairs * (576 + 512) * 2 / ours * 1e-3)


def add_and_norm(x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """What torch needs for a residual and a norm."""
    return torch.rms_norm(residual.add_(x), weight.shape, weight, 1e-6)


def softmax_top_k(logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """What a stock router does."""
    weights, index = torch.topk(torch.softmax(logits, -1), 8)
    return weights / weights.sum(-1, keepdim=True), index


def small_steps(num_tokens: int, seconds: float) -> Iterator[Result]:
    """What a layer does between its products."""
    x, residual, weight = torch.randn(num_tokens, 2048), torch.randn(num_tokens, 2048), torch.ones(2048)
    ours = best_time(seconds, ops.rms_norm, x, weight, 1e-6, residual=residual)
    theirs = best_time(seconds, add_and_norm, x, residual, weight)
    yield Result(f"rms_norm with residual, {num_tokens} x 2048", ours, theirs)
    q = torch.randn(1, num_tokens, 32, 128).transpose(1, 2)
    k = torch.randn(1, num_tokens, 4, 128).transpose(1, 2)
    angles, ones = torch.rand(1, num_tokens, 64), torch.ones(128)
    norm = {"norm": "per_head", "q_norm": ones, "k_norm": ones, "eps": 1e-6}
    ours = best_time(seconds, ops.norm_and_rotate_, q, k, angles.cos(), angles.sin(), **norm)
    yield Result(f"norms and rope of queries and keys, {num_tokens} tokens", ours, None)
    logits = torch.randn(num_tokens, 128)
    ours = best_time(seconds, ops.route, logits, 8, normalize=True)
    yield Result(f"route, 8 of 128, {num_tokens} tokens", ours, best_time(seconds, softmax_top_k, logits))
    logits, bias = torch.randn(num_tokens, 256), torch.randn(256) * 0.1
    groups = {"group_score": "sum_of_two", "num_groups": 8, "topk_groups": 4}
    ours = best_time(seconds, ops.route, logits, 8, score="sigmoid", bias=bias, normalize=True, scale=2.5, **groups)
    yield Result(f"route, 8 of 256 in 4 of 8 groups, {num_tokens} tokens", ours, None)


def results(seconds: float) -> Iterator[Result]:
    for dtype in DTYPES:
        for num_keys in (512, 4096, 32768):
            yield gqa(1, num_keys, dtype, seconds)
        yield gqa(512, 512, dtype, seconds)
        yield gqa(2048, 2048, dtype, seconds)
        for num_keys in (512, 8192):
            yield mla(1, num_keys, dtype, seconds)
        yield mla(64, 512, dtype, seconds)
    for num_tokens in (1, 512):
        yield from small_steps(num_tokens, seconds)


def line(result: Result, bandwidth: float, peak: float) -> str:
    rate = ""
    if result.gigabytes_per_second is not None:
        rate = f"{result.gigabytes_per_second:7.1f} GB/s     {result.gigabytes_per_second / bandwidth:4.0%} of reading"
    elif result.gigaflops is not None:
        rate = f"{result.gigaflops:7.1f} GFLOP/s  {result.gigaflops / peak:4.0%} of peak"
    theirs = "" if result.torch_microseconds is None else f"{result.torch_microseconds:12.1f}"
    return f"{result.name:<50}{result.microseconds:12.1f}{theirs:>14}   {rate}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=None, help="threads of ours and of torch")
    parser.add_argument("--seconds", type=float, default=0.5, help="time for each figure")
    parser.add_argument("--json", action="store_true", help="one JSON document instead of a table")
    options = parser.parse_args()
    if options.threads is not None:
        set_num_threads(options.threads)
    torch.set_num_threads(num_threads())
    bandwidth = read_bandwidth(detect_hardware().probe_bytes).median
    peak = peak_ops("fma_f32").median
    head = {"isa": active_isa(), "threads": num_threads(), "read_bandwidth": bandwidth, "peak_gigaflops": peak}
    if options.json:
        print(json.dumps({**head, "results": [asdict(result) for result in results(options.seconds)]}, indent=1))
        return
    print(f"{head['isa']}, {head['threads']} threads, reading {bandwidth:.1f} GB/s, multiply-adds {peak:.0f} GFLOP/s")
    print(f"{'':<50}{'us':>12}{'torch us':>14}")
    for result in results(options.seconds):
        print(line(result, bandwidth, peak), flush=True)


if __name__ == "__main__":
    main()
