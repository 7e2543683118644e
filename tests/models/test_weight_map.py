"""Every stock parameter of every family is fed: safetensors and GGUF give the logits of stock transformers."""

from __future__ import annotations

import json
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.models.helpers import logits, stock_from, write_gguf
from tests.tiny_models import ALL_FAMILIES, save_tiny, tiny_inputs

from moesaic.errors import CheckpointError, UnsupportedModelError
from moesaic.models import build_meta_model, build_weight_map, config_for, expert_modules
from moesaic.quant.formats import get_format
from moesaic.weights import GgufWriter, open_checkpoint


@pytest.mark.parametrize("family", ALL_FAMILIES)
def test_safetensors_feed_every_parameter(family: str, tmp_path: Path) -> None:
    stock = save_tiny(tmp_path, family)
    checkpoint = open_checkpoint(tmp_path)
    config = config_for(checkpoint)
    weight_map = build_weight_map(build_meta_model(config), checkpoint)
    assert weight_map.missing == () and weight_map.unused == ()
    ours = stock_from(checkpoint, weight_map, config)
    for name, values in stock.state_dict().items():
        assert torch.equal(ours.state_dict()[name], values), name
    assert torch.equal(logits(ours, tiny_inputs()), logits(stock, tiny_inputs()))


@pytest.mark.parametrize("family", ALL_FAMILIES)
def test_gguf_feeds_every_parameter(family: str, tmp_path: Path) -> None:
    stock = save_tiny(tmp_path, family)
    checkpoint = open_checkpoint(write_gguf(tmp_path / "model.gguf", tmp_path))
    config = config_for(checkpoint)
    weight_map = build_weight_map(build_meta_model(config), checkpoint)
    assert weight_map.missing == () and weight_map.unused == ()
    ours = stock_from(checkpoint, weight_map, config)
    for name, values in stock.state_dict().items():  # norms of qwen3_next are stored as x + 1, its decay as exp(x)
        assert torch.allclose(ours.state_dict()[name], values, rtol=0, atol=2e-7), name
    expected = logits(stock, tiny_inputs())
    assert (logits(ours, tiny_inputs()) - expected).abs().max() <= 1e-5 * expected.abs().max()


@pytest.mark.parametrize("family", ALL_FAMILIES)
def test_config_survives_gguf(family: str, tmp_path: Path) -> None:
    stock = save_tiny(tmp_path, family)
    checkpoint = open_checkpoint(write_gguf(tmp_path / "model.gguf", tmp_path))
    expected, found = stock.config.to_dict(), config_for(checkpoint).to_dict()
    # Not in the metadata but in the tokenizer's part; or derived (Mixtral's and Granite's default is None).
    ignored = {"transformers_version", "architectures", "dtype", "bos_token_id", "eos_token_id", "pad_token_id"}
    ignored |= {"head_dim"} if family in ("mixtral", "granitemoe") else set()
    different = {key for key in expected | found if expected.get(key) != found.get(key)} - ignored
    assert not different


@pytest.mark.parametrize("family", ["mixtral", "deepseek_v3", "gpt_oss", "qwen3_next"])
def test_quantised_rows_keep_their_bits(family: str, tmp_path: Path) -> None:
    """Permuted and stacked rows: the raw blocks, read by gguf's own dequantiser, are what `read_float` says."""
    save_tiny(tmp_path, family)
    checkpoint = open_checkpoint(write_gguf(tmp_path / "model.gguf", tmp_path, get_format("Q8_0")))
    model = build_meta_model(config_for(checkpoint))
    weight_map = build_weight_map(model, checkpoint)
    refs = [ref for ref in weight_map.parameters.values() if ref.format.is_quantized]
    refs += [ref for name in weight_map.expert_modules for ref in weight_map.experts(name).up]
    assert any(ref.rows is not None for ref in refs) or family in ("deepseek_v3", "gpt_oss")
    for ref in refs:
        raw = ref.read_raw(checkpoint)
        assert raw.nbytes == ref.nbytes
        expected = gguf.quants.dequantize(np.ascontiguousarray(raw), gguf.GGMLQuantizationType.Q8_0)
        assert np.array_equal(expected.reshape(ref.shape), ref.read_float(checkpoint).numpy()), ref.name


def test_mla_halves_absorb(tmp_path: Path) -> None:
    """`k_b` and `v_b` of a GGUF are the parts of `kv_b_proj` that absorption multiplies with."""
    stock = save_tiny(tmp_path, "deepseek_v3")
    checkpoint = open_checkpoint(write_gguf(tmp_path / "model.gguf", tmp_path))
    config = config_for(checkpoint)
    refs = build_weight_map(build_meta_model(config), checkpoint).mla("model.layers.1.self_attn")
    assert refs is not None and len(refs.k_b) == len(refs.v_b) == config.num_attention_heads
    kv_b = stock.model.layers[1].self_attn.kv_b_proj.weight.detach()
    kv_b = kv_b.reshape(config.num_attention_heads, -1, config.kv_lora_rank)
    for head in range(config.num_attention_heads):
        assert torch.equal(refs.k_b[head].read_float(checkpoint), kv_b[head, : config.qk_nope_head_dim].T)
        assert torch.equal(refs.v_b[head].read_float(checkpoint), kv_b[head, config.qk_nope_head_dim :])


