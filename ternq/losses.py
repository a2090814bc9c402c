"""Distillation losses: OFF on features, divergence and cross-entropy on logits.

How TernaryLLM weighs and places them is not known here (its full text was not seen): the weights
and the choice of features come from the ablation in ``docs/results.md``.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

CHUNK = 1024  # tokens whose logits are worked on in float32 at once, where they are all there
_TINY = 1e-8  # the least norm, as in torch
CHUNK_BYTES = 2**26  # of one model's float32 logits, where they are made chunk by chunk


def off(student: Tensor, teacher: Tensor) -> Tensor:
    """Outlier-friendly feature distillation: mean over tokens of ``1 - cos(student, teacher)``.

    Features ``[..., hidden]``, computed in float32. The cosine sees directions only, so a few
    channels of large magnitude do not rule it (TernaryLLM, arXiv 2406.07177, abstract; the formula
    as quoted by others, original not seen).
    """
    distance: Tensor = 1 - _Cosine.apply(student, teacher)  # type: ignore[no-untyped-call]
    return distance.mean()


class _Cosine(torch.autograd.Function):
    """`F.cosine_similarity` over the last dimension, for a gradient of the first input only.

    With ``a = |s|``, ``b = |t|``, ``c = s.t / ab``: ``dc/ds = t / ab - c s / a^2``. A third of the
    time of autograd's, and no copies are kept.
    """

    @staticmethod
    def forward(ctx: Any, student: Tensor, teacher: Tensor) -> Tensor:
        s, t = student.float(), teacher.float()
        a = torch.linalg.vector_norm(s, dim=-1).clamp_(min=_TINY)
        b = torch.linalg.vector_norm(t, dim=-1).clamp_(min=_TINY)
        cosine = (s * t).sum(-1).div_(a * b)
        ctx.save_for_backward(student, teacher, a, b, cosine)
        return cosine

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        student, teacher, a, b, cosine = ctx.saved_tensors
        (g,) = gradients
        of_teacher, of_student = g / (a * b), g * cosine / (a * a)
        gradient = teacher.float() * of_teacher.unsqueeze(-1)
        gradient.addcmul_(student.float(), of_student.unsqueeze(-1), value=-1)
        return gradient.to(student.dtype), None


def off_per_block(student: Sequence[Tensor], teacher: Sequence[Tensor]) -> Tensor:
    """`off` at each decoder block: float32 ``[blocks]``."""
    return torch.stack([off(s, t) for s, t in zip(student, teacher, strict=True)])


def _gradient(
    log_q: Tensor, log_p: Tensor | None, labels: Tensor, share: Tensor, kl: float, ce: float
) -> tuple[Tensor, Tensor]:
    """What tokens add to the loss: its gradient ``[tokens, vocabulary]`` and its terms ``[2]``.

    ``kl (q - p) + ce (q - onehot)``, times the ``share`` of each token. Both inputs are used up.
    """
    target = labels.clamp(min=0).unsqueeze(1)
    share = share.unsqueeze(1)
    terms = torch.zeros(2, dtype=log_q.dtype, device=log_q.device)
    terms[1] = -(log_q.gather(1, target) * share).sum()
    if log_p is None:
        g = log_q.exp_().mul_(ce)
    else:
        p = log_p.exp()
        terms[0] = (log_p.sub_(log_q).mul_(p).sum(1, keepdim=True) * share).sum()
        g = log_q.exp_().mul_(kl + ce).sub_(p, alpha=kl)
    if ce:
        g.scatter_add_(1, target, torch.full_like(target, -ce, dtype=g.dtype))
    return g.mul_(share), terms


def _shares(labels: Tensor, dtype: torch.dtype) -> Tensor:
    """The part of each token in a mean over those that count."""
    inside = labels >= 0
    return inside.to(dtype) / inside.sum().clamp(min=1)


def _log_softmax(logits: Tensor) -> Tensor:
    return logits.log_softmax(-1, dtype=torch.promote_types(logits.dtype, torch.float32))


class _LogitLoss(torch.autograd.Function):
    """Value and gradient in one pass over chunks of tokens, so that float32 copies stay small."""

    @staticmethod
    def forward(
        ctx: Any, student: Tensor, teacher: Tensor | None, labels: Tensor, kl: float, ce: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        shares = _shares(labels, torch.float32)
        gradient = torch.empty_like(student)
        sums = torch.zeros(2, device=student.device)
        for at in range(0, len(student), CHUNK):
            part = slice(at, at + CHUNK)
            log_p = None if teacher is None else _log_softmax(teacher[part])
            log_q = _log_softmax(student[part])
            g, terms = _gradient(log_q, log_p, labels[part], shares[part], kl, ce)
            gradient[part] = g
            sums += terms
        ctx.save_for_backward(gradient)
        divergence, cross_entropy = sums
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


class Head(NamedTuple):
    """An output head: logits ``z = scale * (hidden @ weight.T + bias)``; ``[vocabulary, hidden]``.

    With a ``cap`` they are ``cap * tanh(z / cap)``, as in Gemma 2.
    """

    weight: Tensor
    bias: Tensor | None = None
    scale: float = 1.0
    cap: float | None = None

    def to(self, dtype: torch.dtype) -> "Head":
        """The same in another dtype."""
        bias = None if self.bias is None else self.bias.to(dtype)
        return self._replace(weight=self.weight.to(dtype), bias=bias)

    def logits(self, hidden: Tensor) -> Tensor:
        """Of inputs ``[..., hidden]``: ``[..., vocabulary]``."""
        return self.bounded(F.linear(hidden, self.weight, self.bias))

    def bounded(self, product: Tensor) -> Tensor:
        """The logits of what the head's own product is; a new tensor only where they differ."""
        if self.scale != 1:
            product = product * self.scale
        return product if self.cap is None else (product / self.cap).tanh_() * self.cap

    def slope(self, logits: Tensor) -> Tensor | float:
        """The derivative of the ``logits`` for the head's own product, element by element.

        ``d(cap tanh(z / cap)) / dz = 1 - (logits / cap)^2``.
        """
        if self.cap is None:
            return self.scale
        return (logits / self.cap).square_().neg_().add_(1).mul_(self.scale)


