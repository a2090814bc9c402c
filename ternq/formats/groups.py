"""Groups of other formats: smaller ones that hold the same numbers, and what rounding costs.

A format that wants groups of one size that divides the row gets it by repeating scale and shift:
no weight changes, and nothing is fitted anew.
"""

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from ternq.source import Source
from ternq.ternary import TernaryWeight, grouped


def common_size(columns: int, group_size: int) -> int:
    """The largest size that divides the row and all its groups; the whole row if it is one group.

    >>> common_size(576, 128), common_size(640, 128), common_size(100, 128)
    (64, 128, 100)
    """
    return math.gcd(columns, min(columns, group_size))


def regrouped(weight: TernaryWeight, group_size: int) -> TernaryWeight:
    """The same weight in smaller groups: scale and shift ``[out, in / group_size]``, repeated.

    Raises:
        ValueError: the size divides not all of the groups.
    """
    columns = weight.codes.shape[1]
    if common_size(columns, weight.group_size) % group_size:
        raise ValueError(
            f"groups of {weight.group_size} in {columns} cannot be cut by {group_size}"
        )
    origin = torch.arange(0, columns, group_size) // weight.group_size
    shift = None if weight.shift is None else weight.shift[:, origin]
    return TernaryWeight(weight.codes, weight.scale[:, origin], shift, group_size)


def largest_error(weight: TernaryWeight, stored: Tensor) -> float:
    """The largest difference of ``stored`` ``[out, in]`` to the weight, in units of its scale.

    In a group whose scale is 0 all weights are its shift, and that is the unit.
    """
    error = grouped((stored.float() - weight.dequantized()).abs(), weight.group_size).amax(2)
    unit = weight.scale.float()
    if weight.shift is not None:
        unit = torch.where(unit == 0, weight.shift.float().abs(), unit)
    return float(torch.where(error == 0, error, error / unit).max())


def relative_error(weight: TernaryWeight, stored: Tensor) -> float:
    """The Frobenius norm of the difference, over that of the weight."""
    exact = weight.dequantized()
    return float((stored.float() - exact).norm() / exact.norm().clamp(min=1e-30))


def regrouping(source: Source, sizes: Mapping[str, int]) -> list[str]:
    """How groups were cut, in a sentence, or nothing; ``sizes`` are those of the layers."""
    smaller = sorted({size for size in sizes.values() if size < source.group_size})
    if not smaller:
        return []
    return [
        f"Groups of {source.group_size} are stored as groups of "
        f"{' and '.join(map(str, smaller))}, scales repeated: no weight changes."
    ]
