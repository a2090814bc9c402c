"""Baselines of 2 to 8 bits: round to nearest (RTN) and GPTQ, on a uniform grid for every group.

Sources: GPTQ (Frantar et al. 2022, arXiv 2210.17323) as in its published code (``quant.py`` and
``gptq.py`` of github.com/IST-DASLab/gptq, read; the paper was not), groups in their natural order
(act-order off), damping 0.01; Spectra's QuantLM (Kaushal et al. 2024, arXiv 2407.12327 v5) is GPTQ
with the symmetric grid and groups of 128. Levels are ``scale * (q - zero)`` with integers ``q``
from 0 to ``2^bits - 1``::

    asymmetric  scale = (max(w, 0) - min(w, 0)) / (2^bits - 1)    zero = round(-min(w, 0) / scale)
    symmetric   scale = 2 max|w| / (2^bits - 1)                   zero = 2^(bits - 1)

That is the grid ``minmax``. ``mse`` shrinks both ends by 0 to 79 %, a percent at a time, and keeps
what has the least ``sum |w - value|^2.4``, an option of the published code. ``fit`` is ours,
since the ends of a group are far out for four levels: from ``mse``, nearest codes and least squares
in turn, columns weighted by the cost of an error in them, with a zero that is no integer. So does
the ternary start (`ternq.compensate`) with three levels; as many bits are counted.

Ours in all three: scales are rounded to float16 before the codes are taken, so that the 16 bits
that are counted hold them; the published code mirrors only rows with a negative weight, here all.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from ternq.compensate import DAMPING, ROUNDS, by_groups, output_error, round_columns
from ternq.ternary import n_groups

VALUE_BITS = 16  # of a scale, and of a zero
SHRINK, NORM = 80, 2.4  # of the grid mse, as in the published code


@dataclass(frozen=True)
class Rounded:
    """A layer that was rounded to something else than ternary values.

    ``values`` float32 ``[out, in]``; ``code_bits`` are those of the codes alone. ``error`` is
    ``||X W' - X Q'||^2 / ||X W'||^2``, or None without inputs; ``dead`` and ``damping`` as in
    `ternq.compensate.Compensated`.
    """

    values: Tensor
    code_bits: int
    error: float | None = None
    dead: int = 0
    damping: float = DAMPING


@dataclass(frozen=True)
class Grid:
    """A uniform grid a row: ``scale`` and ``zero`` ``[out]``, codes 0 to ``top``."""

    scale: Tensor
    zero: Tensor
    top: int

    def codes(self, column: Tensor) -> Tensor:
        """Codes of the nearest levels to weights ``[..., out]``, as float."""
        return torch.round(column / self.scale + self.zero).clamp(0, self.top)

    def values(self, codes: Tensor) -> Tensor:
        """What codes ``[..., out]`` stand for."""
        return self.scale * (codes - self.zero)


def grid(
    rows: Tensor, bits: int, symmetric: bool, how: str = "minmax", cost: Tensor | None = None
) -> Grid:
    """The grid of a group ``[m, out]``; of a group of zeros, the scale is 1.

    ``cost`` ``[m]`` weighs the columns for ``fit``.

    Raises:
        ValueError: a scale is beyond float16.

    >>> found = grid(torch.tensor([[-1.0], [0.5], [2.0]]), 2, symmetric=False)
    >>> found.scale.tolist(), found.zero.tolist()
    ([1.0], [1.0])
    """
    top = 2**bits - 1
    low, high = rows.amin(0).clamp(max=0), rows.amax(0).clamp(min=0)
    if symmetric:
        high = torch.maximum(-low, high)
        low = -high
    found = _between(low, high, top, symmetric)
    if how == "minmax":
        return found
    found = _shrunk(rows, low, high, found, symmetric)
    return found if how == "mse" else _fitted(rows, found, symmetric, cost)


def _between(low: Tensor, high: Tensor, top: int, symmetric: bool) -> Grid:
    scale = _half((high - low) / top)
    scale = torch.where(scale == 0, torch.ones_like(scale), scale)
    zero = torch.full_like(scale, (top + 1) / 2) if symmetric else torch.round(-low / scale)
    return Grid(scale, zero.clamp(0, top), top)


def _shrunk(rows: Tensor, low: Tensor, high: Tensor, whole: Grid, symmetric: bool) -> Grid:
    best, least = whole, _error(rows, whole)
    for percent in range(1, SHRINK):
        share = 1 - percent / 100
        tried = _between(share * low, share * high, whole.top, symmetric)
        error = _error(rows, tried)
        better = error < least
        scale = torch.where(better, tried.scale, best.scale)
        best = Grid(scale, torch.where(better, tried.zero, best.zero), whole.top)
        least = torch.minimum(error, least)
    return best


def _error(rows: Tensor, levels: Grid) -> Tensor:
    return (levels.values(levels.codes(rows)) - rows).abs().pow(NORM).sum(0)


def _fitted(rows: Tensor, start: Grid, symmetric: bool, cost: Tensor | None) -> Grid:
    """Scale and zero by least squares for the nearest codes, in turn; the rest stays."""
    share = torch.ones(len(rows), device=rows.device) if cost is None else cost
    share, found = (share / share.sum()).unsqueeze(1), start
    for _ in range(ROUNDS):
        codes = found.codes(rows)
        c = codes - found.zero if symmetric else codes
        mean_c, mean_w = ((share * x).sum(0) * (not symmetric) for x in (c, rows))
        spread = (share * (c - mean_c).square()).sum(0)
        scale = (share * (c - mean_c) * (rows - mean_w)).sum(0) / spread.clamp(min=1e-12)
        keep = (spread < 1e-6) | ~(_half(scale) > 0)
        scale = torch.where(keep, found.scale, _half(scale))
        offset = _half(mean_w - scale * mean_c)  # the value of code 0, stored as 16 bits
        zero = found.zero if symmetric else torch.where(keep, found.zero, -offset / scale)
        found = Grid(scale, zero, found.top)
    return found


def _half(values: Tensor) -> Tensor:
    """As float16 holds them; `ValueError` for what it does not."""
    found = values.half().float()
    if not bool(torch.isfinite(found).all()):
        raise ValueError("a scale is too large for float16")
    return found


def rtn(
    weight: Tensor, bits: int, symmetric: bool, group_size: int, how: str = "minmax"
) -> Rounded:
    """Every weight of ``[out, in]`` to the nearest level of its group; no inputs are looked at.

    Raises:
        ValueError: a weight is not finite, or too large.
    """
    if not torch.isfinite(weight).all():
        raise ValueError("a weight of the layer is not finite")
    rows = weight.detach().float().t()
    parts = []
    for part in torch.split(rows, group_size):
        levels = grid(part, bits, symmetric, how)
        parts.append(levels.values(levels.codes(part)))
    return Rounded(torch.cat(parts).t().contiguous(), bits * weight.numel())


def gptq(
    weight: Tensor,
    hessian: Tensor,
    bits: int,
    symmetric: bool,
    group_size: int,
    how: str = "minmax",
) -> Rounded:
    """The same with errors compensated, for inputs of second moments ``hessian`` ``[in, in]``.

    The grid of a group is that of its weights as the columns before it have left them.

    Raises:
        ValueError: something is not finite, or too large.
    """
    values = torch.empty(weight.shape[::-1], device=weight.device)

    def rounded(part: Tensor, own: Tensor, group: slice) -> Tensor:
        levels = grid(part, bits, symmetric, how, own.diagonal() ** -2)
        codes, errors = round_columns(part, own, levels)
        values[group] = levels.values(codes)
        return errors

    dead, damping = by_groups(weight, hessian, group_size, rounded)
    whole = values.t().contiguous()
    error = output_error(weight, whole, hessian)
    return Rounded(whole, bits * weight.numel(), error, dead, damping)


def stored_bits(rows: int, columns: int, bits: int, symmetric: bool, group_size: int) -> int:
    """Bits of a layer: its codes, a scale for every group, and a zero where it is not fixed.

    >>> stored_bits(1, 128, 2, False, 128) / 128
    2.25
    """
    beside = VALUE_BITS * (1 if symmetric else 2)
    return rows * (bits * columns + beside * n_groups(columns, group_size))
