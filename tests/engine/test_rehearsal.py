"""Whether rehearsals foresee the kernels of real steps, and what is said while they are compiled."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from tests.fake_gpu import in_process

pytest.importorskip("triton")

from moesaic.engine.gpu import rehearsal
from moesaic.engine.gpu.rehearsal import compile_kernels

# Real steps on a GPU that is not there: launches are noted, and the CPU, which nobody asks then, does not answer.
STEPS = """
import json, torch
from tests.engine.pairs import load_tiny
from moesaic.engine.gpu import rehearsal
from moesaic.engine.gpu.expert_cache import ExpertCache
from moesaic.engine.gpu.prefill import ChunkBuffers, ChunkPath
from moesaic.engine.gpu.runner import ModelRunner
from moesaic.engine.gpu.runner_options import RunnerOptions
from moesaic.engine.gpu.shares import Costs, ExpertShares
from moesaic.engine.gpu.slots import ExpertSlots
from moesaic.engine.gpu.staging import StagingBuffers
from moesaic.engine.gpu.upload_shares import UploadShares
from moesaic.engine.gpu.uploads import MissUploads
from moesaic.kernels.triton.ahead import KernelsAhead
from moesaic.modules.gpu.decoder import GpuDecoder
from moesaic.modules.gpu.landing import LandingSlots

device = torch.device("cpu")
decoder = GpuDecoder(load_tiny(FAMILY), device, max_positions=512)
experts = [each for each in decoder.routed if each is not None]
slots = ExpertSlots(cache=ExpertCache(experts, 5, device))
options = RunnerOptions(num_blocks=32, block_size=16, max_batch=16, graphs=False, max_chunk=256)
uploads = MissUploads(LandingSlots(experts, 3, decoder.top_k, device), UploadShares())
shares = ExpertShares(Costs(1e-9, 1.0, 0.0, 1.0, 1.0))  # all is streamed
runner = ModelRunner(decoder, options, slots, StagingBuffers(experts, 4, device), shares, uploads)
ahead = KernelsAhead(0)
with torch.no_grad(), ahead.note():
    rehearsal._rehearse(runner)
foreseen = set(ahead._kernels)

runner.server.serve = lambda *_, **options: None
ChunkPath._on_cpu = lambda self, routed, misses: torch.zeros_like(routed.hidden)
fetch = ChunkBuffers.fetch_routing
def fetch_any(self, misses):
    fetch(self, misses.copy_(torch.arange(misses.numel()).view(misses.shape) % experts[0].num_experts))
ChunkBuffers.fetch_routing = fetch_any
with torch.no_grad(), ahead.note():
    for length in LENGTHS:
        sequence = runner.new_sequence()
        runner.prefill([(sequence, torch.zeros(length, dtype=torch.int64))])
        runner.prefill([(sequence, torch.zeros(3, dtype=torch.int64))], "all")
        sequence.free()
    for count in (1, 2, 3, 4, 5, 7, 8, 9, 12, 15, 16):
        sequences = [runner.new_sequence() for _ in range(count)]
        runner.prefill([(sequence, torch.zeros(2, dtype=torch.int64)) for sequence in sequences])
        for fixed in (None, [0] + [1] * uploads.landing.max_distinct):
            uploads.fixed = fixed
            runner.decode(sequences, [0] * count)
        for sequence in sequences:
            sequence.free()
ahead.close()
late = [key for key in ahead._kernels if key not in foreseen]
print(json.dumps({"foreseen": len(foreseen), "late": len(late)}))
"""


@pytest.mark.parametrize("family", ["qwen3_moe", "deepseek_v3"])
def test_rehearsals_foresee_the_kernels_of_real_steps(family: str, tmp_path: Path) -> None:
    lengths = "LENGTHS = [1, 2, 7, 8, 9, 15, 19, 33, 50, 64, 65, 99, 127, 128, 150, 250]\n"
    found = json.loads(in_process(f"FAMILY = {family!r}\n{lengths}{STEPS}", tmp_path).splitlines()[-1])
    assert found["foreseen"] > 40 and found["late"] == 0


class Broken:
    """A runner that can do nothing of a rehearsal."""

    def __init__(self) -> None:
        self.prepared: list[int] = []
        self.steps = SimpleNamespace(bucket=self.prepared.append)


def test_a_rehearsal_that_fails_is_told_and_hinders_nobody(caplog: pytest.LogCaptureFixture) -> None:
    runner = Broken()
    with caplog.at_level(logging.WARNING, "moesaic.gpu"):
        compile_kernels(runner, 1)  # type: ignore[arg-type]
    assert "compiled when they are needed first: the rehearsal failed" in caplog.text
    assert runner.prepared == [1]


def test_who_waits_is_told_if_it_takes_longer_than_a_moment(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    with caplog.at_level(logging.INFO, "moesaic.gpu"):
        with rehearsal._Report(draws=True) as report:
            report(0, 57)
            report(57, 57)
        assert not caplog.records and not capsys.readouterr().err
        monkeypatch.setattr(rehearsal, "_QUIET_SECONDS", 0.0)
        with rehearsal._Report(draws=True) as report:
            report(0, 57)
            report(12, 57)
            report(57, 57)
    assert caplog.text.count("compiling 57 kernels for this GPU, once on this computer; they are kept in ") == 1
    assert "Compiling GPU kernels: 100%" in (drawn := capsys.readouterr().err) and "57/57" in drawn


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.usefixtures("free_card")
def test_nothing_is_left_to_compile_on_a_gpu(tmp_path: Path) -> None:
    """On a GPU: the first answers of a loaded model find all their kernels."""
    from triton import knobs

    from moesaic import LLM, SamplingParams

    late: list[str] = []
    llm = LLM("demo", plan="hybrid", vram="4GiB", context=1024, progress=False)
    inner = knobs.compilation.listener

    def listen(*, src, metadata, metadata_group, times, cache_hit):  # type: ignore[no-untyped-def]
        late.append(src.name)
        inner(src=src, metadata=metadata, metadata_group=metadata_group, times=times, cache_hit=cache_hit)

    knobs.compilation.listener = listen
    try:
        chats = [[{"role": "user", "content": f"What is {n} + {3 * n}?"}] for n in range(12)]
        for count in (1, 3, 7, 12):
            llm.chat(chats[:count], SamplingParams(max_tokens=4, temperature=0.0))
    finally:
        knobs.compilation.listener = inner
        llm.close()
    assert late == []