class _HeadLoss(torch.autograd.Function):
    """Loss and gradients through the head in one pass over chunks of tokens.

    The gradient for the logits of a chunk becomes that of its hidden states, and its part of that
    of the head, at once; the backward pass only scales what was summed.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        whole: Head,
        other_hidden: Tensor | None,
        other: Head | None,
        labels: Tensor,
        kl: float,
        ce: float,
        dtype: torch.dtype,
    ) -> tuple[Tensor, Tensor, Tensor]:
        head = whole.to(dtype)
        if other is not None:  # a head that does not learn is one for both
            same = other.weight is whole.weight and other.bias is whole.bias
            other = head if same else other.to(dtype)
        shares = _shares(labels, torch.promote_types(dtype, torch.float32))
        sums = shares.new_zeros(2)
        inputs = zip((hidden, weight, bias), ctx.needs_input_grad, strict=False)
        gradients = [
            torch.zeros_like(t) if wanted and t is not None else None for t, wanted in inputs
        ]
        size = max(1, CHUNK_BYTES // (4 * len(weight)))
        for at in range(0, len(hidden), size):
            part = slice(at, at + size)
            own, log_p = hidden[part].to(dtype), None
            if other is not None and other_hidden is not None:
                log_p = _log_softmax(other.logits(other_hidden[part].to(dtype)))
            logits = head.logits(own)
            log_q, slope = _log_softmax(logits), head.slope(logits)
            del logits
            g, terms = _gradient(log_q, log_p, labels[part], shares[part], kl, ce)
            sums += terms
            del log_q, log_p
            if not isinstance(slope, float) or slope != 1:
                g.mul_(slope)
            _through_head(gradients, part, g.to(dtype), own, head.weight)
            del g, slope  # before the next chunk is made
        ctx.save_for_backward(*gradients)
        divergence, cross_entropy = sums
        loss = kl * divergence + ce * cross_entropy
        ctx.mark_non_differentiable(divergence, cross_entropy)
        return loss, divergence, cross_entropy

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        # In place: autograd itself refuses a second backward pass through what was changed.
        found = (g if g is None else g.mul_(gradients[0]) for g in ctx.saved_tensors)
        return *found, None, None, None, None, None, None, None


def _through_head(
    gradients: list[Tensor | None], part: slice, g: Tensor, own: Tensor, weight: Tensor
) -> None:
    """Add what the gradient ``g`` of a chunk's logits gives for hidden states, weight and bias."""
    to_hidden, to_weight, to_bias = gradients
    if to_hidden is not None:
        to_hidden[part] = g @ weight
    if to_weight is not None:
        to_weight += g.t() @ own
    if to_bias is not None:
        to_bias += g.sum(0)


def head_loss(
    hidden: Tensor,
    head: Head,
    teacher_hidden: Tensor | None,
    teacher_head: Head | None,
    labels: Tensor,
    *,
    kl: float = 1.0,
    ce: float = 0.0,
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """`logit_loss` of logits that are never held whole: they are made in chunks of tokens.

    Inputs of the heads ``[tokens, hidden]``, labels int64 ``[tokens]`` (negative: the token does
    not count). Products are made in ``dtype`` (that of ``hidden``), softmax and sums in float32. A
    chunk has as many tokens as make `CHUNK_BYTES` of float32 logits; about four times that is held
    at once, beside the heads.

    Returns:
        The loss (with gradients for ``hidden`` and ``head``, for one backward pass), the divergence
        and the cross-entropy (without).
    """
    with torch.autocast(hidden.device.type, enabled=False):
        loss, divergence, cross_entropy = _HeadLoss.apply(  # type: ignore[no-untyped-call]
            hidden,
            head.weight,  # named, for autograd to see
            head.bias,
            head,
            teacher_hidden,
            teacher_head,
            labels,
            kl,
            ce,
            dtype or hidden.dtype,
        )
    return loss, divergence, cross_entropy
