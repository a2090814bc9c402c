"""PT2-LLM's ternary rounding without training: alternating fit, then a fit to the inputs.

Source: PT2-LLM (arXiv 2510.03267, full text read by the authors of our notes, not by this file's;
its published code had no quantizer when looked at). In each group of ``m`` columns:

- ITF: shift the mean of the group, threshold ``0.75 / m sum |w - shift|``, scale TWN's; then in
  turn scale and shift by least squares (eq. 9, `ternq.ternary.fit`) and the nearest codes, until
  codes stay as they are.
- AGA: with these codes, the scale and shift that minimise the error of the group's *output*, for
  inputs of second moments ``S``, once.
- The error of the group is compensated by the columns after it, as in GPTQ.

The notes quote AGA with products element by element, ``(W o T) S 1``; that is the minimum only
where ``S`` is diagonal, and a sum that may be weighed negatively elsewhere. Here the minimum itself
is taken, ``T S W'``. Left out: the paper's order of columns (SSR), which groups of consecutive
columns cannot hold.
"""

import torch
from torch import Tensor

from ternq import ternary
from ternq.compensate import Compensated, by_groups, errors_of, output_error

THRESHOLD = 0.75
ITERATIONS = 50  # at most; about ten in the paper


def pt2(weight: Tensor, hessian: Tensor, group_size: int) -> Compensated:
    """Round a weight ``[out, in]`` for inputs of second moments ``hessian`` ``[in, in]``.

    Raises:
        ValueError: weight or Hessian is not finite.
    """
    whole = torch.empty(weight.shape[::-1], device=weight.device)
    found: list[tuple[Tensor, Tensor]] = []

    def rounded(part: Tensor, own: Tensor, group: slice) -> Tensor:
        rows = part.t().contiguous()
        codes = itf(rows)
        scale, shift = aga(rows, codes, hessian[group, group].float())
        found.append((scale, shift))
        whole[group] = codes.t()
        return errors_of((rows - scale[:, None] * codes - shift[:, None]).t().contiguous(), own)

    dead, damping = by_groups(weight, hessian, group_size, rounded)
    scale, shift = (torch.stack(parts, 1) for parts in zip(*found, strict=True))
    codes = whole.t().contiguous().to(torch.int8)
    values = ternary.dequantize(codes, scale, shift, group_size)
    size = torch.where(scale == 0, torch.ones_like(scale), scale.abs())
    latent = ternary.dequantize(codes, size, None, group_size)  # has these codes by threshold
    error = output_error(weight, values, hessian)
    return Compensated(latent, codes, scale, shift, error, dead, damping)


def itf(rows: Tensor) -> Tensor:
    """Codes of a group ``[out, m]``, as float: the alternating fit from the centred start."""
    shift = rows.mean(1, keepdim=True)
    apart = rows - shift
    limit = THRESHOLD * apart.abs().mean(1, keepdim=True)
    codes = torch.sign(apart) * (apart.abs() > limit)
    for _ in range(ITERATIONS):
        scale, offset = ternary.fit(rows, codes, rows.shape[1])
        assert offset is not None, "it was asked for"
        new = nearest(rows, scale, offset)
        if torch.equal(new, codes):
            break
        codes = new
    return codes


def nearest(rows: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """The codes whose ``scale * code + shift`` is nearest; 0 where the scale is 0."""
    size = torch.where(scale == 0, torch.full_like(scale, torch.inf), scale)
    return torch.round((rows - shift) / size).clamp(-1, 1)


def aga(rows: Tensor, codes: Tensor, moments: Tensor) -> tuple[Tensor, Tensor]:
    """Scale and shift ``[out]`` that minimise ``(w - scale t - shift) S (w - scale t - shift)'``.

    ``moments`` is S ``[m, m]``. With ``d = 1 S 1'``, ``v = t S 1'`` and ``q = t S t'``::

        scale = (d t S w' - v w S 1') / (d q - v^2)      shift = (q w S 1' - v t S w') / (d q - v^2)

    Rows that this does not determine keep the least squares of the weights.
    """
    moved, ones = codes @ moments, moments.sum(1)
    ts, tw = (moved * codes).sum(1), (moved * rows).sum(1)
    v, ws, d = codes @ ones, rows @ ones, ones.sum()
    determinant = d * ts - v * v
    solvable = determinant > 1e-6 * d * ts
    safe = torch.where(solvable, determinant, torch.ones_like(determinant))
    plain, offset = ternary.fit(rows, codes, rows.shape[1])
    assert offset is not None, "it was asked for"
    scale = torch.where(solvable, (d * tw - v * ws) / safe, plain[:, 0])
    return scale, torch.where(solvable, (ts * ws - v * tw) / safe, offset[:, 0])
