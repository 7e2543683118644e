"""The last steps of a load: connects a model whose weights are in place to the native forwards and to `generate()`.

The result is an instance of the stock class (a subclass of the same name), so everything that takes a `PreTrainedModel`
takes it. This module knows no files.
"""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedModel

from moesaic.kvcache import GrowingCache
from moesaic.modules import (
    ATTENTION_NAME,
    FAMILIES,
    DecoderLayerForward,
    RMSNorm,
    keep_stock_attention,
    register_attention,
)
from moesaic.placement import Plan

__all__ = ["finish_model"]


class _GrowingCacheGeneration:
    """Lets `generate()` use a growing cache where it would make a dynamic one."""

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """As `transformers.GenerationMixin.generate`; the cache is a `GrowingCache` unless another one is asked for."""
        if _uses_default_cache(self, kwargs):
            kwargs["past_key_values"] = GrowingCache(self.config)  # type: ignore[attr-defined]
        return super().generate(*args, **kwargs)  # type: ignore[misc]


def _uses_default_cache(model: Any, kwargs: dict[str, Any]) -> bool:
    """Whether a call of `generate()` leaves the cache to the library."""
    if kwargs.get("past_key_values") is not None or kwargs.get("assistant_model") is not None:
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
    _take_over_layers(model, plan)
    stock_class = type(model)
    model.__class__ = type(stock_class.__name__, (_GrowingCacheGeneration, stock_class), {})
    model.requires_grad_(False)
    return model.eval()


def _take_over_layers(model: PreTrainedModel, plan: Plan) -> None:
    """Fuse the decoder layers of a known family, apart from those of which a part stays stock."""
    family = FAMILIES.get(model.config.model_type)
    if family is None:
        return
    stock = {entry.module for entry in plan.entries if entry.implementation == "transformers"}
    decoder = model.get_decoder()
    num_pairs = decoder.rotary_emb.inv_freq.shape[0]
    for index, layer in enumerate(decoder.layers):
        name = f"model.layers.{index}"
        if not any(module.startswith(f"{name}.") for module in stock):
            DecoderLayerForward.take_over(layer, family, model.config, num_pairs, name)
