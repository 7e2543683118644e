"""Experts that arrive one layer late in decode, against stock models in float64 whose experts do the same.

Everything is eager where it is recorded which experts the CPU computed; only those can be late.
"""

from __future__ import annotations

import copy
import functools
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tests.engine import test_gpu
from tests.engine.pairs import relative_error
from tests.engine.test_gpu import DEVICE, MODES, ON_GPU, OPTIONS, TOLERANCE, eager_cache, inputs, some_uploads
from tests.tiny_models import save_tiny
from transformers import PreTrainedModel

from moesaic.engine.deferral import check_deferral, deferral_note
from moesaic.engine.gpu.causal_lm import attach_runner
from moesaic.engine.gpu.runner import ModelRunner
from moesaic.engine.gpu.slots import ExpertSlots
from moesaic.engine.gpu.uploads import MissUploads
from moesaic.engine.loader import load, prepare
from moesaic.engine.serving.start import ServingOptions, make_engine
from moesaic.errors import ConfigError, ExpertTimeoutError, KernelError
from moesaic.kvcache.paged import PagedSequence
from moesaic.modules.gpu.decoder import GpuDecoder

NUM_LAYERS = 3
CASES = [("qwen3_moe", 2), ("deepseek_v3", 1), ("qwen3_moe", 1), ("deepseek_v3", 2)]
MARGIN = 30 * TOLERANCE
"""What is late changes logits by more than this, so that a layer that forgets it is seen."""


@functools.cache
def checkpoint_of(family: str) -> tuple[PreTrainedModel, Path]:
    """As those of `test_gpu`, with a layer more, so that one both gets and leaves something."""
    folder = Path(tempfile.mkdtemp(prefix=f"moesaic-late-{family}-"))
    smaller = test_gpu._SMALLER | {"num_hidden_layers": NUM_LAYERS + (family == "deepseek_v3")}  # whose first is dense
    for absent in ("shared_expert_intermediate_size", *(("head_dim",) if family == "deepseek_v3" else ())):
        smaller.pop(absent)
    if family != "deepseek_v3":
        smaller.pop("kv_lora_rank"), smaller.pop("q_lora_rank")
    return save_tiny(folder, family, **smaller), folder


def runner_of(
    family: str,
    mode: str = "eager",
    slots: Callable[[GpuDecoder], ExpertSlots] = lambda decoder: ExpertSlots(),
    uploads: Callable[[GpuDecoder], MissUploads | str] = lambda decoder: "",
) -> ModelRunner:
    model = load(prepare(str(checkpoint_of(family)[1]), plan="cpu"), progress=False)
    decoder = GpuDecoder(model, DEVICE, max_positions=512, dtype=torch.float32)
    options = replace(OPTIONS, graphs=mode == "graph")
    return attach_runner(model, ModelRunner(decoder, options, slots(decoder), uploads=uploads(decoder))).runner


class Late:
    """A stock model in float64; in decode its experts with the lowest weights come a layer late."""

    def __init__(self, family: str, count: int) -> None:
        self.model, self.count = copy.deepcopy(checkpoint_of(family)[0]).double(), count
        self.model.set_experts_implementation("eager")
        modules = [module for name, module in self.model.named_modules() if name.endswith("mlp.experts")]
        assert len(modules) == NUM_LAYERS
        for index, module in enumerate(modules):
            module.forward = functools.partial(self._forward, index, module.forward)
        self._on_cpu: Sequence[torch.Tensor] | None = None
        self._late: torch.Tensor | float = 0.0

    def logits(self, row: torch.Tensor, prompt: int, on_cpu: Sequence[Sequence[torch.Tensor] | None]) -> torch.Tensor:
        """Logits `[steps, vocab_size]` of the tokens behind a prompt, one by one.

        Args:
            row: int64 `[tokens]`.
            prompt: tokens that go through exactly.
            on_cpu: of each step, of each layer with experts those that the CPU computed; None: all.
        """
        found = []
        with torch.no_grad():
            cache = self.model(row[None, :prompt]).past_key_values
            for step, token in enumerate(row[prompt:]):
                self._on_cpu, self._late = on_cpu[step], 0.0
                self._decodes = True
                found.append(self.model(token[None, None], past_key_values=cache).logits[0, -1])
                self._decodes = False
        return torch.stack(found)

    _decodes = False

    def _forward(
        self, layer: int, exact: Callable[..., torch.Tensor], x: torch.Tensor, chosen: torch.Tensor, w: torch.Tensor
    ) -> torch.Tensor:
        if not self._decodes:
            return exact(x, chosen, w)
        is_late = torch.zeros_like(chosen, dtype=torch.bool)
        if layer + 1 < NUM_LAYERS:
            is_late.scatter_(1, w.argsort(dim=1)[:, : self.count], True)
        if self._on_cpu is not None:
            is_late &= torch.isin(chosen, self._on_cpu[layer])
        now = exact(x, chosen, w * ~is_late) + self._late
        self._late = exact(x, chosen, w * is_late)
        return now


