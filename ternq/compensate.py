"""Error-compensated rounding to ternary values: GPTQ with three levels of learned scale and shift.

A layer with inputs X is rounded so that ``||X W' - X Q'||`` stays small: column by column, each
column's error is made good by the columns that are not rounded yet. Source: GPTQ (Frantar et al.
2022, arXiv 2210.17323) as in its published code (github.com/IST-DASLab/gptq, ``gptq.py``); the
paper itself was not read. Threshold, scale and shift of a group are those of `ternq.ternary`,
fitted to the group's weights as the columns before it have left them.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from ternq import rounding, ternary
from ternq.kernels import one_thread

DAMPING = 0.01  # of the Hessian's mean diagonal: that of the published code
ROUNDS = 4  # of alternating least squares in a group
_AT_ONCE = 16  # columns of a group that take each other's errors one by one


@dataclass(frozen=True)
class Compensated:
    """A rounded layer, and a latent weight whose codes by threshold are these codes.

    ``latent`` float32 and ``codes`` int8 ``[out, in]``; ``scale`` and ``shift`` (or None) float32
    ``[out, groups]``. ``error`` is ``||X W' - X Q'||^2 / ||X W'||^2``, ``dead`` the number of input
    channels that were always 0, ``damping`` what made the Hessian definite.
    """

    latent: Tensor
    codes: Tensor
    scale: Tensor
    shift: Tensor | None
    error: float
    dead: int
    damping: float


class Levels(Protocol):
    """What the columns of a group are rounded to, a grid for every row."""

    def codes(self, column: Tensor) -> Tensor:
        """Codes of weights ``[..., out]``, as float."""

    def values(self, codes: Tensor) -> Tensor:
        """What codes ``[..., out]`` stand for."""


@dataclass(frozen=True)
class _Levels:
    """Three levels a row, each ``[out]``: ``scale * code + shift``.

    A weight's code is the sign of its distance to ``center`` where that is above ``reach``, else 0.
    """

    scale: Tensor
    shift: Tensor | None
    center: Tensor
    reach: Tensor

    def codes(self, column: Tensor) -> Tensor:
        """Codes of weights ``[..., out]``, as float."""
        apart = column - self.center
        return torch.sign(apart) * (apart.abs() > self.reach)

    def values(self, codes: Tensor) -> Tensor:
        """What codes ``[..., out]`` stand for."""
        values = codes * self.scale
        return values if self.shift is None else values + self.shift


def compensate(
    weight: Tensor,
    hessian: Tensor,
    group_size: int,
    shift: bool = True,
    *,
    rounds: int = ROUNDS,
) -> Compensated:
    """Round a weight ``[out, in]`` for inputs whose second moments are ``hessian`` ``[in, in]``.

    ``hessian`` is any positive multiple of ``X'X``. ``rounds`` of alternating least squares (codes
    of the nearest level, then scale and shift, weighted by the cost of an error in each column)
    follow upon the closed-form start of a group; with none, codes are those of TWN's threshold.

    Raises:
        ValueError: weight or Hessian is not finite.
    """
    codes, latent = (torch.empty(weight.shape[::-1], device=weight.device) for _ in range(2))
    levels: list[_Levels] = []

    def rounded(part: Tensor, own: Tensor, group: slice) -> Tensor:
        levels.append(_levels(part.t().contiguous(), own.diagonal() ** -2, shift, rounds))
        codes[group], errors = round_columns(part, own, levels[-1])
        latent[group] = _latent(part, codes[group], levels[-1])
        return errors

    dead, damping = by_groups(weight, hessian, group_size, rounded)
    scale = torch.stack([level.scale for level in levels], 1)
    shifts = [level.shift for level in levels if level.shift is not None]
    whole = codes.t().contiguous().to(torch.int8)
    offset = torch.stack(shifts, 1) if shifts else None
    return Compensated(
        _reproducing(latent.t().contiguous(), whole, scale, group_size),
        whole,
        scale,
        offset,
        output_error(weight, ternary.dequantize(whole, scale, offset, group_size), hessian),
        dead,
        damping,
    )


def by_groups(
    weight: Tensor,
    hessian: Tensor,
    group_size: int,
    rounded: Callable[[Tensor, Tensor, slice], Tensor],
) -> tuple[int, float]:
    """Go through the groups of a weight ``[out, in]``; later columns make good earlier errors.

    ``rounded`` gets a group's columns as the groups before left them, as rows ``[m, out]`` that it
    may change; the group's own part of `inverse_root`'s factor; and its place. It returns the
    errors, as `round_columns` and `errors_of` do. Returns the number of dead channels and the
    damping that was needed.

    Raises:
        ValueError: weight or Hessian is not finite.
    """
    if not (torch.isfinite(weight).all() and torch.isfinite(hessian).all()):
        raise ValueError("a weight or an input of the layer is not finite")
    upper, dead, damping = inverse_root(hessian)
    left = weight.detach().float().t().contiguous()  # rows are input columns: contiguous updates
    for first in range(0, len(left), group_size):
        group = slice(first, min(first + group_size, len(left)))
        # Many small steps: on two cores that others use as well, a layer took 35 times as long
        # with two threads, which wait for one another.
        with one_thread():
            errors = rounded(left[group], upper[group, group], group)
        left[group.stop :].addmm_(upper[group, group.stop :].t(), errors, alpha=-1)
    return dead, damping


def errors_of(lost: Tensor, upper: Tensor) -> Tensor:
    """The scaled errors of a group that is rounded as a whole: ``lost`` is weight less value.

    Both ``[m, out]``. They are those of rounding column by column to the same values: the columns
    that are left move as the minimum of the output's error has it.
    """
    errors: Tensor = torch.linalg.solve_triangular(upper.t(), lost, upper=False)
    return errors


def inverse_root(hessian: Tensor, damping: float = DAMPING) -> tuple[Tensor, int, float]:
    """The upper Cholesky factor of the inverse of the damped Hessian, float32 ``[in, in]``.

    A channel without input gets the mean of the others on its diagonal, so that it neither gives
    nor takes errors. A Hessian that is not definite yet is damped ten times as much, until it is.
    Returns the factor, the number of such channels, and the damping that was needed, relative to
    the mean diagonal.
    """
    backwards = hessian.double().flip(0, 1)  # large: everything below happens in place
    diagonal = backwards.diagonal()
    dead = diagonal == 0
    mean = diagonal.sum() / (~dead).sum() if not dead.all() else diagonal.new_ones(())
    plain = diagonal + dead * mean
    while True:
        # H = R R' with R upper triangular, from the factor of H in reverse order; H^-1 is then U'U
        # with U the inverse of R, without H^-1 itself.
        diagonal.copy_(plain + damping * mean)
        lower, failed = torch.linalg.cholesky_ex(backwards)
        if not failed:
            del backwards, diagonal
            identity = torch.eye(len(lower), dtype=torch.float64, device=lower.device)
            upper = torch.linalg.solve_triangular(lower, identity, upper=False)
            return upper.float().flip(0, 1), int(dead.sum()), damping
        damping = max(10 * damping, DAMPING)


def output_error(weight: Tensor, rounded: Tensor, hessian: Tensor) -> float:
    """``||X W' - X Q'||^2 / ||X W'||^2`` from ``X'X`` ``[in, in]``; 0 where the output is 0."""
    weight, moments = weight.detach().float(), hessian.float()
    lost = weight - rounded
    whole = float(((weight @ moments) * weight).sum())
    return float(((lost @ moments) * lost).sum()) / whole if whole > 0 else 0.0


def _levels(weight: Tensor, cost: Tensor, shift: bool, rounds: int) -> _Levels:
    """The levels of a group ``[out, m]``; ``cost`` ``[m]`` weighs the error of each column."""
    codes = rounding.quantize(weight, weight.shape[1])
    scale, offset = ternary.fit(weight, codes, weight.shape[1], shift)
    reach = rounding.THRESHOLD * weight.abs().sum(1) / weight.shape[1]
    found = _Levels(
        scale[:, 0], None if offset is None else offset[:, 0], torch.zeros_like(reach), reach
    )
    for _ in range(rounds):
        found = _refit(weight, cost, _nearest(found))
    return found


def _nearest(levels: _Levels) -> _Levels:
    """The same levels, with the codes of the nearest one."""
    center = torch.zeros_like(levels.scale) if levels.shift is None else levels.shift
    return _Levels(levels.scale, levels.shift, center, levels.scale.abs() / 2)


def _refit(weight: Tensor, cost: Tensor, levels: _Levels) -> _Levels:
    """Scale and shift by least squares, weighted by ``cost``, for the codes of ``levels``.

    Rows whose codes do not determine them, or whose scale would not be positive, keep theirs.
    """
    codes = levels.codes(weight.t()).t()
    share = cost / cost.sum()
    wt, tt = (weight * codes) @ share, (codes * codes) @ share
    if levels.shift is None:
        solvable, scale, shift = tt > 0, wt / tt, None
    else:
        w1, t1 = weight @ share, codes @ share
        determinant = tt - t1 * t1
        solvable = determinant > 1e-6
        scale = (wt - t1 * w1) / determinant
        shift = torch.where(solvable & (scale > 0), w1 - scale * t1, levels.shift)
    scale = torch.where(solvable & (scale > 0), scale, levels.scale)
    return _nearest(_Levels(scale, shift, levels.center, levels.reach))


def round_columns(rows: Tensor, upper: Tensor, levels: Levels) -> tuple[Tensor, Tensor]:
    """Round a group column by column; ``rows`` ``[m, out]`` become the compensated weights.

    Returns codes and scaled errors, both float32 ``[m, out]``: column j of what is still to be
    rounded loses ``upper[i, j] * errors[i]``. Columns beyond the next few get theirs by a product.
    """
    codes, errors = torch.empty_like(rows), torch.empty_like(rows)
    for first in range(0, len(rows), _AT_ONCE):
        last = min(first + _AT_ONCE, len(rows))
        for i in range(first, last):
            codes[i] = levels.codes(rows[i])
            errors[i] = (rows[i] - levels.values(codes[i])) / upper[i, i]
            rows[i + 1 : last].addr_(upper[i, i + 1 : last], errors[i], alpha=-1)
        rows[last:].addmm_(upper[first:last, last:].t(), errors[first:last], alpha=-1)
    return codes, errors


def _latent(rows: Tensor, codes: Tensor, levels: _Levels) -> Tensor:
    """Compensated weights ``[m, out]``, stretched so that TWN's threshold divides them as they are.

    Rounding leaves a group's mean magnitude another than the one that its codes were taken with.
    With ``v = |w - center|`` and ``b`` the reach, magnitudes within the reach become ``v D / b``,
    the others ``v + D - b``, where ``D = 0.7 mean |latent|`` is solved for. The order of the
    magnitudes stays.
    """
    apart = (rows - levels.center).abs()
    outer = codes != 0
    zero = torch.zeros_like(apart)
    above = torch.where(outer, apart - levels.reach, zero)
    below = torch.where(outer, zero, apart / levels.reach.clamp(min=torch.finfo().tiny))
    share = rounding.THRESHOLD / len(rows)
    limit = share * above.sum(0) / (1 - share * (outer.sum(0) + below.sum(0)))
    return torch.sign(rows - levels.center) * torch.where(outer, above + limit, below * limit)


def _reproducing(latent: Tensor, codes: Tensor, scale: Tensor, group_size: int) -> Tensor:
    """The latent weight, and ``scale * code`` in groups where it has other codes than ``codes``.

    That is so where a magnitude lies upon the threshold to the last bit, or all of a group are 0.
    """
    wrong = ternary.grouped(rounding.quantize(latent, group_size) != codes, group_size)
    size = torch.where(scale != 0, scale.abs(), torch.ones_like(scale))
    plain = ternary.grouped(ternary.dequantize(codes, size, None, group_size), group_size)
    whole = ternary.grouped(latent, group_size)
    mended = torch.where(wrong.any(2, keepdim=True), plain, whole)
    return ternary.ungrouped(mended, codes.shape[1]).contiguous()
