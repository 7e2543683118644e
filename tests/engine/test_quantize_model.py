"""Whole models quantised into GGUF files, read back by the gguf package."""

from __future__ import annotations

import json
import shutil
from collections import namedtuple
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.published import save_published
from tests.tiny_models import save_tiny, tiny_inputs
from transformers import AutoModelForCausalLM

from moesaic.engine import quantize as module
from moesaic.engine.loader import load, prepare
from moesaic.engine.quantize import QuantizeResult, quantize_checkpoint
from moesaic.errors import CheckpointError, ConfigError, UnsupportedFormatError
from moesaic.models import build_meta_model, build_weight_map, config_for
from moesaic.placement import Rules, load_plan
from moesaic.placement.rules import parse_rules
from moesaic.quant import dequantize, get_format
from moesaic.weights import open_checkpoint

# Normalised RMSE of Gaussian weights, with a tenth in reserve; tests/quant compares them with published bounds.
ERRORS = {"F32": 0.0, "Q8_0": 0.006, "Q6_K": 0.019, "Q4_K": 0.077, "Q2_K": 0.29}


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folders = {}
    for family in ("deepseek_v3", "gpt_oss", "qwen3_moe", "qwen3_next"):
        folders[family] = tmp_path_factory.mktemp(family)
        save_tiny(folders[family], family)
    return folders


def run(source: Path, output: Path, name: str, rules: Rules | None = None) -> QuantizeResult:
    checkpoint = open_checkpoint(source)
    try:
        return quantize_checkpoint(checkpoint, output, get_format(name), rules=rules)
    finally:
        checkpoint.close()


def formats_of(file: Path) -> dict[str, str]:
    return {tensor.name: tensor.tensor_type.name for tensor in gguf.GGUFReader(file).tensors}


@pytest.mark.parametrize("family", ["deepseek_v3", "gpt_oss", "qwen3_moe", "qwen3_next"])
@pytest.mark.parametrize("name", ["Q4_K", "Q2_K"])
def test_gguf_reads_what_was_written(checkpoints: dict[str, Path], tmp_path: Path, family: str, name: str) -> None:
    result = run(checkpoints[family], tmp_path / "out.gguf", name)
    reader = gguf.GGUFReader(tmp_path / "out.gguf")
    ours = open_checkpoint(tmp_path / "out.gguf")
    assert {tensor.name for tensor in reader.tensors} == set(ours.tensors)
    for tensor in reader.tensors:
        info = ours.tensors[tensor.name]
        oracle = gguf.quants.dequantize(tensor.data, tensor.tensor_type).reshape(-1, info.shape[-1])
        values = dequantize(ours.raw(tensor.name), info.format, info.shape[-1])
        np.testing.assert_array_equal(values.view(np.uint32), oracle.view(np.uint32))
    assert result.nbytes == sum(tensor.n_bytes for tensor in reader.tensors)
    assert sum(count for count, _ in result.formats.values()) == len(reader.tensors)


@pytest.mark.parametrize("family", ["deepseek_v3", "gpt_oss", "qwen3_moe", "qwen3_next"])
@pytest.mark.parametrize("name", ["F32", "Q4_K"])
def test_parameters_keep_their_values(checkpoints: dict[str, Path], tmp_path: Path, family: str, name: str) -> None:
    """Every parameter and expert read back through the weight map is the original up to its format's error."""
    run(checkpoints[family], tmp_path / "out.gguf", name)
    original, written = open_checkpoint(checkpoints[family]), open_checkpoint(tmp_path / "out.gguf")
    model = build_meta_model(config_for(original))
    before, after = build_weight_map(model, original), build_weight_map(build_meta_model(config_for(written)), written)
    pairs = [(ref, after.parameter(key)) for key, ref in before.parameters.items()]
    for experts in before.expert_modules:
        for field, refs in before.experts(experts).named().items():
            pairs += zip(refs, after.experts(experts).named()[field], strict=True)
    assert len(pairs) > 40
    for ref, back in pairs:
        wanted, found = ref.read_float(original).numpy(), back.read_float(written).numpy()
        formats = {written.tensors[source].format.name for source in back.sources}
        bound = max(ERRORS[fmt] for fmt in formats)
        if bound == 0 and family == "qwen3_next":
            bound = 1e-6  # GGUF holds 1 + norm weight and -exp(A_log)
        assert np.linalg.norm(found - wanted) <= bound * np.linalg.norm(wanted), (ref.name, formats)