def decoded(runner: ModelRunner, rows: Sequence[torch.Tensor], steps: int) -> tuple[torch.Tensor, list[Any]]:
    """Logits `[rows, steps, vocab_size]` of the last tokens; of rows and steps the CPU's experts of each layer."""
    server, seen = runner.server, list[torch.Tensor]()
    assert server is not None
    serve = server.serve

    def noted(num_tokens: int, **options: Any) -> None:
        serve(num_tokens, **options)
        asked = server.mailbox.experts[:num_tokens].clone()  # until the next layer asks, which this thread launches
        uploads, layer = options.get("uploads"), options.get("first_layer", 0)
        seen.append(asked if uploads is None else asked.masked_fill(uploads.last_slots(layer)[:num_tokens] >= 0, -1))

    server.serve = noted  # type: ignore[method-assign]
    sequences = [runner.new_sequence() for _ in rows]
    runner.prefill([(sequence, row[:-steps]) for sequence, row in zip(sequences, rows, strict=True)])
    logits = [
        runner.decode(sequences, [int(row[step - steps]) for row in rows]).to("cpu", copy=True) for step in range(steps)
    ]
    server.serve = serve  # type: ignore[method-assign]
    for sequence in sequences:
        sequence.free()
    by_row = [
        [[seen[NUM_LAYERS * step + layer][row] for layer in range(NUM_LAYERS)] for step in range(steps)]
        for row in range(len(rows))
        if len(seen) == NUM_LAYERS * steps
    ]
    return torch.stack(logits, 1), by_row


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("family", "count"), CASES if ON_GPU else CASES[:2])
def test_the_lowest_experts_come_one_layer_late(family: str, count: int, mode: str) -> None:
    """Of three sequences of different lengths in one step, and padding beside them."""
    runner, steps = runner_of(family, mode), 8 if ON_GPU else 1
    runner.hand_off.defer(count)
    rows = [inputs(1, length, seed=length)[0] for length in (2 + steps, 3 + steps, 5 + steps)]
    logits, _ = decoded(runner, rows, steps)
    late, exact = Late(family, count), Late(family, 0)
    expected = torch.stack([late.logits(row, len(row) - steps, [None] * steps) for row in rows])
    assert relative_error(logits, expected) < TOLERANCE
    without = torch.stack([exact.logits(row, len(row) - steps, [None] * steps) for row in rows])
    assert all(relative_error(one, other) > MARGIN for one, other in zip(expected, without, strict=True))


def test_what_the_gpu_computes_is_never_late() -> None:
    """Experts in a cache that changes all the time, and misses that come over the link."""
    runner, steps = runner_of("qwen3_moe", slots=eager_cache, uploads=some_uploads), 16 if ON_GPU else 3
    runner.hand_off.defer(2)
    rows = [inputs(1, length, seed=length)[0] for length in (2 + steps, 3 + steps)]
    logits, on_cpu = decoded(runner, rows, steps)
    late = Late("qwen3_moe", 2)
    expected = torch.stack([late.logits(row, len(row) - steps, seen) for row, seen in zip(rows, on_cpu, strict=True)])
    assert relative_error(logits, expected) < TOLERANCE
    all_late = torch.stack([late.logits(row, len(row) - steps, [None] * steps) for row in rows])
    assert relative_error(expected, all_late) > MARGIN
    assert runner.uploads is not None and runner.uploads.statistics().brought > 0


@pytest.fixture(scope="module")
def prefilled() -> tuple[ModelRunner, PagedSequence]:
    """A runner, and a sequence of three tokens."""
    runner = runner_of("qwen3_moe")
    sequence = runner.new_sequence()
    runner.prefill([(sequence, inputs(1, 3)[0])])
    return runner, sequence


