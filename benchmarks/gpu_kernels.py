"""Products of packed weights on a GPU: are they right on this card, and how fast are they.

    python benchmarks/gpu_kernels.py [--formats Q4_K,Q8_0] [--quick | --all] [--what linear,experts,many]

Every kernel is compared with float64 first; a wrong one ends the run. Times are those of a CUDA graph, the median of
several replays, and calls take turns over copies of the weights that the second-level cache cannot hold together.
Shares are of what this card reaches in this run: reading memory (a sum over 2 GiB) and multiplying bfloat16 matrices
(8192 cubed). Kernels are compiled first, formats side by side in processes of their own.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from moesaic.kernels.experts import Activation
from moesaic.kernels.packed import PackedTensor
from moesaic.kernels.triton.device_tensor import DeviceTensor
from moesaic.kernels.triton.experts import ExpertLayout, MatrixLayout
from moesaic.kernels.triton.few_experts import experts_decode
from moesaic.kernels.triton.formats import supported_formats
from moesaic.kernels.triton.grouped_experts import ExpertPairs
from moesaic.kernels.triton.linear import linear
from moesaic.quant import get_format
from moesaic.weights.random_blocks import random_blocks

DEFAULT_FORMATS = "Q4_K,Q8_0,Q6_K,Q2_K,IQ1_S,BF16"
QUICK_SHAPES = ((7168, 2048), (7168, 16384))
SHAPES = (*QUICK_SHAPES, (24576, 1536), (4096, 2048), (256, 7168))
ALL_SHAPES = (*SHAPES, (129280, 7168))
EXPERTS = ((7168, 2048), (2048, 768))  # hidden, intermediate
MANY = (512, 2048)
NUM_SLOTS, TOP_K = 32, 8
COLD_BYTES = 256 << 20  # several times the second-level cache
PATTERN_ROWS = 64  # so many rows are random, then they repeat; their bytes are a multiple of 64
FEW_TOLERANCE, MANY_TOLERANCE = 1e-5, 1.5e-2


def seconds(calls: list[Callable[[], object]], launches: int = 20, replays: int = 5) -> float:
    """Of one call, in a graph of `launches` that take turns."""
    for call in calls[:2]:
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for index in range(launches):
            calls[index % len(calls)]()
    times = []
    for _ in range(replays):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end) / 1000 / launches)
    return statistics.median(times)


@dataclass(frozen=True)
class Card:
    """What this card reaches: bytes read and bfloat16 operations per second."""

    bandwidth: float
    operations: float

    @staticmethod
    def measured() -> Card:
        x = torch.ones(1 << 29, device="cuda")
        read = x.numel() * 4 / seconds([x.sum], 4)
        del x
        a = torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16)
        return Card(read, 2 * 8192**3 / seconds([lambda: a @ a], 4))


def check(name: str, actual: torch.Tensor, expected: torch.Tensor, tolerance: float) -> str:
    """The largest error in units of the largest value; ends the run if it is above the tolerance."""
    error = float((actual.double() - expected.double()).abs().max() / expected.double().abs().max())
    if not error <= tolerance:
        raise SystemExit(f"{name}: error {error:.2e}, more than {tolerance:.0e}")
    return f"{error:.0e}"


def pattern(name: str, cols: int) -> PackedTensor:
    """PATTERN_ROWS random rows."""
    fmt = get_format(name)
    packed = PackedTensor.empty(fmt, PATTERN_ROWS, cols)
    raw = random_blocks(fmt, PATTERN_ROWS * cols // fmt.block_size, 0.02, np.random.default_rng(cols))
    packed.pack_(0, raw.reshape(PATTERN_ROWS, -1))
    return packed


def repeated(packed: PackedTensor, rows: int) -> torch.Tensor:
    """The bytes of a matrix of so many rows."""
    size = -(-rows // 16) * 16 * packed.format.row_bytes(packed.cols)
    size = -(-size // 64) * 64
    data = packed.data.to("cuda")
    return data.repeat(-(-size // data.numel()))[:size].clone()


class Matrix:
    """Copies of a matrix of one format."""

    def __init__(self, name: str, rows: int, cols: int) -> None:
        self.packed = pattern(name, cols)
        data = repeated(self.packed, rows)
        self.nbytes = data.numel()
        count = max(2, min(20, COLD_BYTES // self.nbytes + 1))
        self.copies = [DeviceTensor(self.packed.format, 1, rows, cols, data.clone(), self.nbytes) for _ in range(count)]
        self.rows, self.cols = rows, cols

    def check(self, tokens: int) -> str:
        values = self.packed.dequantize()[0].to("cuda").double()
        x = torch.randn(tokens, self.cols, device="cuda")
        actual = linear(x, self.copies[-1])
        expected = (x.double() @ values.T).repeat(1, -(-self.rows // PATTERN_ROWS))[:, : self.rows]
        tolerance = FEW_TOLERANCE if tokens <= 8 else MANY_TOLERANCE
        return check(
            f"{self.packed.format.name} {self.rows} x {self.cols}, {tokens} tokens", actual, expected, tolerance
        )

    def time(self, tokens: int) -> float:
        x = torch.randn(tokens, self.cols, device="cuda")
        out = torch.empty(tokens, self.rows, device="cuda")
        return seconds([lambda w=w: linear(x, w, out=out) for w in self.copies], max(4, 20 if tokens <= 8 else 4))


class Experts:
    """An arena of NUM_SLOTS experts of one format."""

    def __init__(self, name: str, hidden: int, intermediate: int) -> None:
        shapes = ((intermediate, hidden), (intermediate, hidden), (hidden, intermediate))
        self.patterns = [pattern(name, cols) for _, cols in shapes]
        parts = [repeated(packed, rows) for packed, (rows, _) in zip(self.patterns, shapes, strict=True)]
        stride = sum(part.numel() for part in parts)
        matrices, offset = [], 0
        for packed, part, (rows, cols) in zip(self.patterns, parts, shapes, strict=True):
            matrices.append(MatrixLayout(packed.format, offset, stride, rows, cols, None))
            offset += part.numel()
        self.slot_bytes, self.hidden, self.intermediate = offset, hidden, intermediate
        self.num_slots = NUM_SLOTS * max(1, COLD_BYTES // (NUM_SLOTS * offset))
        self.arena = torch.cat(parts).repeat(self.num_slots)
        self.table = torch.arange(self.num_slots, dtype=torch.int32, device="cuda")
        self.layout = ExpertLayout(*matrices, Activation("silu"))

    def arguments(self, tokens: int, seed: int = 0) -> tuple[object, ...]:
        generator = torch.Generator("cuda").manual_seed(seed)
        x = torch.randn(tokens, self.hidden, device="cuda", generator=generator)
        order = torch.rand(tokens, self.num_slots, device="cuda", generator=generator).argsort(1)
        slots = order[:, :TOP_K].int().contiguous()
        weights = torch.rand(tokens, TOP_K, device="cuda", generator=generator)
        return x, slots, slots, weights, self.arena, self.layout

    def run(self, arguments: tuple[object, ...]) -> torch.Tensor:
        if len(arguments[0]) <= 8:
            return experts_decode(*arguments)
        x, slots, _, weights, arena, layout = arguments
        pairs = ExpertPairs(x, slots, weights, self.num_slots, layout)
        pairs.multiply(arena, layout, self.num_slots, pairs.blocks(self.table))
        return pairs.sum(self.table)

    def check(self, tokens: int) -> str:
        """All slots have the same weights: experts of a token differ in their weights only."""
        arguments = self.arguments(tokens)
        x = arguments[0].double()
        values = [packed.dequantize()[0].to("cuda").double() for packed in self.patterns]

        def times(y: torch.Tensor, w: torch.Tensor, rows: int) -> torch.Tensor:
            return (y @ w.T).repeat(1, -(-rows // PATTERN_ROWS))[:, :rows]

        inner = torch.nn.functional.silu(times(x, values[0], self.intermediate))
        inner = inner * times(x, values[1], self.intermediate)
        expected = times(inner, values[2], self.hidden) * arguments[3].double().sum(1, keepdim=True)
        tolerance = FEW_TOLERANCE if tokens <= 8 else MANY_TOLERANCE
        name = f"{self.layout.up.format.name} experts {self.hidden}/{self.intermediate}, {tokens} tokens"
        return check(name, self.run(arguments), expected, tolerance)

    def time(self, tokens: int) -> float:
        several = [self.arguments(tokens, seed) for seed in range(8 if tokens <= 8 else 1)]
        return seconds([lambda a=a: self.run(a) for a in several], 16 if tokens <= 8 else 2)


def row(card: Card, fmt: str, shape: str, tokens: int, error: str, time: float, nbytes: float, flops: float) -> None:
    text = f"{fmt:8} {shape:24} {tokens:5}  error {error}  {time * 1e6:9.1f} us"
    if tokens <= 8:
        text += f"  {nbytes / time / 1e9:7.0f} GB/s  {nbytes / time / card.bandwidth:6.1%}"
    else:
        text += f"  {flops / time / 1e12:7.1f} TF/s  {flops / time / card.operations:6.1%}"
    print(text, flush=True)


@dataclass(frozen=True)
class Cases:
    """What to measure."""

    shapes: tuple[tuple[int, int], ...]
    experts: tuple[tuple[int, int], ...]
    few: tuple[int, ...]
    many: tuple[int, ...]

    @staticmethod
    def of(arguments: argparse.Namespace) -> Cases:
        what = arguments.what.split(",")
        shapes = QUICK_SHAPES if arguments.quick else ALL_SHAPES if arguments.all else SHAPES
        experts = EXPERTS[:1] if arguments.quick else EXPERTS
        few = tuple(int(n) for n in arguments.tokens.split(","))
        many = () if "many" not in what else MANY[:1] if arguments.quick else MANY
        return Cases(shapes if "linear" in what else (), experts if "experts" in what else (), few, many)


def run_format(card: Card | None, name: str, cases: Cases) -> None:
    """Measure, or, without a card to compare with, run everything once so that it gets compiled."""
    block = get_format(name).block_size
    for rows, cols in cases.shapes:
        if cols % block:
            continue
        matrix = Matrix(name, rows, cols)
        for tokens in (*cases.few, *(cases.many if (rows, cols) in QUICK_SHAPES else ())):
            error = matrix.check(tokens)
            if card is not None:
                flops = 2.0 * tokens * rows * cols
                row(card, name, f"{rows} x {cols}", tokens, error, matrix.time(tokens), matrix.nbytes, flops)
        del matrix
    for hidden, intermediate in cases.experts:
        if hidden % block or intermediate % block:
            continue
        experts = Experts(name, hidden, intermediate)
        for tokens in (*cases.few[:1], *cases.many):
            error = experts.check(tokens)
            if card is not None:
                flops = 6.0 * tokens * TOP_K * hidden * intermediate
                nbytes = tokens * TOP_K * experts.slot_bytes
                shape = f"experts {hidden}/{intermediate}"
                row(card, name, shape, tokens, error, experts.time(tokens), nbytes, flops)
        del experts
    torch.cuda.empty_cache()


def compile_all(names: list[str], options: list[str]) -> None:
    """Run everything once, a format a process; what gets compiled is then in Triton's cache on disk."""
    for first in range(0, len(names), 8):
        commands = [[sys.executable, __file__, *options, "--compile", "--formats", n] for n in names[first : first + 8]]
        failed = [process.wait() for process in [subprocess.Popen(command) for command in commands]]
        if any(failed):
            raise SystemExit("A kernel is wrong or could not be compiled: see above.")


