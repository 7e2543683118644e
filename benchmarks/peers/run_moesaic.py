"""Runs one GGUF in Moesaic and prints tokens per second as JSON; the counterpart of run_llama_cpp.py.

The model is called as `generate()` calls it, with the project's own cache; like there, token ids are random and no
sampler runs.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import time

import torch

from moesaic import AutoModelForCausalLM
from moesaic.kvcache import CACHE_ARGUMENT, GrowingCache


def main() -> None:
    """Load, warm up, measure, print."""
    parser = argparse.ArgumentParser()
    parser.add_argument("file")
    parser.add_argument("--prompt", type=int, default=512)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--vocab", type=int, default=32000)
    args = parser.parse_args()
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(args.file, plan="cpu", threads=args.threads, progress=False)
    prefill, decode = [], []
    for run in range(args.repeat + 1):  # the first warms up
        cache = GrowingCache(model.config)
        ids = torch.randint(args.vocab, (1, args.prompt + args.tokens))
        with torch.inference_mode():
            started = time.perf_counter()
            model(ids[:, : args.prompt], use_cache=True, logits_to_keep=1, **{CACHE_ARGUMENT: cache})
            filled = time.perf_counter()
            for step in range(args.prompt, args.prompt + args.tokens):
                model(ids[:, step : step + 1], use_cache=True, logits_to_keep=1, **{CACHE_ARGUMENT: cache})
            ended = time.perf_counter()
        if run:
            prefill.append(args.prompt / (filled - started))
            decode.append(args.tokens / (ended - filled))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    rates = {"prefill": statistics.median(prefill), "decode": statistics.median(decode)}
    print(json.dumps({**rates, "runs": decode, "peak_bytes": peak}))


if __name__ == "__main__":
    main()
