"""What it gains in decode that experts arrive one layer late, and what it does to the answers of the demo model.

    python benchmarks/gpu_deferral.py [--subject deepseek-v3:IQ1_S+Q4_K:4] [--numbers 0,2,4,6] [--batches 1,4]
        [--with cache,uploads] [--turns 5] [--seconds 300] [--vram 24GiB] [--quality]

One model, whose steps with each number of late experts take turns. Routers have no favourites; there is neither a cache
nor uploads unless `--with` names them. The last layer waits for all its experts, so a model that is cut to L layers
shows (L - 1) / L of what a long one gains per layer. `--quality`: the demo model's exact answers to some questions are
read token by token with each number of late experts; printed is the mean negative logarithm of their tokens'
probabilities, and how often the likeliest token is another one.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from moesaic.engine.auto import AutoTokenizer
from moesaic.engine.format_mix import FormatMix
from moesaic.engine.gpu.runner import ModelRunner
from moesaic.engine.gpu.slots import ExpertSlots
from moesaic.engine.gpu.timed_runs import GpuTimedRuns, StepTimes
from moesaic.engine.loader import load, prepare
from moesaic.engine.subjects import prepare_synthetic
from moesaic.kernels import num_threads, read_bandwidth
from moesaic.placement.units import parse_size
from zipf_routers import ZipfRouters

STEPS, PROMPT = 24, 4
ANSWER_TOKENS = 32
QUESTIONS = (
    "What is 12 + 30?",
    "What is 4512 - 388?",
    "Sort these numbers: 31, 7, 254, 90.",
    "Spell the word 'river' backwards.",
    "What can you do?",
    "12 加 30 等于多少？",
)
Row = dict[str, Any]


def runner_of(arguments: argparse.Namespace) -> ModelRunner:
    """The subject as hybrid, with what was asked for beside it."""
    name, weight_format, *layers = arguments.subject.split(":")
    count = int(layers[0]) if layers else None
    prepared = prepare_synthetic(name, FormatMix.parse(weight_format), count, "hybrid", vram=arguments.vram)
    model: Any = load(prepared, progress=False)
    runner: ModelRunner = model.runner
    kept = arguments.beside.split(",")
    if "cache" not in kept:
        runner.steps.slots, runner.steps.lending = ExpertSlots(), None
    if "uploads" not in kept:
        runner.steps.uploads = None
    ZipfRouters(runner).set_exponent(0.0)
    return runner


def times_of(steps: list[StepTimes]) -> tuple[float, float, float]:
    """Milliseconds of a step, of the CPU computing in it, and of it from a layer's request to its answer: medians."""
    return (
        statistics.median((step.ended - step.began) / 1e6 for step in steps),
        statistics.median(sum(done - seen for seen, _, done in step.layers) / 1e6 for step in steps),
        statistics.median(sum(answered - seen for seen, answered, _ in step.layers) / 1e6 for step in steps),
    )


def rows_of(runner: ModelRunner, numbers: list[int], batch: int, turns: int, ends: float) -> Iterator[Row]:
    """Numbers in turns."""
    bench = GpuTimedRuns(runner, "decode", PROMPT, STEPS + 1, batch)
    for number in numbers:
        runner.hand_off.defer(number)
        bench.timed_steps(3)  # kernels and graphs
    found: dict[int, list[tuple[float, float, float]]] = {number: [] for number in numbers}
    for _ in range(turns):
        for number in numbers:
            if time.monotonic() < ends:
                runner.hand_off.defer(number)
                found[number].append(times_of(bench.timed_steps(STEPS)[2:]))
    runner.hand_off.defer(0)
    if not found[numbers[0]]:
        return
    usual = statistics.median(step for step, _, _ in found[numbers[0]])
    for number, medians in found.items():
        if not medians:
            continue
        step, cpu, answers = (statistics.median(column) for column in zip(*medians, strict=True))
        yield {
            "batch": batch,
            "late": number,
            "ms": step,
            "turns_ms": [round(each[0], 3) for each in medians],
            "cpu_ms": cpu,
            "answers_ms": answers,
            "cpu_share": cpu / step,
            "tok_s": batch / step * 1e3,
            "gain": usual / step,
        }


