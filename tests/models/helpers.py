"""What the tests of this folder share: write a model's checkpoint, and put weights back into a stock model."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from moesaic.models import WeightMap, build_meta_model, build_weight_map, config_for, expert_modules, stock_experts
from moesaic.models.families import family_for
from moesaic.models.gguf_export import gguf_metadata, gguf_tensors
from moesaic.quant.formats import WeightFormat, get_format
from moesaic.quant.quantize import quantize
from moesaic.weights import Checkpoint, GgufWriter, open_checkpoint


def stock_from(checkpoint: Checkpoint, weight_map: WeightMap, config: PretrainedConfig) -> PreTrainedModel:
    """A stock eager model whose every weight was read through the references."""
    config._attn_implementation = "eager"
    model = AutoModelForCausalLM.from_config(config)
    state = {name: ref.read_float(checkpoint) for name, ref in weight_map.parameters.items()}
    for name, module in expert_modules(model).items():
        for key, values in stock_experts(module, weight_map.experts(name), checkpoint).items():
            state[f"{name}.{key}"] = values
    model.load_state_dict(state, strict=True)
    return model.eval()


def logits(model: PreTrainedModel, ids: torch.Tensor) -> torch.Tensor:
    """Logits of a forward without cache."""
    with torch.no_grad():
        return model(ids, use_cache=False).logits


def write_gguf(path: Path, folder: Path, matrices: WeightFormat | None = None) -> Path:
    """Write the safetensors model in `folder` as GGUF, F32 or with its matrices in a format that divides their rows."""
    checkpoint = open_checkpoint(folder)
    config = config_for(checkpoint)
    model = build_meta_model(config)
    outputs = gguf_tensors(model, build_weight_map(model, checkpoint))
    float32 = get_format("F32")
    formats = {
        output.name: matrices
        if matrices is not None and len(output.shape) > 1 and output.shape[-1] % matrices.block_size == 0
        else float32
        for output in outputs
    }
    with GgufWriter(path, family_for(config.model_type).architecture) as writer:
        writer.add_metadata(gguf_metadata(config))
        for output in outputs:
            writer.declare(output.name, formats[output.name], output.shape)
        for output in outputs:
            for ref in output.parts:
                values = ref.read_float(checkpoint).reshape(-1, output.shape[-1]).numpy()
                writer.write(output.name, quantize(values, formats[output.name]))
    checkpoint.close()
    return path
