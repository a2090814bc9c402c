"""Two bits a digit, four to a byte, the first in the lowest bits: as compressed-tensors and MLX do.

Both count in words of 32 bits, whose bytes safetensors stores lowest first, so bytes are words.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

DIGITS_PER_WORD = 16
_PLACES = (0, 2, 4, 6)


def packed(digits: Tensor) -> Tensor:
    """Digits uint8 ``[out, in]`` below 4 as int32 ``[out, ceil(in / 16)]``, filled with 0.

    >>> packed(torch.tensor([[1, 2, 3]], dtype=torch.uint8)).tolist()
    [[57]]
    """
    filled = F.pad(digits, (0, -digits.shape[1] % DIGITS_PER_WORD))
    quarters = filled.view(len(digits), -1, len(_PLACES))
    data = quarters[..., 0].clone()
    for place, shift in enumerate(_PLACES[1:], 1):
        data |= quarters[..., place] << shift
    return data.view(torch.int32)


def unpacked(words: Tensor) -> Tensor:
    """The inverse of `packed`: uint8 ``[out, 16 * words]``."""
    data = words.contiguous().view(torch.uint8).unsqueeze(2)
    return (data >> torch.tensor(_PLACES, dtype=torch.uint8) & 3).flatten(1)
