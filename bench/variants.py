"""Other ways to round, and another feature loss, for `bench/ablation.py`: each takes DLT's place.

A way to round is two functions: codes of a latent weight, and its value with a gradient. While
`instead` is open, ternq's own are replaced by them in training, measuring and the closed-form
start. Plain autograd on whole weights: slower than `ternq.rounding`, and never part of it.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor

from ternq import losses, optimize, rounding
from ternq.linear import TernaryLinear, compute_dtype
from ternq.ternary import group_lengths, grouped, ungrouped

Codes = Callable[[Tensor, int], Tensor]  # of groups [out, groups, size], and columns in a row
LAMBDA = 1e-3  # Tequila's


def _mean(groups: Tensor, columns: int) -> Tensor:
    """The mean of each group ``[out, groups, 1]``, of the columns that it has."""
    lengths = group_lengths(columns, groups.shape[2], groups.device)
    return groups.sum(2, keepdim=True) / lengths.view(1, -1, 1)


def threshold(share: float, centred: bool = False) -> Codes:
    """Codes by ``|w| > share * mean |w|`` of the group; ``centred``: of ``w - mean w``.

    0.7 is TWN's; 0.5 is where absmean rounds to the nearest level (BitNet b1.58, TriLM); 0.75 of
    the centred weight is where PT2-LLM begins (arXiv 2510.03267, as noted from its text).
    """

    def codes(groups: Tensor, columns: int) -> Tensor:
        if centred:
            inside = torch.arange(groups[0].numel()).view_as(groups[0]) < columns
            groups = (groups - _mean(groups, columns)) * inside
        size = groups.abs()
        return groups.sign() * (size > share * _mean(size, columns))

    return codes


def _straight(codes: Codes) -> Callable[..., Tensor]:
    """``scale * code + shift`` with the identity as gradient of the rounding."""

    def fake_quantize(
        weight: Tensor, scale: Tensor, shift: Tensor | None, group_size: int, ste: str, dtype: Any
    ) -> Tensor:
        w = grouped(weight, group_size)
        value = codes(w.detach(), weight.shape[1]) * scale.unsqueeze(2) + (w - w.detach())
        if shift is not None:
            value = value + shift.unsqueeze(2)
        return ungrouped(value, weight.shape[1]).to(dtype)

    return fake_quantize


class _Seq(torch.autograd.Function):
    """ParetoQ's ternary SEQ, value and gradients as in its published code (see `seq`)."""

    @staticmethod
    def forward(ctx: Any, w: Tensor, alpha: Tensor) -> Tensor:
        ctx.save_for_backward(w, alpha)
        return alpha * (w / alpha).clamp(-0.99, 0.99).mul(1.5).round() / 1.5

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor]:
        w, alpha = ctx.saved_tensors
        (g,) = gradients
        u = w / alpha
        inside = u.abs() <= 0.99
        q = u.clamp(-0.99, 0.99).mul(1.5).round() / 1.5
        to_alpha = torch.where(inside, q - u, u.sign())
        return g * inside, (g * to_alpha).sum(2, keepdim=True) / w.numel() ** 0.5


def seq_codes(groups: Tensor, columns: int) -> Tensor:
    """Where SEQ begins: ``alpha = max |w|``, so that what is above a third of it is not 0."""
    alpha = groups.abs().amax(2, keepdim=True).clamp(min=1e-8)
    return (groups / alpha).clamp(-0.99, 0.99).mul(1.5).round()


def seq(
    weight: Tensor, scale: Tensor, shift: Tensor | None, group_size: int, ste: str, dtype: Any
) -> Tensor:
    """SEQ (ParetoQ, arXiv 2502.02631) per group: thresholds follow the learned scale.

    ``alpha round(1.5 clip(w / alpha, -0.99, 0.99)) / 1.5`` with levels at two thirds of alpha; the
    weight's gradient is cut outside, alpha's is ``q - w / alpha`` inside and the sign outside, over
    the root of all weights. From notes on its code. ``scale`` is the level, ``2/3 alpha``.
    """
    assert shift is None, "SEQ has none"
    alpha = (scale * 1.5).clamp(min=1e-8).unsqueeze(2)
    value: Tensor = _Seq.apply(grouped(weight, group_size), alpha)  # type: ignore[no-untyped-call]
    return ungrouped(value, weight.shape[1]).to(dtype)


