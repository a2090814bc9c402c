"""The ternary rule of models that are trained from scratch: absmean, one scale a matrix (TriLM).

Source: Spectra (Kaushal et al. 2024, arXiv 2407.12327 v5, full text). The scale is not learned: it
is taken anew from the latent weight ``[out, in]`` in every forward pass.
"""

from typing import Any

import torch
from torch import Tensor

from ternq.ternary import TernaryWeight, n_groups

EPSILON = 1e-5


def scale(weight: Tensor) -> Tensor:
    """``1e-5 + mean |w|`` over the whole matrix: no dimensions."""
    return EPSILON + weight.abs().mean()


def quantize(weight: Tensor) -> Tensor:
    """``round(clip(w / scale, -1, 1))``, in the dtype of ``weight``: 0 up to half the scale.

    >>> quantize(torch.tensor([[1.0, -2.0, 0.1, 0.0]])).tolist()
    [[1.0, -1.0, 0.0, 0.0]]
    """
    return (weight / scale(weight)).clamp(-1, 1).round()


def scales(weight: Tensor, group_size: int) -> Tensor:
    """The scale as ternq stores it, once for every group of every row: ``[out, groups]``."""
    rows, columns = weight.shape
    return scale(weight).repeat(rows, n_groups(columns, group_size))


def numbers(weight: Tensor, group_size: int) -> TernaryWeight:
    """The ternary weight of a latent one."""
    codes = quantize(weight).to(torch.int8)
    return TernaryWeight(codes, scales(weight, group_size), None, group_size)


class _FakeQuantize(torch.autograd.Function):
    """`fake_quantize` with its straight-through gradient."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor) -> Tensor:
        return scale(weight) * quantize(weight)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return gradients[0]


def fake_quantize(weight: Tensor) -> Tensor:
    """``scale * quantize(w)``, float ``[out, in]``; its gradient is that of ``w``, without a mask.

    Nothing flows through the scale: ``dL/dW = (dL/dY)^T X`` as Spectra writes it.
    """
    value: Tensor = _FakeQuantize.apply(weight)  # type: ignore[no-untyped-call]
    return value
