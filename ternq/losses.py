"""Distillation losses: OFF on features, divergence and cross-entropy on logits.

How TernaryLLM weighs and places them is not known here (its full text was not seen): the weights
and the choice of features come from the ablation in ``docs/results.md``.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

CHUNK = 1024  # tokens whose logits are held in float32 at once


def off(student: Tensor, teacher: Tensor, mask: Tensor | None = None) -> Tensor:
    """Outlier-friendly feature distillation: mean over tokens of ``1 - cos(student, teacher)``.

    Features ``[..., hidden]``; ``mask`` (bool, ``[...]``) names the tokens that count. Computed in
    float32. The cosine sees directions only, so a few channels of large magnitude do not rule it
    (TernaryLLM, arXiv 2406.07177, abstract; the formula as quoted by others, original not seen).
    """
    distance = 1 - F.cosine_similarity(student.float(), teacher.float(), dim=-1)
    if mask is None:
        return distance.mean()
    return (distance * mask).sum() / mask.sum().clamp(min=1)


def off_per_block(
    student: Sequence[Tensor], teacher: Sequence[Tensor], mask: Tensor | None = None
) -> Tensor:
    """`off` at each decoder block: float32 ``[blocks]``."""
    return torch.stack([off(s, t, mask) for s, t in zip(student, teacher, strict=True)])


class _LogitLoss(torch.autograd.Function):
    """Value and gradient in one pass over chunks of tokens, so that float32 copies stay small."""

    @staticmethod
    def forward(
        ctx: Any, student: Tensor, teacher: Tensor | None, labels: Tensor, kl: float, ce: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        count = max(int((labels >= 0).sum()), 1)
        gradient = torch.empty_like(student)
        sums = torch.zeros(2, device=student.device)
        for at in range(0, len(student), CHUNK):
            part = slice(at, at + CHUNK)
            inside = labels[part] >= 0
            log_q = student[part].float().log_softmax(-1)
            q = log_q.exp()
            g = torch.zeros_like(q)
            if teacher is not None:
                log_p = teacher[part].float().log_softmax(-1)
                p = log_p.exp()
                sums[0] += ((p * (log_p - log_q)).sum(-1) * inside).sum()
                g += kl * (q - p)
            target = labels[part].clamp(min=0).unsqueeze(1)
            sums[1] -= (log_q.gather(1, target).squeeze(1) * inside).sum()
            if ce:
                g += ce * q
                g.scatter_add_(1, target, torch.full_like(target, -ce, dtype=g.dtype))
            gradient[part] = (g * (inside.unsqueeze(1) / count)).to(gradient.dtype)
        ctx.save_for_backward(gradient)
        divergence, cross_entropy = sums / count
        loss = kl * divergence + ce * cross_entropy
        ctx.mark_non_differentiable(divergence, cross_entropy)
        return loss, divergence, cross_entropy

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        return gradient * gradients[0], None, None, None, None


def logit_loss(
    student: Tensor, teacher: Tensor | None, labels: Tensor, *, kl: float = 1.0, ce: float = 0.0
) -> tuple[Tensor, Tensor, Tensor]:
    """``kl * KL(teacher || student) + ce * CE``, and both terms for the record.

    Logits ``[tokens, vocabulary]``, labels int64 ``[tokens]`` (negative: the token does not count).
    Both terms are means over the tokens that count, at temperature 1, in float32 by chunks.

    Returns:
        The loss (with a gradient for ``student``), the divergence and the cross-entropy (without).
    """
    loss, divergence, cross_entropy = _LogitLoss.apply(  # type: ignore[no-untyped-call]
        student, teacher, labels, kl, ce
    )
    return loss, divergence, cross_entropy
