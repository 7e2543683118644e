"""The last steps of a load: connects a model whose weights are in place to the native forwards and to `generate()`.

The result is an instance of the stock class (a subclass of the same name), so everything that takes a `PreTrainedModel`
takes it. This module knows no files.
"""

from __future__ import annotations

import contextlib
from typing import Any

from transformers import PreTrainedModel

from moesaic.engine.torch_threads import one_torch_thread
from moesaic.errors import UnsupportedModelError
from moesaic.kvcache import CACHE_ARGUMENT, GrowingCache, given_cache
from moesaic.modules import (
    ATTENTION_NAME,
    FAMILIES,
    DecoderLayerForward,
    LayerStack,
    RMSNorm,
    RotaryAngles,
    SharedState,
    is_delta_net,
    keep_stock_attention,
    register_attention,
    take_over_mla,
)
from moesaic.placement import Plan

__all__ = ["finish_model"]


class _MoesaicCausalLM:
    """What a loaded model does differently from its stock class, in front of which this one is put."""

    _shared_state: SharedState | None
    _all_layers_fused: bool

    def set_attn_implementation(self, attn_implementation: Any, *args: Any, **kwargs: Any) -> None:
        """As in transformers; layers are fused only while the implementation is "moesaic"."""
        super().set_attn_implementation(attn_implementation, *args, **kwargs)  # type: ignore[misc]
        if self._shared_state is not None:
            self._shared_state.fused = attn_implementation == ATTENTION_NAME

    def save_pretrained(self, *args: Any, **kwargs: Any) -> None:
        """Refused: packed weights are no parameters, so that what transformers would write lacks them.

        Raises:
            UnsupportedModelError: always, saying what to do instead.
        """
        raise UnsupportedModelError(
            "a model on packed weights cannot be saved by transformers: copy its checkpoint, or write another format "
            "with `moesaic quantize MODEL OUT.gguf --format F`."
        )

    def new_cache(self) -> Any:
        """The cache that `generate()` uses by default, empty; it may be kept and passed to later calls."""
        return GrowingCache(self.config)  # type: ignore[attr-defined]

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """As `transformers.GenerationMixin.generate`; the cache is `new_cache()` unless another one is asked for."""
        if _uses_default_cache(self, kwargs):
            kwargs[CACHE_ARGUMENT] = self.new_cache()
        with one_torch_thread() if self._all_layers_fused else contextlib.nullcontext():
            return super().generate(*args, **kwargs)  # type: ignore[misc]


def _uses_default_cache(model: Any, kwargs: dict[str, Any]) -> bool:
    """Whether a call of `generate()` leaves the cache to the library."""
    if given_cache(kwargs) is not None or kwargs.get("assistant_model") is not None:
        return False
    if not model._supports_default_dynamic_cache():
        return False
    settings = (kwargs, vars(kwargs.get("generation_config") or model.generation_config))
    return all(
        chosen.get("use_cache") is not False
        and chosen.get("cache_implementation") is None
        and chosen.get("prompt_lookup_num_tokens") is None
        for chosen in settings
    )


def finish_model(model: PreTrainedModel, plan: Plan) -> PreTrainedModel:
    """Connect a loaded model to the kernels.

    Args:
        model: all its tensors have values; it is changed in place.
        plan: which modules stay stock.
    """
    register_attention()
    model.set_attn_implementation(ATTENTION_NAME)
    for name, module in list(model.named_modules()):
        if name not in plan:
            continue
        placement = plan.of(name)
        if placement.implementation == "transformers":
            if placement.role == "attention" and hasattr(module, "is_causal"):
                keep_stock_attention(module)
        elif placement.role == "norm":
            norm = RMSNorm.from_stock(module)
            if norm is not None:
                model.set_submodule(name, norm)
    model._shared_state, model._all_layers_fused = _take_over_layers(model, plan)
    stock_class = type(model)
    model.__class__ = type(stock_class.__name__, (_MoesaicCausalLM, stock_class), {})
    model.requires_grad_(False)
    return model.eval()


def _take_over_layers(model: PreTrainedModel, plan: Plan) -> tuple[SharedState | None, bool]:
    """Fuse the decoder layers of a known family; of a layer with stock parts only its latent attention, if any.

    Returns:
        What the layers share, if the family is known, and whether all of them are fused.
    """
    family = FAMILIES.get(model.config.model_type)
    if family is None:
        return None, False
    decoder = model.get_decoder()
    decoder_name = next(name for name, module in model.named_modules() if module is decoder)
    shared = SharedState(RotaryAngles(decoder.rotary_emb.inv_freq.shape[0]))
    stock = [entry.module for entry in plan.entries if entry.implementation == "transformers"]
    shared.has_stock_parts = any(
        name.startswith(f"{decoder_name}.layers.") and not is_delta_net(model.get_submodule(name.rpartition(".")[0]))
        for name in stock
    )
    num_fused = 0
    for index, layer in enumerate(decoder.layers):
        name = f"{decoder_name}.layers.{index}"
        if not any(module.startswith(f"{name}.") for module in stock):
            num_fused += DecoderLayerForward.take_over(layer, family, model.config, shared, name)
        elif hasattr(layer, "self_attn") and f"{name}.self_attn" not in stock:
            take_over_mla(layer, family, model.config, shared)
    all_fused = num_fused == len(decoder.layers)
    if all_fused:
        shared.stack = LayerStack([layer.forward for layer in decoder.layers])
    return shared, all_fused
