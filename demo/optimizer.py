"""Muon for matrices, Adam for the rest (embedding, head, norms, router).

Muon (Jordan et al. 2024) replaces a matrix's momentum by its nearest semi-orthogonal matrix, found by Newton-Schulz
iteration; the step is scaled so that its root mean square is 0.2 of the learning rate, as Adam's roughly is (Liu et al.
2025, arXiv:2502.16982). Matrices of one shape are stepped as one stack, and each expert is a matrix of its own.
"""

from __future__ import annotations

from collections import defaultdict

import torch
from torch import Tensor, nn

__all__ = ["Optimizer"]

_NS_COEFFICIENTS = (3.4445, -4.7750, 2.0315)
_NS_STEPS = 5
_MOMENTUM = 0.95
_ADAM_BETAS = (0.9, 0.98)


def _orthogonalize(stack: Tensor) -> Tensor:
    """The nearest semi-orthogonal matrices to a stack [n, rows, cols], about."""
    a, b, c = _NS_COEFFICIENTS
    x = stack.bfloat16() if stack.is_cuda else stack  # bf16 is enough, and fast where the chip has it
    tall = x.shape[-2] > x.shape[-1]
    x = x.mT if tall else x
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(_NS_STEPS):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    result: Tensor = (x.mT if tall else x).float()
    return result


def _matrices_of(name: str, parameter: Tensor) -> Tensor:
    """A parameter as a stack of the matrices that Muon steps one by one; fused gate and up are two."""
    if name.endswith("gate_up_proj"):
        return parameter.view(-1, parameter.shape[-2] // 2, parameter.shape[-1])
    return parameter.view(-1, parameter.shape[-2], parameter.shape[-1])


class Optimizer:
    """Steps all parameters of `model`; `step(scale)` multiplies every learning rate by `scale`.

    Args:
        model: the model, parameters in float32.
        muon_lr, adam_lr: peak learning rates.
        weight_decay: decoupled decay of the matrices, per unit of learning rate.
    """

    def __init__(self, model: nn.Module, muon_lr: float, adam_lr: float, weight_decay: float) -> None:
        self.muon_lr, self.weight_decay = muon_lr, weight_decay
        groups: defaultdict[tuple[int, int], list[tuple[str, nn.Parameter]]] = defaultdict(list)
        rest = []
        for name, parameter in model.named_parameters():
            if parameter.ndim < 2 or "embed_tokens" in name or "lm_head" in name or name.endswith("gate.weight"):
                rest.append(parameter)
            else:
                rows, cols = _matrices_of(name, parameter).shape[-2:]
                groups[(rows, cols)].append((name, parameter))
        self._groups = list(groups.values())
        self._momentum = [torch.cat([torch.zeros_like(_matrices_of(n, p)) for n, p in group]) for group in self._groups]
        self._adam = torch.optim.Adam(rest, lr=adam_lr, betas=_ADAM_BETAS, eps=1e-10, fused=rest[0].is_cuda)
        self._adam_lr = adam_lr
        self._rest = rest

    @torch.no_grad()
    def step(self, scale: float) -> None:
        """One step from the accumulated gradients, which are then cleared."""
        for group, momentum in zip(self._groups, self._momentum, strict=True):
            gradient = torch.cat([_matrices_of(n, p.grad) for n, p in group if p.grad is not None])
            momentum.lerp_(gradient, 1 - _MOMENTUM)
            update = _orthogonalize(gradient.lerp_(momentum, _MOMENTUM))
            lr = self.muon_lr * scale
            step = update.mul_(-lr * 0.2 * max(update.shape[-2:]) ** 0.5)
            start = 0
            for name, parameter in group:
                target = _matrices_of(name, parameter)
                target.mul_(1 - lr * self.weight_decay).add_(step[start : start + len(target)])
                start += len(target)
                parameter.grad = None
        nn.utils.clip_grad_norm_(self._rest, 1.0)
        for adam_group in self._adam.param_groups:
            adam_group["lr"] = self._adam_lr * scale
        self._adam.step()
        self._adam.zero_grad(set_to_none=True)