def quality_rows() -> Iterator[Row]:
    """What each number does to the demo model."""
    model: Any = load(prepare("demo", plan="hybrid", vram=2 * 2**30), progress=False, lends=False)
    runner: ModelRunner = model.runner
    runner.steps.slots, runner.steps.uploads = ExpertSlots(), None  # all experts are the CPU's
    tokenizer = AutoTokenizer.from_pretrained("demo")
    prompts, answers = list[torch.Tensor](), list[torch.Tensor]()
    for question in QUESTIONS:
        chat = [{"role": "user", "content": question}]
        ids = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
        prompts.append(ids["input_ids"])
        exact = model.generate(prompts[-1], max_new_tokens=ANSWER_TOKENS, do_sample=False)
        answers.append(exact[0, prompts[-1].shape[1] :])
    for number in range(runner.decoder.top_k):
        runner.hand_off.defer(number)
        loss, others, count = 0.0, 0, 0
        for prompt, answer in zip(prompts, answers, strict=True):
            scores = scores_of(runner, prompt[0], answer)
            loss -= float(scores.gather(1, answer[:, None]).sum())
            others += int((scores.argmax(-1) != answer).sum())
            count += len(answer)
        yield {"late": number, "of": runner.decoder.top_k, "tokens": count, "loss": loss / count, "others": others}


def scores_of(runner: ModelRunner, prompt: torch.Tensor, answer: torch.Tensor) -> torch.Tensor:
    """Logarithms of probabilities `[tokens, vocab_size]` of an answer's tokens; the first is prefill's, and exact."""
    sequence = runner.new_sequence()
    logits = [runner.prefill([(sequence, prompt)]).cpu()]
    logits += [runner.decode([sequence], [token]).to("cpu", copy=True) for token in answer[:-1].tolist()]
    sequence.free()
    return torch.cat(logits).log_softmax(-1)


def text_of(row: Row) -> str:
    """A row to read."""
    return "  ".join(
        f"{key}={value:.4g}" if isinstance(value, float) else f"{key}={value}" for key, value in row.items()
    )


def main() -> None:
    """Measure and print."""
    started = time.monotonic()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--subject", default="deepseek-v3:IQ1_S+Q4_K:4", metavar="MODEL:FORMAT[:LAYERS]")
    parser.add_argument("--numbers", default="0,2,4,6", help="of late experts; the first is compared with")
    parser.add_argument("--batches", default="1,4")
    parser.add_argument("--with", dest="beside", default="", metavar="cache,uploads", help="both, one of them, or none")
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--vram", type=parse_size, default=24 * 2**30)
    parser.add_argument("--seconds", type=float, default=300.0, help="for all of it")
    parser.add_argument("--quality", action="store_true", help="what it does to the demo model, too")
    parser.add_argument("--out", type=Path, metavar="FILE", help="also write a line of JSON for every row")
    arguments = parser.parse_args()
    rows: list[Row] = []

    def say(row: Row) -> None:
        print(text_of(row), flush=True)
        rows.append({"subject": arguments.subject} | row)

    if arguments.quality:
        for row in quality_rows():
            say(row)
    runner = runner_of(arguments)
    about = {"device": torch.cuda.get_device_name(), "threads": num_threads()}
    say(about | {"dram_gb_s": read_bandwidth(1 << 30).median, "built_s": time.monotonic() - started})
    batches = [int(x) for x in arguments.batches.split(",")]
    for index, batch in enumerate(batches):
        now = time.monotonic()
        ends = now + (arguments.seconds - (now - started)) / (len(batches) - index)
        for row in rows_of(runner, [int(x) for x in arguments.numbers.split(",")], batch, arguments.turns, ends):
            say(row)
    if arguments.out is not None:
        arguments.out.write_text("".join(json.dumps(row) + "\n" for row in rows))


if __name__ == "__main__":
    main()
