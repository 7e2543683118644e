"""Train the demo from scratch, on one GPU in minutes.

    python -m demo.train --out DIR                       # the shipped model
    python -m demo.train --out DIR --steps 2 --batch-tokens 8192 --cpu --eval-items 1   # to try the code

Each step takes a batch of short conversations and, in turn, one of medium or long rows. The rate follows
warmup-stable-decay. The router's correction biases follow the load of the experts (auxiliary-loss-free balancing, Wang
et al. 2024, arXiv:2408.15664). From a third of the run on, half of the batches see weights rounded to 4 bits.
Writes DIR/model.safetensors (BF16, the stock model's names) and DIR/log.jsonl.
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

__all__ = ["DEFAULT_TOKENIZER", "Trainer", "build_model"]

DEFAULT_TOKENIZER = Path(__file__).parent.parent / "src" / "moesaic" / "demo" / "tokenizer"
_CYCLE = ("medium", "long")  # the second batch of each step, in turn
_SECOND_WEIGHT = 0.4  # its share of the loss
_BIAS_RATE = 0.002
_QUANTIZE_FROM = 0.35
_WEIGHT_DECAY = 0.02


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
    result: nn.Module = model.to(device)
    return result


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


class Trainer:
    """One training run.

    Args:
        tokenizer: folder of the tokenizer.
        out: folder for weights and log.
        device: where to train; pieces of the forward pass are compiled on a GPU.
        steps: length of the run.
        batch_tokens: tokens per batch; a step takes two batches.
        muon_lr, adam_lr: peak learning rates.
        seed: seed of the weights and the data.
    """

    def __init__(
        self,
        tokenizer: Path,
        out: Path,
        device: torch.device,
        *,
        steps: int,
        batch_tokens: int,
        muon_lr: float,
        adam_lr: float,
        seed: int,
    ) -> None:
        # The workers are forked, which must happen before this process touches the GPU.
        self._streams = {name: BatchStream(bucket, batch_tokens, tokenizer, seed) for name, bucket in BUCKETS.items()}
        self._device, self._steps, self._batch_tokens, self._tokenizer = device, steps, batch_tokens, tokenizer
        self.model = build_model(seed, device)
        on_gpu = device.type == "cuda"
        if on_gpu:  # the router's products; CPUs without bf16 would emulate it
            torch.set_float32_matmul_precision("high")
        self.forward = FastForward(self.model, on_gpu, torch.bfloat16 if on_gpu else torch.float32)
        self._optimizer = Optimizer(self.model, muon_lr, adam_lr, _WEIGHT_DECAY)
        self._out = out
        out.mkdir(parents=True, exist_ok=True)

    def run(self, log_every: int) -> None:
        """Train to the end and write the weights."""
        start = time.monotonic()
        for step in range(self._steps):
            losses, loads = self.step(step)
            if step == 0 or (step + 1) % log_every == 0:
                self._log(
                    step=step + 1,
                    seconds=round(time.monotonic() - start, 1),
                    **{name: round(loss.item(), 4) for name, loss in losses.items()},
                    max_load=round((loads.amax(1) / loads.mean(1)).max().item(), 2),
                )
        save_weights(self.model, self._out)

    def step(self, step: int) -> tuple[dict[str, Tensor], Tensor]:
        """One optimizer step; returns the losses by bucket and the loads [num_moe_layers, num_experts]."""
        losses: dict[str, Tensor] = {}
        loads = []
        second = _CYCLE[step % len(_CYCLE)]
        for name, weight in (("short", 1 - _SECOND_WEIGHT), (second, _SECOND_WEIGHT)):
            quantize = step >= _QUANTIZE_FROM * self._steps and (step // 2 + (name != "short")) % 2 == 0
            loss, load = batch_loss(self.forward, self._streams[name].next(), self._device, quantize)
            torch.autograd.backward(loss * weight)
            losses[name] = loss.detach()
            loads.append(load)
        scale = rate(step, self._steps)
        self._optimizer.step(scale)
        total = torch.stack(loads).sum(0)
        balance(self.model, total, _BIAS_RATE * min(1.0, 2 * scale))
        return losses, total

    def evaluate(self, num_items: int) -> None:
        """Log the accuracies on held-out questions, with BF16 weights and with weights rounded to 4 bits."""
        for quantize in (False, True):
            report = quick_evaluate(
                self.forward, self._tokenizer, self._device, self._batch_tokens, num_items, quantize
            )
            self._log(quantized=quantize, eval=report)

    def _log(self, **record: object) -> None:
        line = json.dumps(record)
        print(line, flush=True)
        with (self._out / "log.jsonl").open("a") as log:
            log.write(line + "\n")


def main() -> None:
    """Parse the command line and train."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for weights and log")
    parser.add_argument("--tokenizer", type=Path, default=DEFAULT_TOKENIZER, help="folder of the tokenizer")
    parser.add_argument("--steps", type=int, default=3600)
    parser.add_argument("--batch-tokens", type=int, default=65536, help="tokens per batch; a step takes two batches")
    parser.add_argument("--lr", type=float, default=4e-3, help="peak learning rate of Muon")
    parser.add_argument("--adam-lr", type=float, default=3e-3, help="peak learning rate of Adam")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--log-every", type=int, default=100)
    parser.add_argument("--eval-items", type=int, default=256, help="held-out questions per task and language")
    parser.add_argument("--cpu", action="store_true", help="run eagerly on the CPU (to try the code)")
    arguments = parser.parse_args()
    trainer = Trainer(
        arguments.tokenizer,
        arguments.out,
        torch.device("cpu" if arguments.cpu else "cuda"),
        steps=arguments.steps,
        batch_tokens=arguments.batch_tokens,
        muon_lr=arguments.lr,
        adam_lr=arguments.adam_lr,
        seed=arguments.seed,
    )
    trainer.run(arguments.log_every)
    trainer.evaluate(arguments.eval_items)


if __name__ == "__main__":
    main()