def seq_scale(weight: Tensor, codes: Tensor, group_size: int, shift: bool) -> tuple[Tensor, None]:
    """SEQ's first scale in the place of `ternq.ternary.fit`: two thirds of the largest weight."""
    return grouped(weight.detach(), group_size).abs().amax(2).clamp(min=1e-8) / 1.5, None


def mean_scale(weight: Tensor, codes: Tensor, group_size: int, shift: bool) -> tuple[Tensor, Any]:
    """absmean's scale in the place of `ternq.ternary.fit`: ``mean |w|``, with a shift of 0."""
    scale = _mean(grouped(weight.detach().abs(), group_size), weight.shape[1]).squeeze(2)
    return scale, torch.zeros_like(scale) if shift else None


def tequila_forward(layer: TernaryLinear, input: Tensor) -> Tensor:
    """A layer with Tequila's bias: ``lambda`` times the sum of a row's weights whose code is 0.

    arXiv 2509.23809, from notes on its text and code; it learns through the weights alone.
    """
    learned = layer.weight, layer.weight_scale, layer.weight_shift
    weight = rounding.fake_quantize(*learned, layer.group_size, layer.ste, compute_dtype(input))
    dead = layer.codes() == 0
    bias = LAMBDA * (layer.weight * dead).sum(1)
    return F.linear(input, weight, bias if layer.bias is None else bias + layer.bias)


def squared_features(student: Sequence[Tensor], teacher: Sequence[Tensor]) -> Tensor:
    """In the place of OFF: the squared error over the energy of the teacher's features."""
    pairs = [(s.float(), t.float()) for s, t in zip(student, teacher, strict=True)]
    return torch.stack([(s - t).square().sum() / t.square().sum() for s, t in pairs])


def last_feature(student: Sequence[Tensor], teacher: Sequence[Tensor]) -> Tensor:
    """OFF of the last block alone."""
    return losses.off(student[-1], teacher[-1]).unsqueeze(0)


@contextmanager
def instead(
    codes: Codes | None = None,
    value: Callable[..., Tensor] | None = None,
    *,
    fit: Callable[..., Any] | None = None,
    forward: Callable[..., Tensor] | None = None,
    features: Callable[..., Tensor] | None = None,
) -> Iterator[None]:
    """While open, these are what ternq rounds, begins and learns by; None: its own."""

    def quantize(weight: Tensor, group_size: int) -> Tensor:
        assert codes is not None
        found = codes(grouped(weight.detach().float(), group_size), weight.shape[1])
        return ungrouped(found, weight.shape[1]).to(torch.int8)

    replaced: list[tuple[str, Any]] = []
    if codes:
        replaced += [("ternq.rounding.quantize", quantize)]
        replaced += [("ternq.rounding.fake_quantize", value or _straight(codes))]
    replaced += [("ternq.ternary.fit", fit)] if fit else []
    replaced += [("ternq.linear.TernaryLinear.forward", forward)] if forward else []
    replaced += [("ternq.objective.off_per_block", features)] if features else []
    patches = [mock.patch(name, new) for name, new in replaced]
    for patch in patches:
        patch.start()
    try:
        yield
    finally:
        for patch in patches:
            patch.stop()


@contextmanager
def embeddings_learn(rate: float) -> Iterator[None]:
    """Embeddings and output head (one matrix, where they are tied) learn too, at their own rate."""

    def more(student: Any, settings: Any) -> torch.optim.Optimizer:
        made = optimize.optimizer(student, settings)
        ends = student.get_input_embeddings(), student.get_output_embeddings()
        found = {id(p): p.requires_grad_(True) for module in ends for p in module.parameters()}
        group = {"params": list(found.values()), "lr": rate, "peak_lr": rate}
        made.add_param_group(group | {"weight_decay": 0.0, "first_decay": 0.0})
        return made

    with mock.patch("ternq.train.optimizer", more):
        yield