@pytest.mark.parametrize(("family", "name", "bound"), [("deepseek_v3", "F32", 1e-4), ("gpt_oss", "Q8_0", 0.05)])
def test_the_result_runs(checkpoints: dict[str, Path], tmp_path: Path, family: str, name: str, bound: float) -> None:
    """Logits of the quantised file against the stock model; with Q8_0 the weights' error shows."""
    stock = AutoModelForCausalLM.from_pretrained(checkpoints[family], dtype=torch.float32, attn_implementation="eager")
    run(checkpoints[family], tmp_path / "out.gguf", name)
    ours = load(prepare(str(tmp_path / "out.gguf")), progress=False)
    with torch.no_grad():
        expected, found = stock(tiny_inputs()).logits, ours(tiny_inputs()).logits
    assert (found - expected).norm() < bound * expected.norm()


def test_roles_decide_formats(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    result = run(checkpoints["deepseek_v3"], tmp_path / "out.gguf", "Q4_K")
    formats = formats_of(tmp_path / "out.gguf")
    assert formats["token_embd.weight"] == formats["output.weight"] == "Q6_K"
    assert formats["blk.1.ffn_gate_inp.weight"] == formats["blk.1.exp_probs_b.bias"] == "F32"
    assert formats["blk.1.attn_norm.weight"] == "F32"
    assert formats["blk.1.ffn_down_exps.weight"] == formats["blk.1.ffn_up_shexp.weight"] == "Q4_K"
    assert formats["blk.1.attn_k_b.weight"] == "Q8_0"  # rows of 64
    assert formats["blk.1.attn_v_b.weight"] == "Q4_K"
    assert [note for note in result.notes if "blk.0.attn_k_b.weight" in note and "Q8_0 instead of Q4_K" in note]
    fields = gguf.GGUFReader(tmp_path / "out.gguf").fields
    assert fields["general.architecture"].contents() == "deepseek2"
    assert fields["general.file_type"].contents() == gguf.LlamaFileType.MOSTLY_Q4_K_S
    assert fields["general.quantization_version"].contents() == gguf.GGML_QUANT_VERSION


def test_rules_choose_formats(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    rules = parse_rules(
        """
rules:
  - match: {name: "model.layers.1.*", role: experts}
    format: {gate: Q2_K, up: keep, down: Q6_K}
  - match: {role: attention}
    format: Q8_0
  - match: {role: shared_experts}
    format: Q8_0
  - match: {role: [norm, router]}
    format: Q8_0
""",
        "mine.yaml",
    )
    result = run(checkpoints["qwen3_moe"], tmp_path / "out.gguf", "Q4_K", rules)
    formats = formats_of(tmp_path / "out.gguf")
    assert [formats[f"blk.1.ffn_{key}_exps.weight"] for key in ("gate", "up", "down")] == ["Q2_K", "F32", "Q6_K"]
    assert formats["blk.0.ffn_gate_exps.weight"] == "Q4_K"
    assert formats["blk.2.attn_q.weight"] == "Q8_0"
    assert formats["blk.2.attn_q_norm.weight"] == "F32"
    assert result.notes[-2:] == (
        "mine.yaml:7: no tensor matches this rule (role: shared_experts).",
        "mine.yaml:9: changes nothing (role: norm | router): norms, routers and vectors stay F32.",
    )
    assert "no tokenizer" in result.notes[0]


def test_a_gguf_keeps_metadata_and_what_has_the_format_already(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    first, second = tmp_path / "first.gguf", tmp_path / "second.gguf"
    run(checkpoints["deepseek_v3"], first, "Q4_K")
    rules = parse_rules("rules:\n  - match: {role: lm_head}\n    format: Q8_0\n", "head.yaml")
    result = run(first, second, "Q4_K", rules)
    before, after = gguf.GGUFReader(first), gguf.GGUFReader(second)
    assert [tensor.name for tensor in before.tensors] == [tensor.name for tensor in after.tensors]
    for old, new in zip(before.tensors, after.tensors, strict=True):
        if old.name == "output.weight":
            assert new.tensor_type.name == "Q8_0"
        else:
            assert new.tensor_type == old.tensor_type
            np.testing.assert_array_equal(new.data, old.data)
    old_fields = {key: field.contents() for key, field in before.fields.items()}
    assert old_fields == {key: field.contents() for key, field in after.fields.items()}
    assert [note for note in result.notes if "output.weight: already Q6_K" in note]


def test_progress_ends_at_its_total(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    steps: list[tuple[int, int]] = []
    checkpoint = open_checkpoint(checkpoints["qwen3_moe"])
    result = quantize_checkpoint(
        checkpoint, tmp_path / "out.gguf", get_format("Q8_0"), progress=lambda done, total: steps.append((done, total))
    )
    assert steps == sorted(steps)
    assert steps[-1] == (result.source_nbytes, result.source_nbytes)
    assert 8.5 < result.bits_per_weight < 9


def with_a_bad_weight(source: Path, folder: Path) -> str:
    """Copy a checkpoint and put a NaN into one of its experts."""
    shutil.copytree(source, folder)
    name = "model.layers.2.mlp.experts.5.up_proj.weight"
    tensors = load_file(folder / "model.safetensors")
    tensors[name][17, 3] = torch.nan
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return name


def test_a_bad_weight_is_named_and_leaves_no_file(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    name = with_a_bad_weight(checkpoints["qwen3_moe"], tmp_path / "bad")
    output = tmp_path / "out.gguf"
    output.write_bytes(b"what was there before")
    with pytest.raises(CheckpointError, match=rf"model\.safetensors: '{name}': .*row 17, column 3 is nan"):
        run(tmp_path / "bad", output, "Q4_K")
    assert output.read_bytes() == b"what was there before"
    assert [path.name for path in tmp_path.iterdir() if path.is_file()] == ["out.gguf"]


def test_outputs_that_cannot_be_written_are_refused_at_once(
    checkpoints: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = checkpoints["qwen3_moe"]
    with pytest.raises(ConfigError, match="does not exist"):
        run(source, tmp_path / "missing" / "out.gguf", "Q4_K")
    run(source, tmp_path / "first.gguf", "Q8_0")
    (tmp_path / "link.gguf").symlink_to(tmp_path / "first.gguf")
    for same in ("first.gguf", "link.gguf"):
        with pytest.raises(ConfigError, match="is read from"):
            run(tmp_path / "first.gguf", tmp_path / same, "Q4_K")
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(module.shutil, "disk_usage", lambda path: usage(10**9, 10**9 - 1000, 1000))
    with pytest.raises(ConfigError, match=r"1000 B free, .* too little"):
        run(source, tmp_path / "out.gguf", "Q4_K")
    assert not (tmp_path / "out.gguf").exists()


def test_formats_without_a_quantiser_are_refused(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(UnsupportedFormatError, match="IQ2_XXS can be read but not written: choose one of F32"):
        run(checkpoints["qwen3_moe"], tmp_path / "out.gguf", "IQ2_XXS")


def test_formats_that_gguf_lacks_are_refused_by_name(tmp_path: Path) -> None:
    """A published FP8 checkpoint can be quantised to another format, but not keep its own."""
    save_published(tmp_path, "qwen3_moe", "fp8-block")
    rules = tmp_path / "rules.yaml"
    rules.write_text("rules:\n  - match: {role: experts}\n    format: keep\n")
    checkpoint = open_checkpoint(tmp_path)
    with pytest.raises(UnsupportedFormatError, match=r"exps.*FP8 is a format of safetensors that GGUF files do not"):
        quantize_checkpoint(checkpoint, tmp_path / "out.gguf", get_format("Q8_0"), rules=load_plan(str(rules)))
    result = quantize_checkpoint(checkpoint, tmp_path / "out.gguf", get_format("Q8_0"))
    assert any("already FP8" in note for note in result.notes)
    assert all(info.format.in_gguf for info in open_checkpoint(tmp_path / "out.gguf").tensors.values())


def test_an_incomplete_checkpoint_is_refused(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    shutil.copytree(checkpoints["qwen3_moe"], tmp_path / "part")
    config = json.loads((tmp_path / "part" / "config.json").read_text())
    (tmp_path / "part" / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 4}))
    with pytest.raises(CheckpointError, match=r"lacks .* tensors of the model, among them model\.layers\.3"):
        run(tmp_path / "part", tmp_path / "out.gguf", "Q4_K")
