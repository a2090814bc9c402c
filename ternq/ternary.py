"""Ternary mathematics: a weight is ``scale * code + shift``, code in {-1, 0, +1} (DLT).

Each row of a weight ``[out, in]`` is cut into groups of ``group_size`` consecutive columns; the
last group of a row may be shorter and has a scale and shift of its own. Scales and shifts are
``[out, groups]``. Nothing here knows a module, a file or a terminal.

Sources. DLT is due to TernaryLLM (Chen et al. 2024, arXiv 2406.07177), whose full text was not
seen: its form ``alpha * T + gamma`` with both learned is as quoted by PT2-LLM (arXiv 2510.03267,
eq. 4), its threshold as quoted by CAT-Q (arXiv 2606.26650) for TWN (Li et al. 2016, arXiv
1605.04711).
"""

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses import FakeTensor

_PART = 2**22  # weights that are looked at in one go where a whole layer would take memory
_CACHED = 2**18  # weights rounded in one go: what a core's cache holds from pass to pass
THRESHOLD = 0.7  # of the group's mean absolute value: TWN's rule


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


class _Piece(NamedTuple):
    """Rows of a weight, and consecutive groups of them that have one size."""

    rows: slice
    columns: slice
    groups: slice
    size: int

    def of(self, matrix: Tensor) -> Tensor:
        """This piece of a matrix ``[out, in]``, a view ``[rows, groups, size]``."""
        part = matrix[self.rows, self.columns]
        return part.view(len(part), -1, self.size)

    def per_group(self, values: Tensor) -> Tensor:
        """This piece of a value per group ``[out, groups]``, a view ``[rows, groups, 1]``."""
        return values[self.rows, self.groups].unsqueeze(2)


