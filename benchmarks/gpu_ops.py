"""Kernels on a GPU that are no products with packed weights: are they right on this card, and how long do they take.

    python benchmarks/gpu_ops.py [--only attention,expanded,small] [--sweep NAME]

Every kernel is compared with float64 first; a wrong one ends the run. Times are those of a CUDA graph of 20 launches,
divided by 20, the median of several replays. Attention in decode takes turns over 20 pools, as the layers of a model
do (pools of short contexts then lie in the second-level cache). --sweep times one kind of attention (gqa-decode,
mla-decode, gqa-prefill, mla-prefill) with its work cut up in many ways.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from dataclasses import fields, replace
from functools import partial

import torch

from moesaic.kernels import ops
from moesaic.kernels.block_parts import RouteOptions
from moesaic.kernels.triton.attention import paged_attention, paged_latent_attention
from moesaic.kernels.triton.attention_tiles import Tiles, choose_tiles
from moesaic.kernels.triton.elementwise import combine
from moesaic.kernels.triton.norm import add_rms_norm, rms_norm
from moesaic.kernels.triton.rotary import RotaryTable, latent_rotate_append, norm_rotate_append
from moesaic.kernels.triton.route import route, router_logits
from moesaic.kvcache.step_input import StepInput
from moesaic.modules.gpu.expanded_latents import attend_expanded
from moesaic.modules.mla import latent_heads_at_once

LAUNCHES, BLOCK_SIZE, DTYPE = 20, 64, torch.bfloat16
GQA_HEADS, GQA_KV_HEADS, GQA_DIM = 32, 4, 128
MLA_HEADS, LATENT, ROPE = 128, 512, 64


def microseconds(calls: list[Callable[[], object]], replays: int = 7) -> float:
    """Of one call, in a graph of LAUNCHES that take turns."""
    calls[0]()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for index in range(LAUNCHES):
            calls[index % len(calls)]()
    times = []
    for _ in range(replays):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end) * 1000 / LAUNCHES)
    return statistics.median(times)


def random(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, device="cuda")


def check(name: str, actual: torch.Tensor, expected: torch.Tensor, tolerance: float) -> None:
    """End the run if the largest error, in units of the largest value, is above the tolerance."""
    largest = expected.double().abs().max().clamp(min=1e-30)
    error = float((actual.double() - expected.double()).abs().max() / largest)
    if not error <= tolerance:
        raise SystemExit(f"{name}: error {error:.2e}, more than {tolerance:.0e}")
    print(f"  right: {name}, error {error:.1e}")


class AttentionCase:
    """Sequences of equal length with random block tables, in several pools."""

    def __init__(self, latent: bool, batch: int, context: int, new: int, dtype: torch.dtype = DTYPE) -> None:
        self.latent, self.batch, self.context, self.new = latent, batch, context, new
        blocks = -(-context // BLOCK_SIZE)
        width = LATENT + ROPE if latent else 2 * GQA_KV_HEADS * GQA_DIM
        self.key_bytes = batch * context * width * dtype.itemsize
        count = max(1, min(LAUNCHES, 2**29 // self.key_bytes)) if new == 1 else 1
        self.tables = (torch.randperm(batch * blocks, device="cuda").view(batch, blocks)).int()
        self.lens = torch.full((batch,), context, dtype=torch.int32, device="cuda")
        self.starts = torch.arange(0, batch * new + 1, new, dtype=torch.int32, device="cuda")
        heads = () if latent else (GQA_KV_HEADS,)
        shape = (batch * blocks, BLOCK_SIZE, *heads, LATENT + ROPE if latent else GQA_DIM)
        per_pool = 1 if latent else 2
        self.pools = [[torch.randn(shape, device="cuda").to(dtype) for _ in range(per_pool)] for _ in range(count)]
        num_heads = MLA_HEADS if latent else GQA_HEADS
        dims = (LATENT, ROPE) if latent else (GQA_DIM,)
        self.queries = [torch.randn(batch * new, num_heads, dim, device="cuda") for dim in dims]
        self.scale = (192 if latent else GQA_DIM) ** -0.5
        pairs = batch * new * (context - (new - 1) / 2)
        self.operations = 2 * pairs * num_heads * ((2 * LATENT + ROPE) if latent else 2 * GQA_DIM)

    def call(self, pool: int = 0, tiles: Tiles | None = None) -> torch.Tensor:
        kernel = paged_latent_attention if self.latent else paged_attention
        step = self.tables, self.lens, self.starts
        options = {"scale": self.scale, "max_query_len": self.new, "tiles": tiles}
        return kernel(*self.queries, *self.pools[pool], *step, **options)

    def expected(self) -> torch.Tensor:
        """The same in float64."""
        outputs = []
        for row in range(self.batch):
            own = slice(row * self.new, (row + 1) * self.new)
            keys = self.pools[0][0][self.tables[row].long()].flatten(0, 1)[: self.context].double()
            if self.latent:
                query, keys = torch.cat([q[own] for q in self.queries], -1), keys.unsqueeze(1)
                values = keys[..., :LATENT]
            else:
                query = self.queries[0][own]
                values = self.pools[0][1][self.tables[row].long()].flatten(0, 1)[: self.context].double()
            group = query.shape[1] // keys.shape[1]
            parts = []
            for head in range(query.shape[1]):
                scores = query[:, head].double() @ keys[:, head // group].T * self.scale
                hidden = torch.ones(self.new, self.context, dtype=torch.bool, device="cuda")
                hidden = hidden.triu(self.context - self.new + 1)
                parts.append(torch.softmax(scores.masked_fill(hidden, -torch.inf), -1) @ values[:, head // group])
            outputs.append(torch.stack(parts, 1))
        return torch.cat(outputs)

    def time(self, tiles: Tiles | None = None) -> float:
        return microseconds([lambda i=i: self.call(i, tiles) for i in range(len(self.pools))])

    def chosen(self) -> Tiles:
        """What the kernel chooses by itself."""
        rows = self.new * (MLA_HEADS if self.latent else GQA_HEADS // GQA_KV_HEADS)
        columns = self.batch * (1 if self.latent else GQA_KV_HEADS)
        dims = (LATENT, ROPE, LATENT) if self.latent else (GQA_DIM, 0, GQA_DIM)
        device = torch.device("cuda", torch.cuda.current_device())
        return choose_tiles(rows, columns, self.tables.shape[1] * BLOCK_SIZE, dims, DTYPE, device, self.latent)

    def line(self, time: float, tiles: Tiles) -> str:
        kind = "mla" if self.latent else "gqa"
        return (
            f"{kind} batch {self.batch} new {self.new:5} context {self.context:6}: {time:9.1f} us  "
            f"{self.key_bytes / time / 1e3:7.0f} GB/s  {self.operations / time / 1e6:6.1f} TFLOP/s  {tiles}"
        )


def attention() -> None:
    for latent in (False, True):
        name = "mla" if latent else "gqa"
        for dtype, tolerance in ((DTYPE, 2e-2), (torch.float16, 3e-3), (torch.float32, 1e-5)):
            for batch, context, new in ((2, 1000, 1), (2, 300, 77)):
                case = AttentionCase(latent, batch, context, new, dtype)
                check(f"{name} {dtype} {batch} x {new} of {context}", case.call(), case.expected(), tolerance)
        for batch in (1, 8):
            for context in (512, 4096, 32768):
                case = AttentionCase(latent, batch, context, 1)
                print(case.line(case.time(), case.chosen()), flush=True)
        case = AttentionCase(latent, 1, 2048, 2048)
        print(case.line(case.time(), case.chosen()), flush=True)


class LongLatents:
    """Latent attention of a long prompt, from queries before the absorption to values behind it, in both ways."""

    def __init__(self, new: int, context: int) -> None:
        nope, value = 128, 128
        self.case = AttentionCase(True, 1, context, new)
        self.k_b = random(MLA_HEADS, nope, LATENT).to(DTYPE) / LATENT**0.5
        self.v_b = random(MLA_HEADS, LATENT, value).to(DTYPE) / LATENT**0.5
        self.query, self.q_rope = random(new, MLA_HEADS, nope), self.case.queries[1]
        self.pool, self.options = self.case.pools[0][0], {"scale": self.case.scale, "max_query_len": new}
        self.group = latent_heads_at_once(new, MLA_HEADS, LATENT)

    def absorbed(self) -> torch.Tensor:
        case, parts = self.case, []
        for first in range(0, MLA_HEADS, self.group):
            some = slice(first, first + self.group)
            q_latent = torch.bmm(self.query[:, some].transpose(0, 1).to(DTYPE), self.k_b[some]).transpose(0, 1)
            at = case.tables, case.lens, case.starts
            latents = q_latent.float().contiguous(), self.q_rope[:, some]
            sums = paged_latent_attention(*latents, self.pool, *at, **self.options)
            parts.append(torch.bmm(sums.transpose(0, 1).to(DTYPE), self.v_b[some]).transpose(0, 1).float())
        return torch.cat(parts, 1)

    def expanded(self) -> torch.Tensor:
        case, zeros = self.case, torch.zeros(0)
        step = StepInput(zeros, zeros, case.tables, case.lens, case.starts, zeros)
        return attend_expanded(self.query, self.q_rope, self.k_b, self.v_b, self.pool, step, **self.options)


def expanded() -> None:
    for new, context in ((512, 512), (512, 8192), (2048, 2048), (8192, 8192), (8192, 32768)):
        long = LongLatents(new, context)
        check(f"mla new {new} context {context} expanded, beside absorbed", long.expanded(), long.absorbed(), 2e-2)
        print(f"    absorbed {timed(long.absorbed):8.2f} ms, expanded {timed(long.expanded):8.2f} ms", flush=True)


def timed(call: Callable[[], object], repeat: int = 5) -> float:
    """Milliseconds of a call, the median."""
    times = []
    for _ in range(repeat):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        call()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end))
    return statistics.median(times)


def sweep(name: str) -> None:
    latent, decode = name.startswith("mla"), name.endswith("decode")
    cases = [
        AttentionCase(latent, *shape) for shape in (((1, 4096, 1), (1, 32768, 1)) if decode else ((1, 2048, 2048),))
    ]
    shapes = {
        "gqa-decode": [(16, 32, 4), (16, 64, 4), (16, 128, 4), (16, 64, 2), (16, 128, 8)],
        "mla-decode": [(16, 32, 4), (16, 64, 4), (32, 32, 4), (32, 64, 8), (64, 32, 8), (64, 64, 8), (16, 64, 8)],
        "gqa-prefill": [(64, 64, 4), (128, 64, 8), (128, 64, 4), (128, 128, 8), (64, 128, 4)],
        "mla-prefill": [(16, 64, 4), (32, 64, 8), (64, 32, 8), (64, 64, 8), (128, 32, 8), (64, 16, 4)],
    }[name]
    for rows, keys, warps in shapes:
        for stages in (2, 3, 4):
            for case in cases:
                chosen = case.chosen()
                programs = case.new * (MLA_HEADS if latent else GQA_HEADS) // rows
                processors = torch.cuda.get_device_properties(0).multi_processor_count
                for per in (1, 2) if decode else (0,):
                    splits = max(1, min(64, per * processors // max(programs, 1 if latent else GQA_KV_HEADS)))
                    tiles = replace(chosen, rows=rows, keys=keys, warps=warps, stages=stages, splits=splits)
                    try:
                        print(case.line(case.time(tiles), tiles), flush=True)
                    except Exception as error:  # too much shared memory for the card
                        print(f"{tiles}: {str(error).splitlines()[0][:100]}", flush=True)
                        break


def show(name: str, call: Callable[[], object]) -> None:
    """Print the time of a small kernel."""
    print(f"{name}: {microseconds([call]):.2f} us", flush=True)


def rms(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """A norm in float64."""
    x = x.double()
    return x / (x.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt() * weight.double()


def norms(tokens: int) -> None:
    x, residual, weight = (random(tokens, 7168), random(tokens, 7168), random(7168))
    total = residual + x
    check("rms_norm", rms_norm(x, weight, 1e-6), rms(x, weight), 2e-6)
    check("add_rms_norm", add_rms_norm(x, residual, weight, 1e-6), rms(total, weight), 2e-6)
    check("residual", residual, total, 1e-7)
    show(f"rms_norm {tokens} x 7168", partial(rms_norm, x, weight, 1e-6))
    show(f"add_rms_norm {tokens} x 7168", partial(add_rms_norm, x, residual, weight, 1e-6))


def on_cpu(x: torch.Tensor, table: RotaryTable, positions: torch.Tensor, **options: object) -> torch.Tensor:
    """Heads `[tokens, heads, dim]` normalised and rotated by the kernels of the CPU."""
    heads = x.cpu().transpose(0, 1).unsqueeze(0).contiguous()
    cos, sin = (angles.cpu()[positions.cpu()].unsqueeze(0) for angles in (table.cos, table.sin))
    ops.norm_and_rotate_(heads, None, cos, sin, **options)
    return heads[0].transpose(0, 1).cuda()


def rotary(tokens: int) -> None:
    positions = torch.randperm(4096, device="cuda")[:tokens]
    slots = torch.randperm(64 * BLOCK_SIZE, device="cuda")[:tokens]
    angles = torch.rand(4096, GQA_DIM // 2, device="cuda") * 6
    table = RotaryTable(angles.cos(), angles.sin())
    q, k, v = (random(tokens, heads, GQA_DIM) for heads in (GQA_HEADS, GQA_KV_HEADS, GQA_KV_HEADS))
    keys, values = (torch.zeros(64, BLOCK_SIZE, GQA_KV_HEADS, GQA_DIM, device="cuda", dtype=DTYPE) for _ in range(2))
    for norm in ops.HEAD_NORMS:
        wide = norm == "all_heads"
        q_norm, k_norm = (random(GQA_DIM * (heads if wide else 1)) for heads in (GQA_HEADS, GQA_KV_HEADS))
        weights = {} if norm == "none" else {"q_norm": q_norm, "k_norm": k_norm, "eps": 1e-6}
        for layout in ops.ROPE_LAYOUTS:
            options = {"layout": layout, "norm": norm}
            out = norm_rotate_append(q, k, v, table, positions, keys, values, slots, **options, **weights)
            own = {"eps": 1e-6, "q_norm": q_norm.cpu()} if weights else {}
            check(f"rotated queries {norm} {layout}", out, on_cpu(q, table, positions, **options, **own), 2e-6)
            own = {"eps": 1e-6, "q_norm": k_norm.cpu()} if weights else {}
            expected = on_cpu(k, table, positions, **options, **own)
            check("appended keys", keys.flatten(0, 1)[slots], expected, 4e-3)
            check("appended values", values.flatten(0, 1)[slots], v.to(DTYPE), 0)
        call = partial(norm_rotate_append, q, k, v, table, positions, keys, values, slots, norm=norm, **weights)
        show(f"norm_rotate_append {norm} {tokens} x {GQA_HEADS} + {GQA_KV_HEADS} heads", call)


def latents(tokens: int) -> None:
    positions = torch.randperm(4096, device="cuda")[:tokens]
    slots = torch.randperm(64 * BLOCK_SIZE, device="cuda")[:tokens]
    angles = torch.rand(4096, ROPE // 2, device="cuda") * 6
    table, weight = RotaryTable(angles.cos(), angles.sin()), random(LATENT)
    compressed, q_rope = random(tokens, LATENT + ROPE), random(tokens, MLA_HEADS, 128 + ROPE)[..., 128:]
    cache = torch.zeros(64, BLOCK_SIZE, LATENT + ROPE, device="cuda", dtype=DTYPE)
    layout = "interleaved_to_half"
    call = partial(
        latent_rotate_append, compressed, q_rope, table, positions, cache, slots, weight, 1e-6, layout=layout
    )
    check("rotated queries", call(), on_cpu(q_rope, table, positions, layout=layout), 2e-6)
    written = cache.flatten(0, 1)[slots]
    check("appended latents", written[:, :LATENT], rms(compressed[:, :LATENT], weight), 4e-3)
    key = on_cpu(compressed[:, None, LATENT:], table, positions, layout=layout)[:, 0]
    check("appended rotary keys", written[:, LATENT:], key, 4e-3)
    show(f"latent_rotate_append {tokens} x {MLA_HEADS} heads", call)


def routing(tokens: int) -> None:
    x, weight, bias = random(tokens, 7168), random(256, 7168), random(256)
    call = partial(router_logits, x, weight, bias)
    check("router_logits", call(), x.double() @ weight.double().T + bias.double(), 5e-6)
    show(f"router_logits {tokens} x 256 x 7168", call)
    deepseek = RouteOptions(8, "sigmoid", bias / 10, "sum_of_two", 8, 4, True, 1e-20, 0.0, 2.5)
    cases = {"softmax 128": (128, RouteOptions(8, normalize=True)), "deepseek v3": (256, deepseek)}
    for name, (num_experts, options) in cases.items():
        logits, table = random(tokens, num_experts) * 2, torch.arange(num_experts, device="cuda").int() - 100
        routed = route(logits, options, slot_of_expert=table)
        on_host = {field.name: getattr(options, field.name) for field in fields(options)}
        on_host["bias"] = None if options.bias is None else options.bias.cpu()
        weights, experts = ops.route(logits.cpu(), **on_host)
        few = slice(0, 64)  # among many tokens are scores so close that roundings decide
        check(f"experts, {name}", routed.experts[few], experts[few].cuda(), 0)
        check(f"weights, {name}", routed.weights, weights.cuda(), 3e-6)
        check(f"slots, {name}", routed.slots, table[routed.experts], 0)
        show(f"route {name} {tokens} tokens", partial(route, logits, options, slot_of_expert=table))


def sums(tokens: int) -> None:
    hidden, shared, cached, from_cpu = (random(tokens, 7168) for _ in range(4))
    gate = random(tokens)
    expected = hidden + 0.5 * (torch.sigmoid(gate)[:, None] * shared + cached + from_cpu)
    check("combine", combine(hidden, shared, cached, from_cpu, 0.5, gate), expected, 1e-6)
    show(f"combine {tokens} x 7168", partial(combine, hidden, shared, cached, from_cpu, 1e-6, gate))


def small() -> None:
    """Everything but attention, of one token, of eight, and of a prompt."""
    for tokens in (1, 8, 2048):
        for part in (norms, rotary, latents, routing, sums):
            part(tokens)


PARTS = {"attention": attention, "expanded": expanded, "small": small}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default=",".join(PARTS), help="parts, with commas")
    parser.add_argument("--sweep", choices=["gqa-decode", "mla-decode", "gqa-prefill", "mla-prefill"])
    args = parser.parse_args()
    torch.manual_seed(0)
    print(torch.cuda.get_device_name())
    if args.sweep:
        sweep(args.sweep)
        return
    for part in args.only.split(","):
        PARTS[part]()


if __name__ == "__main__":
    main()
