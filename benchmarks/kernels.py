"""How near the expert kernels come to what this machine can reach, per weight format.

    python benchmarks/kernels.py [--model qwen3-30b-a3b] [--formats Q4_K,Q6_K] [--isa avx2] [--threads 2] [--json]

Decode: one token through the routed experts of one layer, another choice of experts each time, in GB/s of weights read
and as a share of the measured read bandwidth. Prefill: many tokens, in 10^9 multiply-adds per second and as a share of
the peak of the instruction used (int8 dot products for quantised weights, float32 fma for floats). Yardsticks are
measured between the repetitions, so that other load on the machine falls on both. With --threads 1, products are timed
in processor time of the thread, which other load disturbs least. Weights are random bytes: values do not matter for
speed.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass

import torch

from moesaic import kernels
from moesaic.kernels import Activation, PackedExperts, PackedTensor, linear, moe_forward
from moesaic.kernels.probe import peak_ops, read_bandwidth
from moesaic.quant import FORMATS, get_format


@dataclass(frozen=True)
class Dims:
    """Routed experts of one layer; fewer experts than the model has where all would not fit in memory."""

    hidden: int
    intermediate: int
    num_experts: int
    top_k: int


MODELS = {
    "qwen3-30b-a3b": Dims(2048, 768, 128, 8),
    "deepseek-v3": Dims(7168, 2048, 32, 8),
    "qwen3-next": Dims(2048, 512, 256, 10),
}


@dataclass(frozen=True)
class Result:
    """Figures of one format."""

    format: str
    decode_gb_s: float
    decode_share: float
    batch4_cost: float
    prefill_gmac_s: float
    prefill_share: float
    dense_gmac_s: float
    dense_share: float


def best_time(step: Callable[[int], object], seconds: float) -> float:
    """Shortest time of a step, repeated for about so long; the number of the repetition is its argument."""
    clock = time.thread_time if kernels.num_threads() == 1 else time.perf_counter
    best, repetition, end = float("inf"), 0, time.perf_counter() + seconds
    while time.perf_counter() < end or repetition < 3:
        start = clock()
        step(repetition)
        best = min(best, clock() - start)
        repetition += 1
    return best


def random_stack(name: str, rows: int, cols: int, count: int) -> PackedTensor:
    stack = PackedTensor.empty(get_format(name), rows, cols, count)
    pattern = torch.randint(0, 256, (1 << 20,), dtype=torch.uint8)
    for start in range(0, stack.nbytes, pattern.numel()):
        part = stack.data[start : start + pattern.numel()]
        part.copy_(pattern[: part.numel()])
    return stack


def measure(name: str, dims: Dims, num_tokens: int, seconds: float) -> Result:
    gate, up = (random_stack(name, dims.intermediate, dims.hidden, dims.num_experts) for _ in range(2))
    down = random_stack(name, dims.hidden, dims.intermediate, dims.num_experts)
    experts = PackedExperts(gate, up, down, activation=Activation("silu"))
    choices = [torch.randperm(dims.num_experts)[: dims.top_k].view(1, -1) for _ in range(64)]
    weights = torch.full((num_tokens, dims.top_k), 1 / dims.top_k)
    x = torch.randn(num_tokens, dims.hidden)

    bandwidth, peak = 0.0, 0.0
    decode = batch4 = prefill = dense = float("inf")
    index = torch.stack([torch.randperm(dims.num_experts)[: dims.top_k] for _ in range(num_tokens)])
    kind = "dot_i8" if get_format(name).rounds_activations else "fma_f32"
    same = [choice.expand(4, -1).contiguous() for choice in choices]
    part = seconds / 3
    for _ in range(3):
        bandwidth = max(bandwidth, read_bandwidth(1 << 29, part / 2).best)
        peak = max(peak, peak_ops(kind, part / 2).best / 2)
        decode = min(decode, best_time(lambda i: moe_forward(x[:1], choices[i % 64], weights[:1], experts), part))
        batch4 = min(batch4, best_time(lambda i: moe_forward(x[:4], same[i % 64], weights[:4], experts), part))
        prefill = min(prefill, best_time(lambda _: moe_forward(x, index, weights, experts), part))
        dense = min(dense, best_time(lambda i: linear(x, up, index=i % dims.num_experts), part))
    macs = dims.hidden * dims.intermediate * 3 * dims.top_k
    decode_rate = macs / 1e9 / decode * get_format(name).block_bytes / get_format(name).block_size
    prefill_rate = macs * num_tokens / 1e9 / prefill
    dense_rate = dims.hidden * dims.intermediate * num_tokens / 1e9 / dense
    return Result(
        name,
        decode_rate,
        decode_rate / bandwidth,
        batch4 / decode,
        prefill_rate,
        prefill_rate / peak,
        dense_rate,
        dense_rate / peak,
    )


def line(r: Result) -> str:
    """A row of the table."""
    return (
        f"{r.format:8} {r.decode_gb_s:11.1f} {r.decode_share:6.0%} {r.batch4_cost:8.2f}x {r.prefill_gmac_s:15.0f} "
        f"{r.prefill_share:6.0%} {r.dense_gmac_s:13.0f} {r.dense_share:6.0%}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=MODELS, default="qwen3-30b-a3b")
    parser.add_argument("--formats", default=",".join(FORMATS))
    parser.add_argument("--tokens", type=int, default=512, help="of the prefill")
    parser.add_argument("--isa", choices=kernels.isas())
    parser.add_argument("--threads", type=int)
    parser.add_argument("--seconds", type=float, default=1.5, help="for each figure")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    if args.isa:
        kernels.set_isa(args.isa)
    if args.threads:
        kernels.set_num_threads(args.threads)
    if not args.json:
        print(f"{args.model}, {kernels.active_isa()}, {kernels.num_threads()} threads, prefill of {args.tokens} tokens")
        print("format   decode GB/s  share  4 tokens  prefill GMAC/s  share  dense GMAC/s  share")
    results = []
    for name in args.formats.split(","):
        result = measure(name, MODELS[args.model], args.tokens, args.seconds)
        results.append(asdict(result))
        if not args.json:
            print(line(result), flush=True)
    if args.json:
        machine = {"isa": kernels.active_isa(), "threads": kernels.num_threads()}
        print(json.dumps({"model": args.model, **machine, "results": results}))


if __name__ == "__main__":
    main()
