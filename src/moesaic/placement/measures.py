"""What the modules of a stock model take: bytes of tensors, of a cached position, floats of a step's activations.

Sizes are read from shapes and from the attributes that transformers' modules have. It knows no rules and no budget.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from moesaic import _native
from moesaic.kvcache.states import StateShape
from moesaic.modules.delta_net import is_delta_net
from moesaic.placement.vram import StepSizes
from moesaic.quant import WeightFormat

if TYPE_CHECKING:
    import torch
    from torch import nn
    from transformers import PreTrainedModel

__all__ = ["FLOAT_BYTES", "cache_bytes", "own_tensors", "packed_bytes", "state_bytes", "step_sizes"]

FLOAT_BYTES = 4  # vectors, and everything that stays a torch tensor, are float32
_BF16_BYTES = 2


def own_tensors(module: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Parameters and persistent buffers of the module itself."""
    yield from module.named_parameters(recurse=False, remove_duplicate=False)
    for key, buffer in module.named_buffers(recurse=False, remove_duplicate=False):
        if key not in module._non_persistent_buffers_set:
            yield key, buffer


def packed_bytes(fmt: WeightFormat, shape: tuple[int, ...]) -> int:
    """Bytes of matrices `[..., rows, cols]` in the packed layout."""
    *leading, rows, cols = shape
    return math.prod(leading) * int(_native.packed_nbytes(fmt.ggml_type, rows, cols))


def cache_bytes(attention: Any, implementation: str, device: str) -> int:
    """Bytes of cache per position: MLA's latent and rotary key, or keys and values; 0 for linear attention.

    States are float32 on the CPU and bfloat16 on a GPU. The stock MLA caches the expanded keys and values of all heads.
    """
    size = _BF16_BYTES if device == "gpu" else FLOAT_BYTES
    if hasattr(attention, "kv_lora_rank"):
        if implementation == "moesaic":
            return int(attention.kv_lora_rank + attention.qk_rope_head_dim) * size
        heads = attention.config.num_attention_heads
        return int(heads * (attention.qk_head_dim + attention.v_head_dim)) * size
    projections = (getattr(attention, "k_proj", None), getattr(attention, "v_proj", None))
    return sum(int(p.weight.shape[0]) * size for p in projections if p is not None)


def state_bytes(attention: Any) -> int:
    """Bytes of recurrent state per sequence, in float32: of linear attention, 0 for any other."""
    shape = _state_shape(attention)
    return 0 if shape is None else shape.nbytes


def _state_shape(attention: Any) -> StateShape | None:
    if not is_delta_net(attention):
        return None
    channels, _, taps = attention.conv1d.weight.shape
    return StateShape(taps - 1, channels, attention.num_v_heads, attention.head_k_dim, attention.head_v_dim)


def step_sizes(model: PreTrainedModel, roles: Mapping[str, str], top_k: int, intermediate: int) -> StepSizes:
    """Widths of a step's activations.

    Args:
        model: the stock model on the meta device.
        roles: of its modules.
        top_k: routed experts of a token.
        intermediate: their width between up and down.
    """
    config = model.config.get_text_config()
    hidden = int(config.hidden_size)
    widths, latents, largest = {"attention": 0, "mlp": 0, "shared_experts": 0}, (0, 0), 0
    moe_blocks = {name.rpartition(".")[0] for name, role in roles.items() if role == "experts"}
    for name, module in model.named_modules():
        role = roles[name]
        if role in widths and roles[name.rpartition(".")[0]] != role and name not in moe_blocks:
            width = _attention_width(module) if role == "attention" else _outputs(module)
            widths[role] = max(widths[role], width)
            largest = max([largest, *(linear.weight.numel() for linear in _linears(module))])
            if hasattr(module, "kv_lora_rank"):
                latents = int(module.num_heads), int(module.kv_lora_rank)
    experts = top_k * (2 * intermediate + hidden)  # gate, up and output of every choice
    widest = max(widths["mlp"], widths["shared_experts"] + experts)
    head = getattr(config, "qk_rope_head_dim", None) or getattr(config, "head_dim", None)
    rotary = 2 * int(head or hidden // config.num_attention_heads)  # cosines and sines
    longest = getattr(config, "max_position_embeddings", None)
    longest = longest if isinstance(longest, int) and longest > 0 else 0
    return StepSizes(
        hidden, top_k, int(config.vocab_size), widest, rotary, longest, widths["attention"], *latents, largest
    )


def _outputs(module: Any) -> int:
    """Outputs of the matrices inside a block, the last of which gives the block's own."""
    return sum(int(linear.weight.shape[0]) for linear in _linears(module)[:-1])


def _linears(module: Any) -> list[Any]:
    return [child for child in module.modules() if type(child).__name__ == "Linear"]


def _attention_width(attention: Any) -> int:
    """Floats per token: outputs of the projections and input of the last.

    Of MLA without queries and sums on the latents (see `StepSizes`). Linear attention: what its convolution gives too.
    """
    shape = _state_shape(attention)
    if shape is not None:
        return _outputs(attention) + shape.conv_channels + shape.heads * shape.value_dim
    last = getattr(attention, "o_proj", None)
    width = _outputs(attention) + (int(last.weight.shape[1]) if last is not None else 0)
    if hasattr(attention, "kv_lora_rank"):
        # kv_b_proj is absorbed: its outputs never exist.
        width += int(attention.num_heads) * int(attention.qk_rope_head_dim)
        width -= int(attention.kv_b_proj.weight.shape[0])
    return width
