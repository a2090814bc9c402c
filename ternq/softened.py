"""Softened rounding: a ternary weight that hardens while it is trained.

CAT-Q (arXiv 2606.26650, as quoted in notes that were made of its text; the paper itself was not
read for this) replaces the step from a weight to its code by

    f(u; s, D) = [tanh(s (u - D)) + tanh(s (u + D))] / (2 tanh s)

of the weight u relative to its group, with the threshold D = 1/2. It is u itself for a small
hardness s and the code for a large one, and has a gradient of its own in between. What is ours: u
is the latent weight over twice its group's threshold (so that large s gives the codes of
`ternq.rounding.quantize`), and where hardness begins (docs/method.md).
"""

import math
from typing import Any

import torch
from torch import Tensor

from ternq.recipe import Training
from ternq.rounding import THRESHOLD, pieces

FIRST, LAST = 8.0, 30.0  # hardness, from the first softened step to the last; 30 is CAT-Q's s0


def hardness(step: int, steps: int, settings: Training) -> float | None:
    """Of a step of ``steps``, counted from 0; None where codes are the weight's own.

    Grows evenly over the share ``reconstruction_softened`` of the steps.
    """
    soft = settings.reconstruction_softened * steps
    return FIRST + (LAST - FIRST) * step / soft if step < soft else None


def codes(relative: Tensor, hardness: float) -> tuple[Tensor, Tensor]:
    """``f(u; s, 1/2)`` of any tensor u, and its derivative."""
    below = torch.tanh((relative - 0.5) * hardness)
    above = torch.tanh((relative + 0.5) * hardness)
    whole = 2 * math.tanh(hardness)
    slope = (2 - below.square() - above.square()).mul_(hardness / whole)
    return below.add_(above).div_(whole), slope


class _Soften(torch.autograd.Function):
    """`soften` with its gradient, piece by piece, since each is passed over several times."""

    @staticmethod
    def forward(
        ctx: Any,
        weight: Tensor,
        scale: Tensor,
        shift: Tensor | None,
        group_size: int,
        hardness: float,
        dtype: torch.dtype,
    ) -> Tensor:
        value = torch.empty(weight.shape, dtype=dtype, device=weight.device)
        soft, slope = (torch.empty_like(weight, dtype=torch.float32) for _ in range(2))
        for piece in pieces(weight, group_size):
            w = piece.of(weight).float()
            unit = w.abs().mean(2, keepdim=True).mul_(2 * THRESHOLD).clamp_(min=1e-30)
            own, steep = codes(w / unit, hardness)
            piece.of(soft).copy_(own)
            piece.of(slope).copy_(steep.div_(unit))
            own.mul_(piece.per_group(scale))
            if shift is not None:
                own.add_(piece.per_group(shift))
            piece.of(value).copy_(own)
        ctx.save_for_backward(soft, slope, scale)
        ctx.group_size, ctx.dtype = group_size, weight.dtype
        return value

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        soft, slope, scale = ctx.saved_tensors
        gradient = gradients[0].contiguous()
        to_weight = torch.empty_like(gradient, dtype=ctx.dtype)
        to_scale, to_shift = torch.empty_like(scale), torch.empty_like(scale)
        for piece in pieces(gradient, ctx.group_size):
            g = piece.of(gradient).float()
            piece.per_group(to_shift).copy_(g.sum(2, keepdim=True))
            piece.per_group(to_scale).copy_((piece.of(soft) * g).sum(2, keepdim=True))
            piece.of(to_weight).copy_(g * piece.of(slope) * piece.per_group(scale))
        return to_weight, to_scale, to_shift if ctx.needs_input_grad[2] else None, None, None, None


def soften(
    weight: Tensor,
    scale: Tensor,
    shift: Tensor | None,
    group_size: int,
    hardness: float,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """``scale * f(w / (2 threshold); hardness, 1/2) + shift``: ``[out, in]`` of ``dtype``.

    The threshold of a group, 0.7 of its mean magnitude, is a constant to the gradient.
    """
    value: Tensor = _Soften.apply(weight, scale, shift, group_size, hardness, dtype)  # type: ignore[no-untyped-call]
    return value
