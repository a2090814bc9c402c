"""Ternary by value: codes, scale and shift of a dense weight whose groups hold three values.

Releases such as Spectra's TriLM exist only as dense tensors, though every group of weights is
``scale * code (+ shift)``. What is found here gives the tensor's values back to the bit, once
rounded to the tensor's own type; where float16 stands in the way (the scale of a float32
checkpoint) the values are rounded once more, and by how much is told. It is arithmetic, from no
paper.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ternq.ternary import TernaryWeight, group_lengths, grouped, ungrouped

_POWERS = tuple(2**k for k in range(4, 15))  # 16 ... 16384
_SHARDS = range(1, 17)  # a scale for each of so many parts of a row: models trained in parallel
_BLOCK = 2**20  # weights looked at in one go, so that the passes over them stay in the cache
_PARTS = (0.0, *(sign * part / 8 for part in range(1, 9) for sign in (1, -1)))
_PAIRS = ((-1, 1), (0, 1), (-1, 0))  # codes that two values of a group may have


class NotTernaryError(ValueError):
    """A group holds more than three values, or values that no scale and shift explain."""

    def __init__(self, row: int, columns: tuple[int, int], values: int) -> None:
        where = f"row {row}, columns {columns[0]} to {columns[1] - 1}"
        super().__init__(f"{where}: {values} distinct values")
        self.row, self.columns, self.values = row, columns, values


@dataclass(frozen=True)
class Recovered:
    """A ternary weight, and the largest error of a value in units of its scale; 0 if exact."""

    weight: TernaryWeight
    error: float


def recover(weight: Tensor, group_size: int, shift: bool) -> Recovered:
    """Codes, scale and shift of a dense weight ``[out, in]`` that is ternary by value.

    Without ``shift`` a group may hold ``-s``, 0 and ``s``; with it any three values that are
    equally spaced, up to the rounding of the tensor's type. Of several pairs (scale, shift) that
    give two values, that with the smallest shift is taken. The form is `ternary.canonical`'s.

    Raises:
        NotTernaryError: a group is not so; it names the first such row.
        ValueError: a scale or shift is not finite in float16, or vanishes there; or the type is
            none of float32, bfloat16 and float16.

    >>> found = recover(torch.tensor([[0.5, 0.0, -0.5, 0.5]]), 4, shift=False)
    >>> found.weight.codes.tolist(), found.weight.scale.tolist(), found.error
    ([[1, 0, -1, 1]], [[0.5]], 0.0)
    """
    if weight.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise ValueError(f"its type is {weight.dtype}, not float32, bfloat16 or float16")
    part = _with_shift if shift else _symmetric
    step = max(1, _BLOCK // max(1, weight.shape[1]))
    parts, error = [], 0.0
    for first in range(0, len(weight), step):
        try:
            found = part(weight[first : first + step], group_size)
        except NotTernaryError as wrong:
            raise NotTernaryError(first + wrong.row, wrong.columns, wrong.values) from None
        parts.append(found.weight)
        error = max(error, found.error)
    shifts = [p.shift for p in parts if p.shift is not None]
    whole = TernaryWeight(
        torch.cat([p.codes for p in parts]),
        torch.cat([p.scale for p in parts]),
        torch.cat(shifts) if shifts else None,
        group_size,
    )
    return Recovered(whole, error)


def scheme_of(samples: Sequence[Tensor], group_size: int | None = None) -> tuple[int, bool] | None:
    """The largest group size, and whether shifts are needed, for rows ``[n, in]`` of all layers.

    Tried are whole rows, their equal parts, and powers of two, down to 16; without shifts first.
    None if nothing makes all of them ternary.
    """
    widths = {sample.shape[1] for sample in samples}
    parts = {width // n for width in widths for n in _SHARDS if width % n == 0}
    sizes = sorted({n for n in parts | {*_POWERS} if n >= min(_POWERS)} | {max(widths)})
    for shift in (False, True):
        for size in [group_size] if group_size else reversed(sizes):
            if size <= max(widths) and all(_is_ternary(s, size, shift) for s in samples):
                return size, shift
    return None


def _is_ternary(sample: Tensor, group_size: int, shift: bool) -> bool:
    try:
        recover(sample, group_size, shift)
    except ValueError:
        return False
    return True


def _symmetric(weight: Tensor, group_size: int) -> Recovered:
    """Values ``-s``, 0, ``s``: seen in the bits, where all but the sign is compared as a number."""
    groups = grouped(weight, group_size)
    bits = groups.view(torch.int16 if weight.itemsize == 2 else torch.int32)
    magnitude = torch.iinfo(bits.dtype).max
    top = (bits & magnitude).amax(2)
    least = ((bits - 1) & magnitude).amin(2) + 1  # of those that are not 0: 0 comes out largest
    if bool(((top != least) & (top != 0)).any()):
        seen = bits & magnitude
        _refuse((seen != 0) & (seen != top.unsqueeze(2)), weight, group_size)
    value = top.view(weight.dtype).double()
    scale = _half("scale", value)
    error = float(((scale.double() - value).abs() / value.clamp(min=1e-300)).max())
    codes = weight.sign().to(torch.int8)
    return Recovered(TernaryWeight(codes, scale, None, group_size), error)


def _with_shift(weight: Tensor, group_size: int) -> Recovered:
    """Any three equally spaced values of a group; its rest is filled with its first value."""
    rows, columns = weight.shape
    groups = grouped(weight.double(), group_size)
    inside = grouped(torch.ones(1, columns), group_size).bool()
    groups = torch.where(inside, groups, groups[:, :, :1])
    low, high = groups.amin(2), groups.amax(2)
    between = (groups != low.unsqueeze(2)) & (groups != high.unsqueeze(2))
    infinity = torch.full_like(groups, torch.inf)
    middle = torch.where(between, groups, infinity).amin(2)
    _refuse(between & (groups != middle.unsqueeze(2)), weight, group_size)
    three = between.any(2)
    step = torch.finfo(weight.dtype).eps * torch.maximum(low.abs(), high.abs())
    uneven = three & ((low + high - 2 * middle).abs() > 4 * step)
    _refuse(uneven.unsqueeze(2).expand_as(groups) & inside, weight, group_size)

    scale, shift, found = _solved(weight.dtype, low, high, (-1, 1), middle, three)
    codes = torch.where(groups == high.unsqueeze(2), 1, 0) - torch.where(
        groups == low.unsqueeze(2), 1, 0
    )
    two = ~three & (low != high)
    best = torch.where(found | ~two, shift.abs(), torch.inf)
    for pair in _PAIRS[1:]:
        s, h, ok = _solved(weight.dtype, low, high, pair, middle, three)
        better = two & ok & (h.abs() < best)
        scale, shift = torch.where(better, s, scale), torch.where(better, h, shift)
        own = torch.where(groups == high.unsqueeze(2), pair[1], pair[0])
        codes = torch.where(better.unsqueeze(2), own, codes)
        best = torch.where(better, h.abs(), best)
    one = low == high
    scale, shift = torch.where(one, torch.zeros_like(scale), scale), torch.where(one, low, shift)
    codes = torch.where(one.unsqueeze(2), torch.zeros_like(codes), codes).to(torch.int8)
    half_scale, half_shift = _half("scale", scale), _half("shift", shift) + 0.0
    made = codes * half_scale.double().unsqueeze(2) + half_shift.double().unsqueeze(2)
    wrong = made.to(weight.dtype).double() != groups
    units = torch.where(half_scale > 0, half_scale.double(), high.abs().clamp(min=1e-30))
    error = float(((made - groups).abs() / units.unsqueeze(2) * wrong).max())
    codes = ungrouped(codes, columns).contiguous()
    return Recovered(TernaryWeight(codes, half_scale, half_shift, group_size), error)


def _solved(
    dtype: torch.dtype,
    low: Tensor,
    high: Tensor,
    pair: tuple[int, int],
    middle: Tensor,
    three: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Float16 scale and shift ``[rows, groups]``, as doubles, that round to the values seen.

    A value stands for the interval that is rounded to it. Shifts are tried across the interval of
    the value whose code is 0 (or around the middle of the two values), and with each a scale from
    the interval that the shift leaves. Also returned is where they were found.
    """
    exact = (high - low) / (pair[1] - pair[0])
    offset = torch.where(three, middle, low - pair[0] * exact)
    wide_low, wide_high = _half_step(low, dtype), _half_step(high, dtype)
    width = {0: wide_low, -1: (wide_low + wide_high) / 2}[pair[0]]
    width = torch.where(three, _half_step(middle, dtype), wide_high if pair[1] == 0 else width)
    scale, shift, found = exact, offset, torch.zeros_like(three)
    for part in _PARTS:
        h = (offset + part * width).half().double()
        above = (high - h, wide_high) if pair[1] else (h - low, wide_low)
        below = (h - low, wide_low) if pair[0] else above
        first = torch.maximum(above[0] - above[1], below[0] - below[1])
        last = torch.minimum(above[0] + above[1], below[0] + below[1])
        for where in (0.5, 0.25, 0.75, 0.0, 1.0):
            s = (first + where * (last - first)).half().double()
            fits = ((h + pair[0] * s).to(dtype).double() == low) & (s > 0)
            fits &= (h + pair[1] * s).to(dtype).double() == high
            fits &= ~three | (h.to(dtype).double() == middle)
            new = fits & ~found
            scale, shift = torch.where(new, s, scale), torch.where(new, h, shift)
            found = found | fits
        if bool((found | (low == high)).all()):
            break
    return scale, shift, found


def _half_step(values: Tensor, dtype: torch.dtype) -> Tensor:
    """Half the distance to the next number of the type: how far a rounded value may be off."""
    exponent = torch.frexp(values).exponent - 1
    return torch.ldexp(torch.full_like(values, torch.finfo(dtype).eps / 2), exponent)


def _half(name: str, values: Tensor) -> Tensor:
    half = values.half()
    if not bool(half.isfinite().all()):
        raise ValueError(f"a {name} is not finite or too large for float16")
    if bool(((half == 0) & (values != 0)).any()):
        raise ValueError(f"a {name} is too small for float16")
    return half


def _refuse(wrong: Tensor, weight: Tensor, group_size: int) -> None:
    """`NotTernaryError` for the first wrong one of groups ``[rows, groups, group_size]``."""
    if not bool(wrong.any()):
        return
    row, group = (int(n) for n in wrong.any(2).nonzero()[0])
    first = group * group_size
    last = first + int(group_lengths(weight.shape[1], group_size)[group])
    raise NotTernaryError(row, (first, last), len(torch.unique(weight[row, first:last])))
