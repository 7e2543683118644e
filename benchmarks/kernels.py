"""How near the expert kernels come to what this machine can reach, per weight format.

    python benchmarks/kernels.py [--model qwen3-30b-a3b] [--formats Q4_K,Q6_K] [--isa avx2] [--threads 2] [--json]

Decode: one token through the routed experts of one layer, in GB/s of weights read and as a share of the measured read
bandwidth. Every step takes other experts, of as many layers in turn as make 8 times the last-level caches (bounded by a
quarter of the free memory), so that weights come from DRAM. Prefill: many tokens, in 10^9 multiply-adds per second and
as a share of the peak of the instruction used, which the last column names: tiles of bfloat16 where the instruction set
has them for the format (BF16 weights are multiplied twice, so half of that peak is their limit), else int8 dot products
for quantised weights and float32 fma for floats. AVX2 without VNNI sums small weights in 16 bits, which may exceed that
peak. Yardsticks are measured between the repetitions, so that other load on
the machine falls on both. Figures are medians, of the yardsticks too. With --threads 1 they are the best ones, and
products are timed in processor time of the thread, which other load disturbs least. Weights are random bytes: values do
not matter for speed.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass

import torch

from moesaic import kernels
from moesaic.kernels import (
    Activation,
    PackedExperts,
    PackedTensor,
    Rates,
    linear,
    moe_forward,
    peak_ops,
    read_bandwidth,
    tiles_from,
)
from moesaic.placement import Hardware, detect_hardware
from moesaic.quant import FORMATS, WeightFormat, get_format


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
    yardstick: str
    layers: int


def times(step: Callable[[int], object], seconds: float) -> list[float]:
    """Times of a step, repeated for about so long; the number of the repetition is its argument."""
    clock = time.thread_time if kernels.num_threads() == 1 else time.perf_counter
    found: list[float] = []
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(found) < 3:
        start = clock()
        step(len(found))
        found.append(clock() - start)
    return found


def usual(found: list[float]) -> float:
    """The median; the shortest of a single thread's processor times."""
    return min(found) if kernels.num_threads() == 1 else statistics.median(found)


def usual_rate(found: list[Rates]) -> float:
    """The same of yardsticks."""
    if kernels.num_threads() == 1:
        return max(rates.best for rates in found)
    return statistics.median(rates.median for rates in found)


def random_stack(name: str, rows: int, cols: int, count: int) -> PackedTensor:
    stack = PackedTensor.empty(get_format(name), rows, cols, count)
    pattern = torch.randint(0, 256, (1 << 20,), dtype=torch.uint8)
    for start in range(0, stack.nbytes, pattern.numel()):
        part = stack.data[start : start + pattern.numel()]
        part.copy_(pattern[: part.numel()])
    return stack


def random_experts(name: str, dims: Dims) -> PackedExperts:
    gate, up = (random_stack(name, dims.intermediate, dims.hidden, dims.num_experts) for _ in range(2))
    down = random_stack(name, dims.hidden, dims.intermediate, dims.num_experts)
    return PackedExperts(gate, up, down, activation=Activation("silu"))


def every_expert(layers: list[PackedExperts], dims: Dims) -> list[tuple[torch.Tensor, PackedExperts]]:
    """Choices for one token that go through the experts of all layers before one comes again."""
    return [
        (part.view(1, -1).contiguous(), experts)
        for experts in layers
        for part in torch.randperm(dims.num_experts).split(dims.top_k)
        if len(part) == dims.top_k
    ]


def yardstick(fmt: WeightFormat) -> str:
    """The kind of peak that many tokens are compared with."""
    if tiles_from(fmt.ggml_type) is not None:
        return "tile_bf16"
    return "dot_i8" if fmt.rounds_activations else "fma_f32"


def measure(name: str, dims: Dims, num_tokens: int, seconds: float, hardware: Hardware) -> Result:
    fmt = get_format(name)
    macs = dims.hidden * dims.intermediate * 3 * dims.top_k
    token_bytes = macs * fmt.block_bytes / fmt.block_size
    num_layers = math.ceil(hardware.cold_bytes / (token_bytes / dims.top_k * dims.num_experts))
    layers = [random_experts(name, dims) for _ in range(num_layers)]
    choices = every_expert(layers, dims)
    same = [(choice.expand(4, -1).contiguous(), experts) for choice, experts in choices]
    index = torch.stack([torch.randperm(dims.num_experts)[: dims.top_k] for _ in range(num_tokens)])
    weights = torch.full((num_tokens, dims.top_k), 1 / dims.top_k)
    x, up = torch.randn(num_tokens, dims.hidden), layers[0].up
    assert isinstance(up, PackedTensor)

    kind = yardstick(fmt)
    bandwidths: list[Rates] = []
    peaks: list[Rates] = []
    found: dict[str, list[float]] = {"decode": [], "batch4": [], "prefill": [], "dense": []}
    steps: dict[str, Callable[[int], object]] = {
        "decode": lambda i: moe_forward(x[:1], choices[i % len(choices)][0], weights[:1], choices[i % len(choices)][1]),
        "batch4": lambda i: moe_forward(x[:4], same[i % len(same)][0], weights[:4], same[i % len(same)][1]),
        "prefill": lambda i: moe_forward(x, index, weights, layers[i % num_layers]),
        "dense": lambda i: linear(x, up, index=i % dims.num_experts),
    }
    for _ in range(3):
        bandwidths.append(read_bandwidth(hardware.probe_bytes, seconds / 6))
        peaks.append(peak_ops(kind, seconds / 6))
        for step, run in steps.items():
            found[step] += times(run, seconds / 3)
    decode, batch4, prefill, dense = (usual(part) for part in found.values())
    peak = usual_rate(peaks) / 2
    decode_rate = token_bytes / 1e9 / decode
    prefill_rate = macs * num_tokens / 1e9 / prefill
    dense_rate = dims.hidden * dims.intermediate * num_tokens / 1e9 / dense
    return Result(
        name,
        decode_rate,
        decode_rate / usual_rate(bandwidths),
        batch4 / decode,
        prefill_rate,
        prefill_rate / peak,
        dense_rate,
        dense_rate / peak,
        kind,
        num_layers,
    )


def line(r: Result) -> str:
    """A row of the table."""
    return (
        f"{r.format:8} {r.decode_gb_s:11.1f} {r.decode_share:6.0%} {r.batch4_cost:8.2f}x {r.prefill_gmac_s:15.0f} "
        f"{r.prefill_share:6.0%} {r.dense_gmac_s:13.0f} {r.dense_share:6.0%}  {r.yardstick}"
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
        print("format   decode GB/s  share  4 tokens  prefill GMAC/s  share  dense GMAC/s  share  yardstick")
    results, hardware = [], detect_hardware()
    for name in args.formats.split(","):
        result = measure(name, MODELS[args.model], args.tokens, args.seconds, hardware)
        results.append(asdict(result))
        if not args.json:
            print(line(result), flush=True)
    if args.json:
        machine = {"isa": kernels.active_isa(), "threads": kernels.num_threads()}
        print(json.dumps({"model": args.model, **machine, "results": results}))


if __name__ == "__main__":
    main()
