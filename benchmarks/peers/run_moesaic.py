"""Runs one GGUF in Moesaic and prints tokens per second as JSON; the counterpart of run_llama_cpp.py.

Tokens are computed as `moesaic run` computes them; like there, token ids are random and no sampler runs.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import time

import torch

from moesaic import AutoModelForCausalLM
from moesaic.engine.serving.token_stream import token_stream_of
from moesaic.engine.torch_threads import one_torch_thread


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
    stream = token_stream_of(model)
    if stream is None:
        raise SystemExit(f"{args.file}: this model does not run on a paged cache, which is what is measured here.")
    prefill, decode = [], []
    for run in range(args.repeat + 1):  # the first warms up
        ids = torch.randint(args.vocab, (args.prompt + args.tokens,)).tolist()
        stream.forget()
        with one_torch_thread():
            started = time.perf_counter()
            stream.begin(ids[: args.prompt])
            stream.fill(ids[: args.prompt])
            filled = time.perf_counter()
            for token in ids[args.prompt :]:
                stream.step(token)
            ended = time.perf_counter()
        if run:
            prefill.append(args.prompt / (filled - started))
            decode.append(args.tokens / (ended - filled))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    rates = {"prefill": statistics.median(prefill), "decode": statistics.median(decode)}
    print(json.dumps({**rates, "runs": decode, "peak_bytes": peak}))


if __name__ == "__main__":
    main()
