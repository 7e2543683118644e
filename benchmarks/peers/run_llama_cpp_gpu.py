"""Runs one GGUF in llama.cpp with a GPU, a JSON line for each measurement; needs only `llama-cpp-python` with CUDA.

    python run_llama_cpp_gpu.py FILE --override exps=CPU --prompts 512,2048 --tokens 32 --threads 15

`--override` is llama-bench's `-ot`. Random token ids go straight into `llama_decode`: no tokenizer, no sampler. A
library that was built elsewhere is taken from the folder that the binding's own LLAMA_CPP_LIB_PATH names.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import random
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import llama_cpp

DECODE_PROMPT = 16


class Override(ctypes.Structure):
    """`llama_model_tensor_buft_override` of llama.h, which the binding leaves out."""

    _fields_ = [("pattern", ctypes.c_char_p), ("buft", ctypes.c_void_p)]


def overrides(given: list[str]) -> ctypes.Array[Override]:
    """An array that ends with a null pattern; PATTERN=CPU is the only kind known here."""
    folder = Path(os.environ.get("LLAMA_CPP_LIB_PATH", Path(llama_cpp.__file__).parent / "lib"))
    base = ctypes.CDLL(str(next(folder.glob("libggml-base.so*"))))
    base.ggml_backend_cpu_buffer_type.restype = ctypes.c_void_p
    array = (Override * (len(given) + 1))()
    for entry, text in zip(array, given, strict=False):
        pattern, _, where = text.rpartition("=")
        if where != "CPU":
            sys.exit(f"--override {text}: only PATTERN=CPU")
        entry.pattern, entry.buft = pattern.encode(), base.ggml_backend_cpu_buffer_type()
    return array


class Context:
    """A context of a loaded model, and what is timed in it."""

    def __init__(self, model: object, num_tokens: int, ubatch: int, threads: int) -> None:
        settings = llama_cpp.llama_context_default_params()
        settings.n_ctx, settings.n_batch, settings.n_ubatch = num_tokens + 64, num_tokens, ubatch
        settings.n_threads = settings.n_threads_batch = threads
        self._context = llama_cpp.llama_init_from_model(model, settings)
        if not self._context:
            sys.exit("llama.cpp cannot make a context")
        self._random = random.Random(0)

    def decode(self, num_tokens: int) -> float:
        """Tokens per second, one after the other behind a short prompt."""
        self._clear()
        self._run(DECODE_PROMPT)
        started = time.perf_counter()
        for _ in range(num_tokens):
            self._run(1)
        return num_tokens / (time.perf_counter() - started)

    def prefill(self, num_tokens: int) -> float:
        """Tokens per second of a prompt in an empty context."""
        self._clear()
        started = time.perf_counter()
        self._run(num_tokens)
        return num_tokens / (time.perf_counter() - started)

    def close(self) -> None:
        """Free it."""
        llama_cpp.llama_free(self._context)

    def _clear(self) -> None:
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(self._context), True)

    def _run(self, count: int) -> None:
        # The batch only points to the ids, so they need a name until it is through.
        ids = (llama_cpp.llama_token * count)(*(self._random.randrange(32000) for _ in range(count)))
        code = llama_cpp.llama_decode(self._context, llama_cpp.llama_batch_get_one(ids, count))
        if code:
            sys.exit(f"llama_decode returned {code}")
        llama_cpp.llama_synchronize(self._context)


def measurements(model: object, args: argparse.Namespace) -> Iterator[dict[str, object]]:
    """Decode once, prefill by both sizes of micro-batches: the caller takes the better one."""
    prompts = [int(part) for part in args.prompts.split(",")]
    most = max([*prompts, DECODE_PROMPT + args.tokens])
    for ubatch in (int(part) for part in args.ubatch.split(",")):
        context = Context(model, most, ubatch, args.threads)
        whats: list[tuple[str, int]] = [("decode", args.tokens)] if ubatch == int(args.ubatch.split(",")[0]) else []
        for what, count in [*whats, *(("prefill", count) for count in prompts)]:
            measure = context.decode if what == "decode" else context.prefill
            measure(count)  # warms up
            runs = [measure(count) for _ in range(args.repeat)]
            yield {"what": what, "tokens": count, "runs": runs, "ubatch": ubatch, "threads": args.threads}
        context.close()


def main() -> None:
    """Load once, measure everything, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file")
    parser.add_argument("--override", action="append", default=[], metavar="PATTERN=CPU")
    parser.add_argument("--prompts", default="512,2048,8192")
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--ubatch", default="2048,512")
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--repeat", type=int, default=2)
    args = parser.parse_args()
    llama_cpp.llama_backend_init()
    params = llama_cpp.llama_model_default_params()
    params.n_gpu_layers = 99
    array = overrides(args.override)
    if args.override:
        params.tensor_buft_overrides = ctypes.cast(array, ctypes.c_void_p)
    model = llama_cpp.llama_model_load_from_file(args.file.encode(), params)
    if not model:
        sys.exit(f"llama.cpp cannot load {args.file}")
    for row in measurements(model, args):
        print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
