"""BiLLM: binary weights, a second bit for salient columns, two scales for the others.

Source: BiLLM (Huang et al. 2024, arXiv 2402.04291): its abstract, and its published code
(github.com/Aaronhuang-778/BiLLM, ``bigptq.py``, ``binary.py``, ``utils``), read; the paper's text
was not. In each block of columns, with ``U`` the root of the inverse Hessian and sensitivities
``s_ij = w_ij^2 / U_jj^2``:

- The salient columns are those of the largest sum of ``s``; how many (1 to 49) is chosen so that
  ``s``, binarised twice on both sides of the cut, has the least squared error.
- The other weights are split at a magnitude of ``s``: of 81 quantiles, the one where ``s``,
  binarised on each side, has the least squared error.
- ``binarised``: ``mean + mean|w - mean| sign(w - mean)`` of a row's weights in the part; a salient
  column gets that of what is left once more (residual).
- The error of the block is compensated by the columns after it, as in GPTQ.

Searching on ``s`` and not on the weights is what the published code does. What is ours: errors
pass on as within the block too (`ternq.compensate.errors_of`), where the published code divides by
the diagonal alone; means and scales are rounded to float16.

The paper's 1.1 bits are the signs. Stored are also, and counted here: which side of the split each
weight is on (a bit), which columns are salient (a bit a column), and four means and four scales of
16 bits for every row of a block.
"""

import torch
from torch import Tensor

from ternq.compensate import by_groups, errors_of, output_error
from ternq.grid import VALUE_BITS, Rounded
from ternq.ternary import n_groups

MOST = 50  # one more than the salient columns of a block
QUANTILES = (0.1, 0.9, 81)
PARTS = 4  # means and scales of a row: two of salient columns, one on each side of the split


def billm(weight: Tensor, hessian: Tensor, group_size: int) -> Rounded:
    """Round a weight ``[out, in]`` for inputs of second moments ``hessian`` ``[in, in]``.

    Raises:
        ValueError: something is not finite, or a mean or scale is beyond float16.
    """
    values = torch.empty(weight.shape[::-1], device=weight.device)
    signs = weight.numel()

    def rounded(part: Tensor, own: Tensor, group: slice) -> Tensor:
        nonlocal signs
        block = part.t().contiguous()
        found, salient = binarise(block, block.square() / own.diagonal().square())
        values[group] = found.t()
        signs += len(weight) * int(salient.sum())
        return errors_of(part - values[group], own)

    dead, damping = by_groups(weight, hessian, group_size, rounded)
    whole = values.t().contiguous()
    if not bool(torch.isfinite(whole).all()):
        raise ValueError("a mean or a scale is too large for float16")
    return Rounded(whole, signs, output_error(weight, whole, hessian), dead, damping)


def stored_bits(rows: int, columns: int, group_size: int) -> int:
    """Bits of a layer. A weight has a sign, and a second one or a side; see above for the rest.

    >>> stored_bits(1, 128, 128) / 128
    4.0
    """
    beside = 2 * PARTS * VALUE_BITS * n_groups(columns, group_size)
    return rows * (2 * columns + beside) + columns


def binarise(block: Tensor, sensitivity: Tensor) -> tuple[Tensor, Tensor]:
    """The values of a block ``[out, m]``, and which columns are salient, bool ``[m]``."""
    salient = salient_columns(sensitivity)
    inside = salient.expand_as(block)
    split = break_point(sensitivity, inside)
    low = ~inside & (sensitivity < split)
    high = ~inside & (sensitivity >= split)
    found = binarised(block, inside, 2, half=True)
    found += binarised(block, low, half=True) + binarised(block, high, half=True)
    return found, salient


def salient_columns(sensitivity: Tensor) -> Tensor:
    """Which columns of ``[out, m]`` are salient, bool ``[m]``: none, where there is one only."""
    order = sensitivity.sum(0).argsort(descending=True)
    best, least = torch.zeros(len(order), dtype=torch.bool, device=order.device), torch.inf
    for count in range(1, min(MOST, len(order))):
        salient = torch.zeros_like(best)
        salient[order[:count]] = True
        inside = salient.expand_as(sensitivity)
        found = binarised(sensitivity, inside, 2) + binarised(sensitivity, ~inside, 2)
        error = float((sensitivity - found).square().sum())
        if error < least:
            best, least = salient, error
    return best


def break_point(sensitivity: Tensor, salient: Tensor) -> Tensor:
    """Where the weights that are not ``salient`` ``[out, m]`` are split: no dimensions."""
    others = torch.where(salient, torch.zeros_like(sensitivity), sensitivity).flatten()
    order = others.sort().values
    places = torch.linspace(*QUANTILES, device=order.device) * (len(order) - 1)
    below = places.long()
    points = torch.lerp(order[below], order[(below + 1).clamp(max=len(order) - 1)], places - below)
    best, least = points[0], torch.inf
    for point in points:
        low, high = ~salient & (sensitivity < point), ~salient & (sensitivity >= point)
        found = binarised(sensitivity, low) + binarised(sensitivity, high)
        error = float(torch.where(salient, found, sensitivity - found).square().sum())
        if error < least:
            best, least = point, error
    return best


def binarised(rows: Tensor, part: Tensor, times: int = 1, *, half: bool = False) -> Tensor:
    """The weights of ``part`` (bool ``[out, m]``) as mean and sign times scale, a row; others 0.

    ``times`` 2 does the same with what is left, and adds it. ``half``: means and scales of float16.
    """
    dtype = torch.float16 if half else rows.dtype
    count = part.sum(1, keepdim=True).clamp(min=1)
    found = torch.zeros_like(rows)
    for _ in range(times):
        left = torch.where(part, rows - found, 0)
        mean = (left.sum(1, keepdim=True) / count).to(dtype).float()
        left = torch.where(part, left - mean, 0)
        scale = (left.abs().sum(1, keepdim=True) / count).to(dtype).float()
        found = found + torch.where(part, mean + torch.where(left < 0, -scale, scale), 0)
    return found