def main() -> None:
    """Parse, compile, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--formats", default=DEFAULT_FORMATS, help="names, or 'all'")
    parser.add_argument("--what", default="linear,experts,many", help="some of linear, experts, many (tokens)")
    parser.add_argument("--tokens", default="1,4", help="few tokens to measure, up to 8")
    parser.add_argument("--quick", action="store_true", help="two shapes, experts of one model, fewer tokens")
    parser.add_argument("--all", action="store_true", help="the largest shape too")
    parser.add_argument("--compile", action="store_true", help="only run everything once")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("There is no GPU.")
    names = list(supported_formats()) if arguments.formats == "all" else arguments.formats.split(",")
    cases = Cases.of(arguments)
    if arguments.compile:
        for name in names:
            run_format(None, name, cases)
        return
    started = time.perf_counter()
    options = ["--what", arguments.what, "--tokens", arguments.tokens]
    compile_all(names, options + ["--quick"] * arguments.quick + ["--all"] * arguments.all)
    print(f"{torch.cuda.get_device_name()}, compiled in {time.perf_counter() - started:.0f} s", flush=True)
    card = Card.measured()
    print(f"reads {card.bandwidth / 1e9:.0f} GB/s, multiplies bfloat16 at {card.operations / 1e12:.0f} TFLOP/s")
    for name in names:
        run_format(card, name, cases)
    print(f"{time.perf_counter() - started:.0f} s")


if __name__ == "__main__":
    main()
