"""Runs one GGUF in llama.cpp and prints tokens per second as JSON; needs only `llama-cpp-python`.

    python run_llama_cpp.py FILE --prompt 512 --tokens 32 --threads 2 --repeat 3

Random token ids go straight into `llama_decode`: no tokenizer, no sampler, so that only the model is timed.
"""

from __future__ import annotations

import argparse
import json
import random
import resource
import statistics
import sys
import time

import llama_cpp


def decode_batch(context: object, tokens: list[int]) -> None:
    """Run the tokens as one batch after what the context holds already."""
    array = (llama_cpp.llama_token * len(tokens))(*tokens)
    batch = llama_cpp.llama_batch_get_one(array, len(tokens))
    code = llama_cpp.llama_decode(context, batch)
    if code != 0:
        sys.exit(f"llama_decode returned {code}")
    llama_cpp.llama_synchronize(context)


def clear(context: object) -> None:
    """Forget all tokens."""
    llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(context), True)


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
    llama_cpp.llama_backend_init()
    model_params = llama_cpp.llama_model_default_params()
    model_params.n_gpu_layers = 0
    model = llama_cpp.llama_model_load_from_file(args.file.encode(), model_params)
    if not model:
        sys.exit(f"llama.cpp cannot load {args.file}")
    params = llama_cpp.llama_context_default_params()
    params.n_ctx = args.prompt + args.tokens + 64
    params.n_batch = params.n_ubatch = max(args.prompt, 32)
    params.n_threads = params.n_threads_batch = args.threads
    context = llama_cpp.llama_init_from_model(model, params)
    if not context:
        sys.exit("llama.cpp cannot make a context")
    chooser = random.Random(0)
    prefill, decode = [], []
    for run in range(args.repeat + 1):  # the first warms up
        clear(context)
        started = time.perf_counter()
        decode_batch(context, [chooser.randrange(args.vocab) for _ in range(args.prompt)])
        filled = time.perf_counter()
        for _ in range(args.tokens):
            decode_batch(context, [chooser.randrange(args.vocab)])
        ended = time.perf_counter()
        if run:
            prefill.append(args.prompt / (filled - started))
            decode.append(args.tokens / (ended - filled))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    rates = {"prefill": statistics.median(prefill), "decode": statistics.median(decode)}
    print(json.dumps({**rates, "runs": decode, "peak_bytes": peak}))


if __name__ == "__main__":
    main()
