"""Embeddings in 8 bits: every row is ``scale * integer``, integer in -127 ... 127.

Symmetric, row by row, to nearest: what the field calls absmax quantization.
"""

import torch
from torch import Tensor


def quantize_rows(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Int8 ``[rows, columns]`` and float16 scale ``[rows]`` with ``weight ~ scale * int8``.

    The scale is ``max|w| / 127`` of the row, rounded to float16; an error is at most half of it,
    or a little more in the largest weights where float16 rounded it down.

    Raises:
        ValueError: a scale is not finite in float16.

    >>> codes, scale = quantize_rows(torch.tensor([[1.27, -0.635, 0.0]]))
    >>> codes.tolist(), round(float(scale), 4)
    ([[127, -64, 0]], 0.01)
    """
    rows = weight.detach().float()
    scale = (rows.abs().amax(1) / 127).half()
    if not bool(scale.isfinite().all()):
        raise ValueError("a row is not finite or too large for float16")
    safe = torch.where(scale > 0, scale.float(), torch.ones_like(scale, dtype=torch.float32))
    codes = (rows / safe.unsqueeze(1)).round_().clamp_(-127, 127)
    return torch.where(scale.unsqueeze(1) > 0, codes, 0).to(torch.int8), scale


def dequantize_rows(codes: Tensor, scale: Tensor) -> Tensor:
    """``scale * codes``, float32 ``[rows, columns]``."""
    return codes.float() * scale.float().unsqueeze(1)
