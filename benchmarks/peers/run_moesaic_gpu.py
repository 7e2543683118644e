"""Runs one GGUF in Moesaic with a GPU, a JSON line for each measurement; the counterpart of run_llama_cpp_gpu.py.

First as `hybrid` without a cache of experts and without uploads, then as `moesaic run` does it. Where the file has only
some layers of a model, the cache gets the share of the experts that it could hold of the whole model, and no more.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator

from moesaic.engine.format_mix import FormatMix
from moesaic.engine.gpu.promotion import PromotionPolicy
from moesaic.engine.gpu.runner import ModelRunner
from moesaic.engine.gpu.slots import ExpertSlots
from moesaic.engine.gpu.timed_runs import GpuTimedRuns
from moesaic.engine.gpu.warm_up import warm_up
from moesaic.engine.loader import load, prepare, this_computer
from moesaic.engine.subjects import prepare_synthetic
from moesaic.errors import GenerationError
from moesaic.placement.units import parse_size

DECODE_PROMPT = 16


def whole_share(preset: str, weight_format: str, vram: int) -> float:
    """The share of the experts that the cache could hold of all layers of a preset."""
    prepared = prepare_synthetic(preset, FormatMix.parse(weight_format), None, "hybrid", vram=vram)
    budget = prepared.plan.vram_budget(this_computer(True))
    return budget.cache_experts / budget.num_experts


class Ways:
    """One loaded model, with and without its cache of experts."""

    def __init__(self, runner: ModelRunner, share: float) -> None:
        self._runner, self._share = runner, share
        self._slots, self._uploads = runner.slots, runner.uploads

    def take(self, with_cache: bool) -> str:
        """Decode and prefill that way from now on; what it is called."""
        steps = self._runner.steps
        steps.slots = self._slots if with_cache else ExpertSlots()
        steps.uploads = self._uploads if with_cache else None
        cache = self._slots.cache
        if not with_cache or cache is None:
            return "hybrid, no cache"
        num_layers, num_experts = cache.policy.slot_of.shape
        count = min(max(1, round(self._share * num_layers * num_experts)), cache.policy.num_slots)
        if count < cache.policy.num_slots:
            steps.lending = None  # it would give the cache more than its share
            cache.restart(PromotionPolicy(num_layers, num_experts, count))
        done = warm_up(GpuTimedRuns(self._runner, "decode", DECODE_PROMPT, 65))
        if done.unsettled:
            print(f"not settled after {done.steps} steps: {', '.join(done.unsettled)}", file=sys.stderr)
        return f"hybrid, cache of {count / (num_layers * num_experts):.0%}"


def measurements(runner: ModelRunner, way: str, args: argparse.Namespace) -> Iterator[dict[str, object]]:
    """Decode, and prefill of each length."""
    prompts = [int(part) for part in args.prompts.split(",")]
    for what, count in [("decode", args.tokens), *(("prefill", count) for count in prompts)]:
        if what == "decode":
            bench = GpuTimedRuns(runner, "decode", DECODE_PROMPT, count + 1)
        else:
            bench = GpuTimedRuns(runner, "prefill", count, 1)
        row: dict[str, object] = {"way": way, "what": what, "tokens": count}
        try:
            bench.run()  # warms up
            yield row | {"runs": [bench.run() for _ in range(args.repeat)]}
        except GenerationError as error:  # too little VRAM for a long prompt, perhaps; the next may do
            yield row | {"problem": f"{way}, {what} of {count}: {error}"}


def main() -> None:
    """Load once, measure everything, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file")
    parser.add_argument("--preset", required=True)
    parser.add_argument("--format", required=True)
    parser.add_argument("--vram", type=parse_size, default=24 * 2**30)
    parser.add_argument("--prompts", default="512,2048,8192")
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--repeat", type=int, default=3)
    args = parser.parse_args()
    share = whole_share(args.preset, args.format, args.vram)
    longest = max(int(part) for part in args.prompts.split(","))
    model = load(prepare(args.file, plan="hybrid", vram=args.vram, context=longest + 64), progress=False)
    ways = Ways(model.runner, share)
    for with_cache in (False, True):
        way = ways.take(with_cache)
        for row in measurements(model.runner, way, args):
            print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