def test_old_gguf_with_whole_kv_b(tmp_path: Path) -> None:
    """Files from before 2025 hold `attn_kv_b` as it is, and key lengths of the decompressed heads."""
    stock = save_tiny(tmp_path / "hf", "deepseek_v2")
    new = open_checkpoint(write_gguf(tmp_path / "new.gguf", tmp_path / "hf"))
    writer = gguf.GGUFWriter(tmp_path / "old.gguf", "deepseek2")
    dropped = ("key_length_mla", "value_length_mla", "expert_gating_func", "vocab_size")
    lengths = {"deepseek2.attention.key_length": 96, "deepseek2.attention.value_length": 64}
    for key, value in (dict(new.metadata) | lengths).items():
        if key.startswith("deepseek2.") and not key.endswith(dropped):
            add = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}
            add[type(value)](key, value)
    for name, info in new.tensors.items():
        if "attn_k_b" not in name and "attn_v_b" not in name:
            writer.add_tensor(name, new.raw(name).view(np.float32).reshape(info.shape))
    for layer, block in enumerate(stock.model.layers):
        writer.add_tensor(f"blk.{layer}.attn_kv_b.weight", block.self_attn.kv_b_proj.weight.detach().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    checkpoint = open_checkpoint(tmp_path / "old.gguf")
    config = config_for(checkpoint)
    weight_map = build_weight_map(build_meta_model(config), checkpoint)
    assert weight_map.missing == () and weight_map.mla("model.layers.1.self_attn") is None
    assert torch.equal(logits(stock_from(checkpoint, weight_map, config), tiny_inputs()), logits(stock, tiny_inputs()))


def test_fused_gguf_tensors(tmp_path: Path) -> None:
    """Newer converters may fuse q, k, v, and gate with up."""
    stock = save_tiny(tmp_path / "hf", "qwen2_moe")
    plain = open_checkpoint(write_gguf(tmp_path / "plain.gguf", tmp_path / "hf"))
    floats = {name: plain.raw(name).view(np.float32).reshape(info.shape) for name, info in plain.tensors.items()}
    for layer in range(stock.config.num_hidden_layers):
        for suffix in ("weight", "bias"):
            parts = [floats.pop(f"blk.{layer}.attn_{which}.{suffix}") for which in "qkv"]
            floats[f"blk.{layer}.attn_qkv.{suffix}"] = np.concatenate(parts)
        parts = [floats.pop(f"blk.{layer}.ffn_{which}_exps.weight") for which in ("gate", "up")]
        floats[f"blk.{layer}.ffn_gate_up_exps.weight"] = np.concatenate(parts, axis=1)
    with GgufWriter(tmp_path / "fused.gguf", "qwen2moe") as writer:
        writer.add_metadata({key: value for key, value in plain.metadata.items() if key.startswith("qwen2moe.")})
        for name, values in floats.items():
            writer.declare(name, get_format("F32"), values.shape)
        for name, values in floats.items():
            writer.write(name, values.view(np.uint8))
    checkpoint = open_checkpoint(tmp_path / "fused.gguf")
    config = config_for(checkpoint)
    weight_map = build_weight_map(build_meta_model(config), checkpoint)
    assert weight_map.missing == () and weight_map.unused == ()
    assert torch.equal(logits(stock_from(checkpoint, weight_map, config), tiny_inputs()), logits(stock, tiny_inputs()))


def test_extra_layers_are_reported_as_unused(tmp_path: Path) -> None:
    """Multi-token prediction layers behind the last one feed nothing."""
    save_tiny(tmp_path, "deepseek_v3")
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["model.layers.3.eh_proj.weight"] = torch.zeros(256, 512)
    save_file(tensors, tmp_path / "model.safetensors")
    checkpoint = open_checkpoint(tmp_path)
    weight_map = build_weight_map(build_meta_model(config_for(checkpoint)), checkpoint)
    assert weight_map.missing == ()
    assert weight_map.unused == ("model.layers.3.eh_proj.weight",)


def test_gguf_counts_extra_layers(tmp_path: Path) -> None:
    """GLM-4.5's files count their multi-token prediction layer as a block; its end tokens are several."""
    stock = save_tiny(tmp_path, "glm4_moe")
    plain = open_checkpoint(write_gguf(tmp_path / "plain.gguf", tmp_path))
    extra = {
        "glm4moe.block_count": 4,
        "glm4moe.nextn_predict_layers": 1,
        "tokenizer.ggml.bos_token_id": 3,
        "tokenizer.ggml.eos_token_id": 5,
        "tokenizer.ggml.eot_token_id": 6,
        "tokenizer.ggml.eom_token_id": 5,
    }
    with GgufWriter(tmp_path / "mtp.gguf", "glm4moe") as writer:
        writer.add_metadata({key: plain.metadata[key] for key in plain.metadata if key.startswith("glm4moe.")} | extra)
        for name, info in plain.tensors.items():
            writer.declare(name, info.format, info.shape)
        writer.declare("blk.3.nextn.eh_proj.weight", get_format("F32"), (256, 512))
        for name in plain.tensors:
            writer.write(name, plain.raw(name))
        writer.write("blk.3.nextn.eh_proj.weight", np.zeros((256, 2048), np.uint8))
    checkpoint = open_checkpoint(tmp_path / "mtp.gguf")
    config = config_for(checkpoint)
    assert (config.num_hidden_layers, config.bos_token_id, config.eos_token_id) == (3, 3, [5, 6])
    weight_map = build_weight_map(build_meta_model(config), checkpoint)
    assert weight_map.missing == () and weight_map.unused == ("blk.3.nextn.eh_proj.weight",)
    assert torch.equal(logits(stock_from(checkpoint, weight_map, config), tiny_inputs()), logits(stock, tiny_inputs()))


@pytest.mark.parametrize("lost", ["model.norm.weight", "model.layers.1.mlp.gate.e_score_correction_bias"])
def test_missing_parameters_are_named(lost: str, tmp_path: Path) -> None:
    save_tiny(tmp_path, "deepseek_v3")
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors[lost]
    save_file(tensors, tmp_path / "model.safetensors")
    checkpoint = open_checkpoint(tmp_path)
    weight_map = build_weight_map(build_meta_model(config_for(checkpoint)), checkpoint)
    assert weight_map.missing == (lost,)
    with pytest.raises(CheckpointError, match=lost):
        weight_map.parameter(lost)


def test_a_missing_expert_is_an_error(tmp_path: Path) -> None:
    save_tiny(tmp_path, "qwen3_moe")
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["model.layers.1.mlp.experts.5.up_proj.weight"]
    save_file(tensors, tmp_path / "model.safetensors")
    checkpoint = open_checkpoint(tmp_path)
    with pytest.raises(CheckpointError, match=r"layers\.1\.mlp\.experts.*7 experts with 'up': expected 8"):
        build_weight_map(build_meta_model(config_for(checkpoint)), checkpoint)


def test_shapes_are_compared_with_the_model(tmp_path: Path) -> None:
    save_tiny(tmp_path, "olmoe")
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["model.layers.0.self_attn.q_proj.weight"] = torch.zeros(128, 256)
    save_file(tensors, tmp_path / "model.safetensors")
    checkpoint = open_checkpoint(tmp_path)
    with pytest.raises(CheckpointError, match=r"q_proj\.weight.*\[128, 256\].*wants \[256, 256\]"):
        build_weight_map(build_meta_model(config_for(checkpoint)), checkpoint)


def test_stock_names_are_accepted(tmp_path: Path) -> None:
    """A checkpoint may also hold the modules' own names, with stacked experts."""
    stock = save_tiny(tmp_path, "qwen3_moe")
    save_file({name: values.clone() for name, values in stock.state_dict().items()}, tmp_path / "model.safetensors")
    checkpoint = open_checkpoint(tmp_path)
    config = config_for(checkpoint)
    weight_map = build_weight_map(build_meta_model(config), checkpoint)
    assert weight_map.missing == ()
    assert torch.equal(logits(stock_from(checkpoint, weight_map, config), tiny_inputs()), logits(stock, tiny_inputs()))


def test_expert_refs_are_rows_times_k(tmp_path: Path) -> None:
    """Whatever the arrangement (gpt-oss: interleaved and transposed), `y = W x` per expert."""
    stock = save_tiny(tmp_path, "gpt_oss", dtype=torch.bfloat16)
    checkpoint = open_checkpoint(tmp_path)
    model = build_meta_model(config_for(checkpoint))
    weight_map = build_weight_map(model, checkpoint)
    for name in expert_modules(model):
        refs, module = weight_map.experts(name), stock.get_submodule(name)
        for expert in range(refs.num_experts):
            fused = module.gate_up_proj[expert].detach()
            assert refs.gate is not None and refs.gate_bias is not None
            assert refs.gate[expert].format.name == "BF16"
            assert torch.equal(refs.gate[expert].read_float(checkpoint), fused[:, 0::2].T.float())
            assert torch.equal(refs.up[expert].read_float(checkpoint), fused[:, 1::2].T.float())
            assert torch.equal(refs.down[expert].read_float(checkpoint), module.down_proj[expert].detach().T.float())
            assert torch.equal(
                refs.gate_bias[expert].read_float(checkpoint), module.gate_up_proj_bias[expert, 0::2].detach().float()
            )
            raw = torch.from_numpy(refs.up[expert].read_raw(checkpoint).copy()).view(torch.bfloat16)
            assert torch.equal(raw, fused[:, 1::2].T)


def test_unknown_architectures_are_refused_by_name(tmp_path: Path) -> None:
    save_tiny(tmp_path, "olmoe")
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"model_type": "no_such_model"}))
    with pytest.raises(UnsupportedModelError, match="no_such_model"):
        config_for(open_checkpoint(tmp_path))
