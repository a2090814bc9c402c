"""What of a ternary weight a GGUF type can hold: to the bit, within one rounding, or with loss.

Types without a minimum hold ``scale * code`` exactly. In those with one a weight
``scale * code + shift`` is ``d * level + m``, with ``d`` the scale, ``level = code + c`` and
``m = shift - c * d`` rounded to float16. ``c`` and the sign of ``d`` (with it, of the codes) are
free; taken so that ``m`` is small, its rounding is at most 2^-11 of the scale as long as the shift
is at most 15 scales (Q4_1), or 3 (Q2_K). Without shift ``m = -d`` is exact.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ternq.errors import RecipeError
from ternq.formats.gguf_codec import FINE, KINDS, Blocks, Kind
from ternq.formats.groups import common_size, largest_error, regrouped, relative_error
from ternq.ternary import TernaryWeight, fit

ONE_ROUNDING = 5e-4  # of the scale: 2^-11, and room for float32


@dataclass(frozen=True)
class Fitted:
    """A layer as blocks of a type.

    ``error`` is the largest in units of the scale; ``lost`` the relative error (Frobenius norm) if
    more than one rounding was lost, else None.
    """

    blocks: Blocks
    error: float
    lost: float | None


def fitted(name: str, weight: TernaryWeight, kind: Kind, exact: bool, lossy: bool) -> Fitted:
    """A layer in the blocks of a type.

    Raises:
        RecipeError: the rows are no multiple of the block, or something is rounded that ``exact``
            forbids, or more is lost than one rounding without ``lossy``.
    """
    columns = weight.codes.shape[1]
    if columns % kind.block:
        raise RecipeError(
            f"Layer {name} has rows of {columns} weights, which blocks of {kind.block} "
            f"({kind.name}) do not divide.",
            f"{nearest(weight)}.",
        )
    blocks, reason = _blocks(weight, kind)
    error = largest_error(weight, blocks.values())
    if reason is None and error > ONE_ROUNDING:
        reason = f"rounding moves a weight by {error:.2g} of its scale"
    if error and (exact or (reason is not None and not lossy)):
        raise RecipeError(
            f"{kind.name} does not hold layer {name} as it is: {reason or 'its shift is rounded'} "
            f"(largest error {error:.2g} of a scale).",
            f"{nearest(weight)}." + (" Or leave out --exact." if exact else " Or pass --lossy."),
        )
    lost = relative_error(weight, blocks.values()) if error and reason is not None else None
    return Fitted(blocks, error, lost)


def nearest(weight: TernaryWeight) -> str:
    """The smallest type that holds a layer, in a sentence without its full stop."""
    columns = weight.codes.shape[1]
    kind = smallest(columns, weight.group_size, _has_shift(weight))
    if kind is None:
        return "No GGUF type holds it: choose --format dense"
    return f"{kind.name} holds it " + ("with one rounding" if _has_shift(weight) else "exactly")


def smallest(columns: int, group_size: int, shift: bool) -> Kind | None:
    """The smallest type whose blocks divide rows and groups; None if there is none."""
    size = common_size(columns, group_size)
    kinds = (KINDS[name] for name in (("Q4_1",) if shift else ("TQ2_0", "Q2_0", "Q4_1")))
    return next((kind for kind in kinds if size % kind.block == 0), None)


def _has_shift(weight: TernaryWeight) -> bool:
    return weight.shift is not None and bool(weight.shift.any())


def _blocks(weight: TernaryWeight, kind: Kind) -> tuple[Blocks, str | None]:
    """The most faithful blocks, and what they cannot hold, if anything."""
    cut = _cut(weight, kind.block)
    straddled = f"blocks of {kind.block} span groups of {weight.group_size} with other scales"
    if kind.minimum:
        if cut is not None:
            return _centred(cut, kind), None
        return (_refined if kind.name == "Q2_K" else _requantized)(weight, kind), straddled
    if cut is not None and not _has_shift(cut):
        return Blocks((cut.codes + 1).to(torch.uint8), cut.scale), None
    refit, _ = fit(weight.dequantized(), weight.codes, kind.block, shift=False)
    reason = straddled if cut is None else "it has no shift, and the layer has one"
    return Blocks((weight.codes + 1).to(torch.uint8), refit.half()), reason


def _cut(weight: TernaryWeight, block: int) -> TernaryWeight | None:
    """The same weight in groups of ``block``, or None if a block would need two scales.

    Groups whose scale is 0 have their shift as only value; they go along with any scale.
    """
    size = math.gcd(common_size(weight.codes.shape[1], weight.group_size), block)
    fine = regrouped(weight, size)
    live = fine.scale.repeat_interleave(size, 1) != 0
    codes = torch.where(live, fine.codes, torch.zeros_like(fine.codes))
    scale = torch.unflatten(fine.scale, 1, (-1, block // size))
    first = scale.gather(2, scale.abs().argmax(2, keepdim=True))
    alike = ((scale == first) | (scale == 0)).all()
    shift = None if fine.shift is None else torch.unflatten(fine.shift, 1, (-1, block // size))
    if shift is not None:
        alike &= (shift == shift[:, :, :1]).all()
        shift = shift[:, :, 0]
    return TernaryWeight(codes, first.squeeze(2), shift, block) if alike else None


def _centred(weight: TernaryWeight, kind: Kind) -> Blocks:
    """``d * level + m`` with a small ``m``: one pair for each block of the weight."""
    scale = weight.scale.float()
    shift = torch.zeros_like(scale) if weight.shift is None else weight.shift.float()
    one = torch.ones_like(scale)
    sign = torch.where((shift < 0) != (scale < 0), -one, one)
    distance = torch.where(scale == 0, one, (shift / scale).abs())
    centre = distance.round().clamp(1, kind.top - 1)
    d = scale * sign
    minimum = (shift - centre * d).half()

    def spread(values: Tensor) -> Tensor:
        return values.repeat_interleave(kind.block, 1)

    levels = (weight.codes * spread(sign) + spread(centre)).to(torch.uint8)
    return Blocks(levels, d.half(), minimum)


def _refined(weight: TernaryWeight, kind: Kind) -> Blocks:
    """Q2_K with several groups in a block: scales and minima as factors from 0 to 15 of one."""
    columns = weight.codes.shape[1]
    size = math.gcd(common_size(columns, weight.group_size), FINE)
    if size != FINE:
        raise RecipeError(
            f"Groups of {weight.group_size} in rows of {columns} are no multiple of {FINE}, the "
            f"columns that share a scale in {kind.name}.",
            f"{nearest(weight)}.",
        )
    fine = regrouped(weight, FINE)
    scale = fine.scale.float().abs()
    sign = torch.where(fine.scale < 0, -1, 1).repeat_interleave(FINE, 1)
    below = scale if fine.shift is None else scale - fine.shift.float()
    d, of_scale = _factors(scale)
    minimum, of_minimum = _factors(below.clamp(min=0))
    levels = (fine.codes * sign + 1).to(torch.uint8)
    return Blocks(levels, d, -minimum, (of_scale, of_minimum))


def _factors(values: Tensor) -> tuple[Tensor, Tensor]:
    """float16 units ``[rows, n / 16]`` and uint8 factors ``[rows, n]`` of values >= 0."""
    blocks = torch.unflatten(values, 1, (-1, FINE))
    unit = (blocks.amax(2, keepdim=True) / 15).half()
    safe = torch.where(unit == 0, torch.ones_like(unit), unit).float()
    return unit.squeeze(2), (blocks / safe).round().clamp(0, 15).to(torch.uint8).flatten(1)


def _requantized(weight: TernaryWeight, kind: Kind) -> Blocks:
    """Q4_1 with several groups in a block: its 16 levels from the least to the largest weight."""
    blocks = torch.unflatten(weight.dequantized(), 1, (-1, kind.block))
    minimum = blocks.amin(2, keepdim=True).half()
    scale = ((blocks.amax(2, keepdim=True) - minimum.float()) / kind.top).half()
    safe = torch.where(scale == 0, torch.ones_like(scale), scale).float()
    levels = ((blocks - minimum.float()) / safe).round().clamp(0, kind.top)
    return Blocks(levels.to(torch.uint8).flatten(1), scale.squeeze(2), minimum.squeeze(2))