def _pieces(weight: Tensor, group_size: int) -> Iterator[_Piece]:
    """A weight ``[out, in]`` in pieces: a short last group apart; rows by what a cache holds.

    A GPU takes all rows at once, as does a weight without numbers, of which memory is counted.
    Whatever rounds goes by these pieces, so that sums are made in one
    order and codes are the same to the bit.
    """
    rows, columns = weight.shape
    size = min(group_size, columns)
    full = columns // size
    in_cache = weight.device.type == "cpu" and not isinstance(weight, FakeTensor)
    step = max(1, _CACHED // columns) if in_cache else max(1, rows)
    for first in range(0, rows, step):
        part = slice(first, first + step)
        yield _Piece(part, slice(0, full * size), slice(0, full), size)
        if rest := columns - full * size:
            yield _Piece(part, slice(full * size, columns), slice(full, full + 1), rest)


def _codes(groups: Tensor) -> tuple[Tensor, Tensor]:
    """Codes of ``[rows, groups, size]`` as floats, and the thresholds ``[rows, groups, 1]``.

    The comparison is made in place, since bools and choices are several times slower in torch on a
    CPU than floats.
    """
    codes = groups.abs()
    threshold = codes.sum(2, keepdim=True).mul_(THRESHOLD / groups.shape[2])
    return torch.copysign(codes.gt_(threshold), groups, out=codes), threshold


def quantize(weight: Tensor, group_size: int) -> Tensor:
    """Codes of a weight ``[out, in]``: the sign where ``|w| > 0.7 * mean|w|`` of the group, else 0.

    Returns int8 ``[out, in]``. Of Gaussian weights 42 % become 0.

    >>> quantize(torch.tensor([[1.0, -2.0, 0.1, 0.0]]), 4).tolist()
    [[1, -1, 0, 0]]
    """
    weight = weight.detach()
    codes = torch.empty(weight.shape, dtype=torch.int8, device=weight.device)
    for piece in _pieces(weight, group_size):
        piece.of(codes).copy_(_codes(piece.of(weight).float())[0])
    return codes


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


def _rounded(
    weight: Tensor, scale: Tensor, shift: Tensor | None, group_size: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    values = torch.empty(weight.shape, dtype=dtype, device=weight.device)
    codes = torch.empty(weight.shape, dtype=torch.int8, device=weight.device)
    for piece in _pieces(weight, group_size):
        own, threshold = _codes(piece.of(weight).float())
        piece.of(codes).copy_(own)
        # A weight that is not finite has no code; its group becomes NaN, for the loss to tell.
        own.mul_(piece.per_group(scale) + threshold * 0)
        if shift is not None:
            own.add_(piece.per_group(shift))
        piece.of(values).copy_(own)
    return values, codes


def fuses(device: torch.device) -> bool:
    """Whether passes over a weight are fused into one kernel there: on a GPU with Triton.

    On a CPU `torch.compile` would need a C++ compiler at run time; pieces stay in its cache there.
    """
    return device.type == "cuda" and bool(torch.utils._triton.has_triton())


@functools.cache
def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    return torch.compile(function, dynamic=False)


def rounded(
    weight: Tensor,
    scale: Tensor,
    shift: Tensor | None,
    group_size: int,
    dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor]:
    """The value of `fake_quantize` and its codes, ``[out, in]`` of ``dtype`` and int8; no gradient.

    The value is computed in float32 and rounded once. The weight is read once from memory.
    """
    with torch.no_grad():
        run = _compiled(_rounded) if fuses(weight.device) else _rounded
        found: tuple[Tensor, Tensor] = run(weight, scale, shift, group_size, dtype)
        return found


def _gradients(
    gradient: Tensor,
    codes: Tensor,
    scale: Tensor,
    group_size: int,
    ste: str,
    dtype: torch.dtype,
    wanted: tuple[bool, bool, bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    to_weight = None
    if wanted[0]:
        as_it_is = ste == "identity" and gradient.dtype == dtype
        to_weight = gradient if as_it_is else torch.empty_like(gradient, dtype=dtype)
    to_scale = torch.empty_like(scale) if wanted[1] else None
    to_shift = torch.empty_like(scale) if wanted[2] else None
    for piece in _pieces(gradient, group_size):
        into = None if to_weight is None or to_weight is gradient else piece.of(to_weight)
        if into is not None and into.dtype == torch.float32:
            g = into.copy_(piece.of(gradient))
        else:
            g = piece.of(gradient).float()
        if to_shift is not None:
            piece.per_group(to_shift).copy_(g.sum(2, keepdim=True))
        if to_scale is not None:
            own = piece.of(codes).float().mul_(g)
            piece.per_group(to_scale).copy_(own.sum(2, keepdim=True))
        if into is not None and ste == "ttq":
            nonzero = piece.of(codes).float().abs_()
            g = g * (1 - nonzero).add_(nonzero * piece.per_group(scale))
        if into is not None and g is not into:
            into.copy_(g)
    return to_weight, to_scale, to_shift


def straight_through(
    gradient: Tensor,
    codes: Tensor,
    scale: Tensor,
    group_size: int,
    ste: str = "identity",
    *,
    dtype: torch.dtype = torch.float32,
    wanted: tuple[bool, bool, bool] = (True, True, True),
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """The gradients of `fake_quantize` for weight, scale and shift, from that of its value.

    ``wanted`` says which; the others are None. That of the weight is of ``dtype``; it may be
    ``gradient`` itself.
    """
    with torch.no_grad():
        run = _compiled(_gradients) if fuses(gradient.device) else _gradients
        found: tuple[Tensor | None, Tensor | None, Tensor | None] = run(
            gradient.contiguous(), codes, scale, group_size, ste, dtype, wanted
        )
        return found


class _FakeQuantize(torch.autograd.Function):
    """`fake_quantize` with its straight-through gradient."""

    @staticmethod
    def forward(
        ctx: Any,
        weight: Tensor,
        scale: Tensor,
        shift: Tensor | None,
        group_size: int,
        ste: str,
        dtype: torch.dtype,
    ) -> Tensor:
        value, codes = rounded(weight, scale, shift, group_size, dtype)
        ctx.save_for_backward(codes, scale)
        ctx.group_size, ctx.ste, ctx.dtype = group_size, ste, weight.dtype
        return value

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        codes, scale = ctx.saved_tensors
        found = straight_through(
            gradients[0],
            codes,
            scale,
            ctx.group_size,
            ctx.ste,
            dtype=ctx.dtype,
            wanted=ctx.needs_input_grad[:3],
        )
        return *found, None, None, None


def fake_quantize(
    weight: Tensor,
    scale: Tensor,
    shift: Tensor | None,
    group_size: int,
    ste: Literal["identity", "ttq"] = "identity",
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """The value of `dequantize(quantize(weight))` with a gradient: ``[out, in]`` of ``dtype``.

    ``d scale = sum g * code`` and ``d shift = sum g`` over the group (chain rule). The rounding
    passes its gradient straight through: ``d w = g`` (``identity``), or ``g * scale`` where the
    code is not 0 and ``g`` where it is (``ttq``, after Trained Ternary Quantization; attributed to
    TernaryLLM by a reviewer of Tequila, arXiv 2509.23809; original not seen). Sums are in float32.
    """
    value: Tensor = _FakeQuantize.apply(weight, scale, shift, group_size, ste, dtype)  # type: ignore[no-untyped-call]
    return value


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
