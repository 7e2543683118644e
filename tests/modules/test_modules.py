"""Replacements of single modules against the stock modules that they replace, on random weights in float32."""

from __future__ import annotations

import copy

import pytest
import torch
from tests.tiny_models import FAMILIES, make_tiny_model
from torch import nn

from moesaic.errors import UnsupportedModelError
from moesaic.kernels import PackedTensor
from moesaic.modules import FAMILIES as KNOWN
from moesaic.modules import PackedEmbedding, PackedLinear, RMSNorm, activation_of
from moesaic.modules.router import RouterForward
from moesaic.quant import get_format, quantize


def _packed(values: torch.Tensor, name: str = "F32") -> PackedTensor:
    fmt = get_format(name)
    packed = PackedTensor.empty(fmt, *values.shape)
    packed.pack_(0, quantize(values.numpy(), fmt))
    return packed


def _random(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(5, 64), (2, 3, 64), (64,)])
def test_linear(bias: bool, shape: tuple[int, ...]) -> None:
    stock = nn.Linear(64, 37, bias=bias)
    ours = PackedLinear(_packed(stock.weight.detach()), stock.bias.detach() if bias else None)
    x = _random(*shape)
    torch.testing.assert_close(ours(x), stock(x), rtol=1e-5, atol=1e-6)
    assert not list(PackedLinear(_packed(stock.weight.detach())).parameters())  # nothing that a cast could expand


def test_embedding_reads_the_packed_rows() -> None:
    values = _random(40, 256)
    ours = PackedEmbedding(_packed(values, "Q6_K"))
    ids = torch.tensor([[3, 39, 0], [3, 3, 17]])
    assert torch.equal(ours(ids), ours.packed.dequantize()[0][ids])


class _Plain(nn.Module):
    """The RMSNorm of Llama, Qwen3 and most others."""

    def __init__(self, dim: int, offset: float = 0.0) -> None:
        super().__init__()
        self.weight = nn.Parameter(_random(dim))
        self.variance_epsilon, self._offset = 1e-5, offset

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5) * (self.weight + self._offset)


class TinyRMSNorm(_Plain):
    pass


class TinyOneRMSNorm(_Plain):
    def __init__(self, dim: int) -> None:
        super().__init__(dim, 1.0)


class TinyOddRMSNorm(_Plain):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) * 1.1


@pytest.mark.parametrize("kind", [TinyRMSNorm, TinyOneRMSNorm])
def test_norm_takes_the_form_that_the_stock_class_has(kind: type[nn.Module]) -> None:
    stock = kind(48)
    ours = RMSNorm.from_stock(stock)
    assert ours is not None
    x = _random(2, 7, 48)
    torch.testing.assert_close(ours(x), stock(x), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("stock", [TinyOddRMSNorm(48), nn.LayerNorm(48)])
def test_unknown_norms_stay_stock(stock: nn.Module) -> None:
    assert RMSNorm.from_stock(stock) is None


@pytest.mark.parametrize("family", FAMILIES)
def test_router(family: str) -> None:
    """Experts in any order, weights and logits of the stock router; its weight is held once."""
    model = make_tiny_model(family)
    block, router = next(
        (module, getattr(module, key))
        for module in model.modules()
        for key in ("gate", "router")
        if hasattr(module, "experts") and hasattr(module, key)
    )
    stock, correction = copy.deepcopy(router), getattr(block, "e_score_correction_bias", None)
    RouterForward.take_over(router, block, KNOWN[family].routing(router, model.config))
    x = _random(50, 256)
    extra = () if correction is None or family != "minimax_m2" else (correction,)
    with torch.no_grad():
        results, stock_results = router(x, *extra), stock(x, *extra)
    assert [result.dtype for result in results] == [result.dtype for result in stock_results]
    if not results[0].is_floating_point():  # Granite in transformers 5.17: experts first
        results, stock_results = results[::-1], stock_results[::-1]
    (logits, weights, index), (stock_logits, stock_weights, stock_index) = results, stock_results
    torch.testing.assert_close(logits, stock_logits, rtol=1e-4, atol=1e-5)
    order, stock_order = index.argsort(-1), stock_index.argsort(-1)
    assert torch.equal(index.gather(1, order), stock_index.gather(1, stock_order))
    torch.testing.assert_close(weights.gather(1, order), stock_weights.gather(1, stock_order), rtol=1e-4, atol=1e-6)
    assert all(parameter.ndim < 2 for parameter in router.parameters() if parameter.shape[0] != 1)


def test_unknown_activation_is_refused() -> None:
    class Experts(nn.Module):
        act_fn = nn.Tanh()

    with pytest.raises(UnsupportedModelError, match=r"model\.layers\.0\.mlp\.experts.*Tanh.*transformers"):
        activation_of(Experts(), "model.layers.0.mlp.experts")
