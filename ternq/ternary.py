"""Ternary mathematics: a weight is ``scale * code + shift``, code in {-1, 0, +1} (DLT).

Each row of a weight ``[out, in]`` is cut into groups of ``group_size`` consecutive columns; the
last group of a row may be shorter and has a scale and shift of its own. Scales and shifts are
``[out, groups]``. Nothing here knows a module, a file or a terminal.

Sources. DLT is due to TernaryLLM (Chen et al. 2024, arXiv 2406.07177), whose full text was not
seen: its form ``alpha * T + gamma`` with both learned is as quoted by PT2-LLM (arXiv 2510.03267,
eq. 4). How a latent weight gets its codes: `ternq.rounding`.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

_PART = 2**22  # weights that are looked at in one go where a whole layer would take memory


@dataclass(frozen=True)
class TernaryWeight:
    """A ternary weight ``[out, in]`` in numbers: what every format stores in its own way.

    ``codes`` int8 ``[out, in]``, ``scale`` and ``shift`` (or None) float16 ``[out, groups]``.
    """

    codes: Tensor
    scale: Tensor
    shift: Tensor | None
    group_size: int

    def dequantized(self) -> Tensor:
        """The weight, float32 ``[out, in]``."""
        return dequantize(self.codes, self.scale, self.shift, self.group_size)

    def canonical(self) -> "TernaryWeight":
        """The same weight in the one stored form, `canonical`."""
        form = canonical(self.codes, self.scale, self.shift, self.group_size)
        return TernaryWeight(*form, self.group_size)

    def is_canonical(self) -> bool:
        """Whether it is in the one stored form; rows are looked at in parts, to save memory.

        Raises:
            ValueError: a scale or shift is not finite.
        """
        step = max(1, _PART // max(1, self.codes.shape[1]))
        parts = (self.rows(n, n + step) for n in range(0, len(self.codes), step))
        return all(part.same(part.canonical()) for part in parts)

    def rows(self, first: int, last: int) -> "TernaryWeight":
        """The weight of rows ``first`` to ``last - 1``."""
        shift = None if self.shift is None else self.shift[first:last]
        return TernaryWeight(self.codes[first:last], self.scale[first:last], shift, self.group_size)

    def same(self, other: "TernaryWeight") -> bool:
        """Whether the other holds the same numbers, to the bit."""
        pairs = ((self.codes, other.codes), (self.scale, other.scale), (self.shift, other.shift))
        return all(a is b if a is None or b is None else _equal(a, b) for a, b in pairs)


def _equal(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and torch.equal(a, b)


def n_groups(columns: int, group_size: int) -> int:
    """Groups in a row; the last may be shorter."""
    return -(-columns // group_size)


def group_lengths(columns: int, group_size: int, device: Any = None) -> Tensor:
    """Columns in each group of a row, float32 ``[groups]``."""
    lengths = torch.full((n_groups(columns, group_size),), float(group_size), device=device)
    lengths[-1] = columns - group_size * (len(lengths) - 1)
    return lengths


def grouped(matrix: Tensor, group_size: int) -> Tensor:
    """``[out, in]`` as ``[out, groups, group_size]``; a short last group is filled with zeros.

    A group that is wider than the row is as wide as the row: ``[out, 1, in]``.
    """
    rows, columns = matrix.shape
    group_size = min(group_size, columns)
    groups = n_groups(columns, group_size)
    missing = groups * group_size - columns
    padded = F.pad(matrix, (0, missing)) if missing else matrix
    return padded.reshape(rows, groups, group_size)


def ungrouped(groups: Tensor, columns: int) -> Tensor:
    """The inverse of `grouped`: ``[out, groups, group_size]`` as ``[out, columns]``."""
    return groups.flatten(1)[:, :columns]


def fit(
    weight: Tensor, codes: Tensor, group_size: int, shift: bool = True
) -> tuple[Tensor, Tensor | None]:
    """Scale and shift that minimise ``sum (w - scale * code - shift)^2`` in each group.

    Without shift: TWN's scale, the mean of ``w * code`` over codes that are not 0. With shift: the
    joint least squares of both (PT2-LLM, arXiv 2510.03267, eq. 9). Where all codes of a group are
    alike the two are not determined: nonzero codes keep TWN's scale with shift 0, which fits as
    well and leaves a scale to learn; zero codes get scale 0 and the mean as shift.

    Returns float32 ``[out, groups]``, and the same or None.
    """
    w, t = grouped(weight.detach().float(), group_size), grouped(codes.float(), group_size)
    m = group_lengths(weight.shape[1], group_size, weight.device)
    wt, tt = (w * t).sum(2), (t * t).sum(2)
    twn = torch.where(tt > 0, wt / tt.clamp(min=1), torch.zeros_like(wt))
    if not shift:
        return twn, None
    w1, t1 = w.sum(2), t.sum(2)
    determinant = m * tt - t1 * t1
    solvable = determinant > 0
    safe = torch.where(solvable, determinant, torch.ones_like(determinant))
    scale = torch.where(solvable, (m * wt - t1 * w1) / safe, twn)
    mean = torch.where(tt > 0, torch.zeros_like(w1), w1 / m)
    offset = torch.where(solvable, (tt * w1 - t1 * wt) / safe, mean)
    return scale, offset


def dequantize(codes: Tensor, scale: Tensor, shift: Tensor | None, group_size: int) -> Tensor:
    """``scale * code + shift`` as float32 ``[out, in]``."""
    groups = grouped(codes.float(), group_size) * scale.float().unsqueeze(2)
    if shift is not None:
        groups = groups + shift.float().unsqueeze(2)
    return ungrouped(groups, codes.shape[1])


def canonical(
    codes: Tensor, scale: Tensor, shift: Tensor | None, group_size: int
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The one stored form of a ternary weight: int8 codes, float16 scale >= 0, float16 shift.

    A negative scale is made positive by negating its codes. A group that stores one value only (all
    codes alike, or a scale that is 0 in float16) gets codes 0 and scale 0, its value as shift;
    without shifts that is done for the value 0 alone.

    Raises:
        ValueError: a scale or shift is not finite, or beyond float16 (65504).
    """
    half = scale.detach().half()
    half_shift = None if shift is None else shift.detach().half()
    _refuse_not_finite("scale", half)
    if half_shift is not None:
        _refuse_not_finite("shift", half_shift)
    t = grouped(codes, group_size)
    t = torch.where((half < 0).unsqueeze(2), -t, t)
    half = half.abs()
    inside = _inside(codes.shape[1], group_size, codes.device)
    first = t[:, :, :1]
    alike = ((t == first) | ~inside).all(2)
    value = half.float() * first.squeeze(2).float()
    if half_shift is None:
        single = (half == 0) | (alike & (value == 0))
    else:
        single = (half == 0) | alike
        value = torch.where(half == 0, torch.zeros_like(value), value) + half_shift.float()
        half_shift = torch.where(single, value.half(), half_shift) + 0.0
        _refuse_not_finite("shift", half_shift)
    t = torch.where(single.unsqueeze(2), torch.zeros_like(t), t)
    half = torch.where(single, torch.zeros_like(half), half)
    return ungrouped(t, codes.shape[1]).contiguous(), half, half_shift


def _refuse_not_finite(name: str, values: Tensor) -> None:
    if not bool(torch.isfinite(values).all()):
        raise ValueError(f"a {name} is not finite or too large for float16")


def _inside(columns: int, group_size: int, device: Any) -> Tensor:
    """Which places of the groups are columns and not filling: bool ``[1, groups, group_size]``."""
    return grouped(torch.ones(1, columns, device=device), group_size).bool()
