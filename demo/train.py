"""Train the demo from scratch, on one GPU in minutes.

    python -m demo.train --out DIR                       # the shipped model
    python -m demo.train --out DIR --steps 20 --cpu      # smoke test

Each step takes a batch of short conversations and, in turn, one of medium or long rows. The rate follows
warmup-stable-decay. The router's correction biases follow the load of the experts (auxiliary-loss-free balancing, Wang
et al. 2024, arXiv:2408.15664). From a third of the run on, half of the batches see weights rounded to 4 bits.
Writes DIR/model.safetensors (bf16, the stock model's names), DIR/log.jsonl and DIR/state (to resume with --resume).
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import DeepseekV3ForCausalLM

from demo.batches import BUCKETS, Batch, BatchStream
from demo.fast_forward import FastForward
from demo.model_config import demo_config
from demo.optimizer import Optimizer
from demo.quick_eval import quick_evaluate

DEFAULT_TOKENIZER = Path(__file__).parent.parent / "src" / "moesaic" / "demo" / "tokenizer"
_CYCLE = ("medium", "long")  # the second batch of each step, in turn
_SECOND_WEIGHT = 0.4  # its share of the loss
_BIAS_RATE = 0.002
_QUANTIZE_FROM = 0.35


def build_model(seed: int, device: torch.device) -> nn.Module:
    """The stock model with float32 parameters, initialised for training with Muon."""
    torch.manual_seed(seed)
    model = DeepseekV3ForCausalLM(demo_config()).float()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim < 2:
                parameter.fill_(1.0)
            elif "embed_tokens" in name:
                parameter.normal_(std=0.3)
            elif name.endswith(("o_proj.weight", "down_proj.weight", "down_proj")):
                parameter.normal_(std=0.2 * parameter.shape[-1] ** -0.5)
            else:
                parameter.normal_(std=0.6 * parameter.shape[-1] ** -0.5)
        for name, buffer in model.named_buffers():
            if name.endswith("e_score_correction_bias"):
                buffer.zero_()
    return model.to(device)


def rate(step: int, steps: int) -> float:
    """Warmup over 1% (at least 20 steps), constant, then a straight line to 0 over the last half."""
    warmup = max(20, steps // 100)
    decay_start = steps // 2
    if step < warmup:
        return (step + 1) / warmup
    return 1.0 if step < decay_start else (steps - step) / (steps - decay_start)


def batch_loss(forward: FastForward, batch: Batch, device: torch.device, quantize: bool) -> tuple[Tensor, Tensor]:
    """Mean cross-entropy over the answers' tokens, and the expert loads."""
    ids = torch.from_numpy(batch.ids).to(device, non_blocking=True).long()
    answers = torch.from_numpy(batch.answers)
    positions = answers.flatten().nonzero().flatten().to(device, non_blocking=True)
    hidden = forward(ids, quantize)
    logits = forward.logits(hidden.states[positions - 1])
    return F.cross_entropy(logits, ids.flatten()[positions]), hidden.loads


@torch.no_grad()
def balance(model: Any, loads: Tensor, speed: float) -> None:
    """Move each router's bias towards even loads; the smallest stays 0, so that biased scores stay positive."""
    layers = [layer for layer in model.model.layers if hasattr(layer.mlp, "experts")]
    for layer, load in zip(layers, loads, strict=True):
        bias = layer.mlp.gate.e_score_correction_bias
        bias.add_(speed * torch.sign(load.mean() - load))
        bias.sub_(bias.min())