def test_nothing_is_late_unless_it_was_asked_for(prefilled: tuple[ModelRunner, PagedSequence]) -> None:
    """The same bits before it is switched on and after it is switched off."""
    runner, sequence = prefilled
    before = again(runner, sequence)
    runner.hand_off.defer(2)
    between = again(runner, sequence)
    runner.hand_off.defer(0)
    assert torch.equal(before, again(runner, sequence))
    assert relative_error(between, before) > MARGIN


def test_a_failure_leaves_nothing_to_the_next_step(
    prefilled: tuple[ModelRunner, PagedSequence], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The CPU fails when the first layer has put experts off; the step after it is as if nothing had been."""
    runner, sequence = prefilled
    server, length = runner.server, sequence.length
    assert server is not None
    runner.hand_off.defer(2)
    expected, serve = again(runner, sequence), server.serve

    def fails(num_tokens: int, *, first_layer: int, **options: Any) -> None:
        if first_layer == 1:
            raise ExpertTimeoutError("the test's")
        serve(num_tokens, first_layer=first_layer, **options)

    monkeypatch.setattr(server, "serve", fails)
    with pytest.raises(ExpertTimeoutError, match="the test's"):
        runner.decode([sequence], [5])
    monkeypatch.setattr(server, "serve", serve)
    assert sequence.length == length
    assert torch.equal(again(runner, sequence), expected)


def again(runner: ModelRunner, sequence: PagedSequence) -> torch.Tensor:
    """The logits of one token, after which the sequence is as before."""
    logits = runner.decode([sequence], [5]).to("cpu", copy=True)
    sequence.truncate(sequence.length - 1)
    return logits


def test_more_than_can_be_late_is_refused() -> None:
    runner = runner_of("qwen3_moe")
    for count in (-1, 3):
        with pytest.raises(KernelError, match=f"{count} of 3 experts are to come a layer late: expected 0 to 2"):
            runner.hand_off.defer(count)
    resident = runner_of("qwen3_moe", slots=test_gpu.all_resident)
    with pytest.raises(KernelError, match="all lie on the GPU"):
        resident.hand_off.defer(1)


def plan_of(on_gpu: Sequence[int], on_cpu: Sequence[int], top_k: int = 8) -> Any:
    """A plan whose layers on the GPU and layers with experts on the CPU are these."""
    sizes = {"num_experts": 64, "nbytes": 640, "bytes_per_token": 10 * top_k}
    experts = [
        SimpleNamespace(role="experts", device="cpu", module=f"model.layers.{layer}.mlp.experts", **sizes)
        for layer in on_cpu
    ]
    return SimpleNamespace(entries=experts, gpu_layers=frozenset(on_gpu), name="hybrid.yaml", strategy="hybrid")


def test_a_plan_without_any_use_for_it_is_refused() -> None:
    hybrid = plan_of(range(4), range(1, 4))
    check_deferral(hybrid, 7)
    assert deferral_note(hybrid, 2).startswith("2 of 8 experts arrive one layer late; answers differ slightly")
    with pytest.raises(ConfigError, match=r"--defer-experts 8: a token has 8 experts.*expected 0 to 7"):
        check_deferral(hybrid, 8)
    for plan, found in (
        (plan_of([], range(4)), "no layer"),  # cpu
        (plan_of([0, 1], [2, 3]), "no layer"),  # layers
        (plan_of(range(4), []), "no layer"),  # gpu
        (plan_of(range(4), [3]), "only one layer"),
    ):
        check_deferral(plan, 0)
        with pytest.raises(ConfigError, match=f"{found} on a GPU has routed experts on the CPU"):
            check_deferral(plan, 1)


def test_it_is_refused_before_weights_are_read() -> None:
    prepared = prepare(str(checkpoint_of("qwen3_moe")[1]), plan="cpu")
    with pytest.raises(ConfigError, match=r"--defer-experts 1: with the plan '.*cpu"):
        load(prepared, progress=False, defer_experts=1)
    prepared.checkpoint.close()
    with pytest.raises(ConfigError, match="--defer-experts 1"):
        make_engine("demo", ServingOptions(plan="cpu", defer_experts=1), progress=False)
