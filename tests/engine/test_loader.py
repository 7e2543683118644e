"""What a load makes of a checkpoint and a plan: which modules, which memory, which errors."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tests.engine.pairs import checkpoint_of, load_tiny, pair, relative_error
from tests.tiny_models import save_large, tiny_inputs
from torch import nn
from transformers import PreTrainedModel, Qwen3MoeForCausalLM

from moesaic import AutoModelForCausalLM
from moesaic.engine.loader import load, prepare
from moesaic.errors import CheckpointError, PlanDoesNotFitError, UnsupportedModelError
from moesaic.modules import PackedEmbedding, PackedLinear, RoutedExperts
from moesaic.placement import detect_hardware, load_plan


def _rules(tmp_path: Path, text: str):
    (tmp_path / "plan.yaml").write_text(text)
    return load_plan(str(tmp_path / "plan.yaml"))


def test_from_pretrained_gives_a_model_of_the_stock_class() -> None:
    calls: list[tuple[int, int]] = []
    model = AutoModelForCausalLM.from_pretrained(
        str(checkpoint_of("qwen3_moe")[1]), progress=lambda done, total: calls.append((done, total))
    )
    assert isinstance(model, Qwen3MoeForCausalLM) and isinstance(model, PreTrainedModel)
    assert type(model).__name__ == "Qwen3MoeForCausalLM" and not model.training
    assert model.device.type == "cpu" and model.dtype == torch.float32
    done, total = zip(*calls, strict=True)
    assert list(done) == sorted(done) and done[-1] == total[-1] == max(total) > 0


@pytest.mark.parametrize("family", ["qwen3_moe", "deepseek_v3", "gpt_oss", "qwen3_next"])
def test_what_became_of_the_modules(family: str) -> None:
    model = pair(family)[1]
    kinds = {type(module) for module in model.modules()}
    assert {PackedLinear, PackedEmbedding, RoutedExperts} <= kinds
    assert nn.Linear not in kinds and nn.Embedding not in kinds
    large = [name for name, parameter in model.named_parameters() if parameter.numel() > 4096]
    assert large == []  # every matrix is packed, and held once


def test_tied_head_shares_the_embedding() -> None:
    model = pair("hunyuan_v1_moe")[1]
    assert model.lm_head.packed is model.model.embed_tokens.packed


def test_generation_config_of_the_checkpoint(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(checkpoint_of("olmoe")[1], folder)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [7, 9], "temperature": 0.25}))
    model = load(prepare(str(folder)), progress=False)
    assert model.generation_config.eos_token_id == [7, 9]
    assert model.generation_config.temperature == 0.25


_STOCK_PARTS = {
    "one layer": "model.layers.1.*",
    "experts": "re:.*\\.experts",
    "attention": "re:.*self_attn.*",
    "everything": "*",
}


@pytest.mark.parametrize("family", ["qwen3_moe", "deepseek_v2", "gpt_oss", "ernie4_5_moe"])
@pytest.mark.parametrize("part", _STOCK_PARTS)
def test_stock_parts(family: str, part: str, tmp_path: Path) -> None:
    """Any part can stay in the stock implementation; the numbers are the same, padded and in chunks too."""
    rules = f"rules:\n  - match: {{name: '{_STOCK_PARTS[part]}'}}\n    implementation: transformers\n"
    ours, stock = load_tiny(family, _rules(tmp_path, rules)), checkpoint_of(family)[0]
    ids = tiny_inputs(batch=2, length=12)
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    with torch.no_grad():
        assert relative_error(ours(ids).logits, stock(ids).logits) < 1e-4
    arguments = {"max_new_tokens": 8, "do_sample": False, "attention_mask": mask}
    assert torch.equal(ours.generate(ids, **arguments), stock.generate(ids, **arguments))
    chunks = {"max_new_tokens": 8, "do_sample": False, "prefill_chunk_size": 5}
    assert torch.equal(ours.generate(ids, **chunks), stock.generate(ids, **chunks))


def test_another_attention_implementation_and_back() -> None:
    stock, ours = checkpoint_of("glm4_moe")[0], load_tiny("glm4_moe")
    ids = tiny_inputs()
    with torch.no_grad():
        expected = stock(ids).logits
        for name in ("eager", "sdpa", "moesaic"):
            ours.set_attn_implementation(name)
            assert relative_error(ours(ids).logits, expected) < 1e-4


def test_saving_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModelError, match="moesaic quantize"):
        pair("mixtral")[1].save_pretrained(tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_missing_tensors_are_named(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(checkpoint_of("mixtral")[1], folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 4}))
    with pytest.raises(CheckpointError, match=r"lacks .* model\.layers\.3"):
        prepare(str(folder))


def test_a_plan_that_does_not_fit_is_refused_before_loading(monkeypatch: pytest.MonkeyPatch) -> None:
    import dataclasses

    small = dataclasses.replace(detect_hardware(), dram_available=1 << 20)
    monkeypatch.setattr("moesaic.engine.loader.detect_hardware", lambda: small)
    prepared = prepare(str(checkpoint_of("mixtral")[1]))
    with pytest.raises(PlanDoesNotFitError, match="too little"):
        load(prepared, progress=False)


_MEASURE = """
import sys
from pathlib import Path
from moesaic.engine.loader import load, prepare

def peak(): return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM")) * 1024

prepared = prepare(sys.argv[1], plan=sys.argv[2])
Path("/proc/self/clear_refs").write_text("5")  # forget the peak of what was imported
before = peak()
model = load(prepared, progress=False)
print(prepared.plan.nbytes, peak() - before)
"""


@pytest.fixture(scope="module")
def folder_of_large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of 460 MB."""
    folder = tmp_path_factory.mktemp("large") / "model"
    sizes = {"hidden_size": 1024, "moe_intermediate_size": 768, "num_experts": 24, "vocab_size": 4096}
    save_large(folder, "qwen3_moe", num_hidden_layers=4, **sizes)
    return folder


@pytest.mark.skipif(sys.platform != "linux", reason="peak memory is read from /proc")
@pytest.mark.parametrize(("plan", "nodes"), [("keep", 1), ("Q8_0", 1), ("keep", 2)])
def test_peak_memory_of_a_load(plan: str, nodes: int, folder_of_large: Path, tmp_path: Path) -> None:
    """At most 1.10 times the plan's bytes, file pages included, also when matrices are requantised or cut."""
    (tmp_path / "plan.yaml").write_text(f"rules:\n  - match: {{name: '*'}}\n    format: {plan}\n")
    command = [sys.executable, "-c", _MEASURE, str(folder_of_large), str(tmp_path / "plan.yaml")]
    # Many threads even on a small computer: what a load needs beside the plan must not grow with them.
    environment = os.environ | {"MOESAIC_THREADS": "16", "MOESAIC_NUMA_NODES": str(nodes)}
    result = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    planned, used = map(int, result.stdout.split())
    assert planned > (400 if plan == "keep" else 200) * 1024**2
    assert used <= 1.10 * planned