def save_weights(model: nn.Module, folder: Path) -> None:
    """Write the weights as bf16 (router bias in float32) under the stock model's names."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {
        name: (t.float() if name.endswith("bias") else t.bfloat16()).contiguous().cpu()
        for name, t in model.state_dict().items()
    }
    save_file(tensors, folder / "model.safetensors")


def train(arguments: argparse.Namespace) -> None:
    """Run the training that the command line asks for."""
    streams = {
        name: BatchStream(bucket, arguments.batch_tokens, arguments.tokenizer, arguments.seed * 100 + int(arguments.resume))
        for name, bucket in BUCKETS.items()
    }
    device = torch.device("cpu" if arguments.cpu else "cuda")
    torch.set_float32_matmul_precision("high")
    model = build_model(arguments.seed, device)
    forward = FastForward(model, compile_pieces=not arguments.cpu)
    optimizer = Optimizer(model, arguments.lr, arguments.adam_lr, weight_decay=0.02)
    first = 0
    state_file = arguments.out / "state" / "state.pt"
    if arguments.resume:
        state = torch.load(state_file, map_location=device, weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        first = state["step"]
    arguments.out.mkdir(parents=True, exist_ok=True)
    start = time.monotonic()
    step = first
    with (arguments.out / "log.jsonl").open("a") as log:
        while step < arguments.steps and time.monotonic() - start < arguments.max_seconds:
            progress = step / arguments.steps
            losses, loads = {}, []
            for name, weight in (("short", 1 - _SECOND_WEIGHT), (_CYCLE[step % len(_CYCLE)], _SECOND_WEIGHT)):
                quantize = progress >= _QUANTIZE_FROM and (step // 2 + (name != "short")) % 2 == 0
                loss, load = batch_loss(forward, streams[name].next(), device, quantize)
                (loss * weight).backward()
                losses[name] = loss.detach()
                loads.append(load)
            scale = rate(step, arguments.steps)
            optimizer.step(scale)
            balance(model, sum(loads), _BIAS_RATE * min(1.0, 2 * scale))
            step += 1
            if step % arguments.log_every == 0 or step == first + 1:
                total = sum(loads)
                record = {
                    "step": step,
                    "seconds": round(time.monotonic() - start, 1),
                    **{name: round(loss.item(), 4) for name, loss in losses.items()},
                    "max_load": round((total.amax(1) / total.mean(1)).max().item(), 2),
                }
                print(json.dumps(record), flush=True)
                log.write(json.dumps(record) + "\n")
            if step % arguments.eval_every == 0 and step < arguments.steps:
                report = quick_evaluate(forward, arguments.tokenizer, device, arguments.batch_tokens, 256, quantize=False)
                print(json.dumps({"step": step, "eval": report}), flush=True)
                log.write(json.dumps({"step": step, "eval": report}) + "\n")
        save_weights(model, arguments.out)
        state_file.parent.mkdir(exist_ok=True)
        torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step}, state_file)
        for quantize in (False, True):
            report = quick_evaluate(forward, arguments.tokenizer, device, arguments.batch_tokens, arguments.eval_items, quantize)
            print(json.dumps({"step": step, "quantized": quantize, "eval": report}), flush=True)
            log.write(json.dumps({"step": step, "quantized": quantize, "eval": report}) + "\n")


def main() -> None:
    """Parse the command line and train."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for weights, log and state")
    parser.add_argument("--tokenizer", type=Path, default=DEFAULT_TOKENIZER, help="folder of the tokenizer")
    parser.add_argument("--steps", type=int, default=3600)
    parser.add_argument("--max-seconds", type=float, default=float("inf"), help="stop and save after this long")
    parser.add_argument("--resume", action="store_true", help="go on from DIR/state")
    parser.add_argument("--batch-tokens", type=int, default=65536, help="tokens per batch; a step takes two batches")
    parser.add_argument("--lr", type=float, default=4e-3, help="peak learning rate of Muon")
    parser.add_argument("--adam-lr", type=float, default=3e-3, help="peak learning rate of Adam")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--log-every", type=int, default=100)
    parser.add_argument("--eval-every", type=int, default=1_000_000)
    parser.add_argument("--eval-items", type=int, default=256, help="items per task and language at the end")
    parser.add_argument("--cpu", action="store_true", help="run eagerly on the CPU (for tests)")
    train(parser.parse_args())


if __name__ == "__main__":
    main()
