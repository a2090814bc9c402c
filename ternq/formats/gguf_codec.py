"""Blocks of the GGUF types that can hold ternary weights, to the byte.

A block is so many consecutive columns of a row. It holds small whole numbers, here called levels,
and one or two float16 values for all of them: a weight is ``scale * (level - 1)`` in the types
without a minimum, ``scale * level + minimum`` in those with one. Where a type has finer scales
(Q2_K: one for 16 columns) they are factors, whole numbers from 0 to 15.

Sources: ``ggml-common.h`` (the blocks) and ``ggml-quants.c`` (``dequantize_row_*``) of llama.cpp,
as they lie in the source package of llama-cpp-python 0.3.36; gguf-py decodes four of the five
types and is the oracle of the tests. It has no name for the fifth, Q2_0, whose id is 42.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

DENSE = {0: torch.float32, 1: torch.float16, 30: torch.bfloat16}
"""Id of a type that is not quantized -> the type of its numbers."""
FINE = 16  # columns that share a factor in Q2_K
_THREES = (81, 27, 9, 3, 1)


@dataclass(frozen=True)
class Kind:
    """A GGUF type: its id, llama.cpp's number of a file of it, columns and bytes of a block.

    ``minimum``: whether blocks have one. ``top``: the highest level.
    """

    name: str
    id: int
    file_type: int
    block: int
    bytes: int
    minimum: bool
    top: int


KINDS = {
    kind.name: kind
    for kind in (
        Kind("TQ1_0", 34, 36, 256, 54, minimum=False, top=2),
        Kind("TQ2_0", 35, 37, 256, 66, minimum=False, top=2),
        Kind("Q2_0", 42, 41, 64, 18, minimum=False, top=3),
        Kind("Q4_1", 3, 3, 32, 20, minimum=True, top=15),
        Kind("Q2_K", 10, 10, 256, 84, minimum=True, top=3),
    )
}


@dataclass(frozen=True)
class Blocks:
    """The content of blocks: uint8 levels ``[rows, columns]``, float16 values ``[rows, blocks]``.

    ``minimum`` is None for types without one. ``factors`` (Q2_K alone, else None) are those of
    scale and minimum, uint8 ``[rows, columns / 16]``.
    """

    levels: Tensor
    scale: Tensor
    minimum: Tensor | None = None
    factors: tuple[Tensor, Tensor] | None = None

    def values(self) -> Tensor:
        """The weights, float32 ``[rows, columns]``, by the formula and not by the bytes."""
        scale = self.scale.float()
        if self.minimum is None:
            return _spread(scale, self.levels) * (self.levels.float() - 1)
        minimum = self.minimum.float()
        if self.factors is not None:
            scale = _spread(scale, self.factors[0]) * self.factors[0]
            minimum = _spread(minimum, self.factors[1]) * self.factors[1]
        return _spread(scale, self.levels) * self.levels + _spread(minimum, self.levels)


def encode(kind: Kind, blocks: Blocks) -> Tensor:
    """Blocks as bytes: uint8 ``[rows, blocks * kind.bytes]``."""
    rows, columns = blocks.levels.shape
    levels = blocks.levels.reshape(rows, columns // kind.block, kind.block)
    scale = _half_bytes(blocks.scale)
    if kind.name == "TQ1_0":
        parts = [_base3(levels), scale]
    elif kind.name == "TQ2_0":
        parts = [_quarters(levels), scale]
    elif kind.name == "Q2_0":
        parts = [scale, _joined(torch.unflatten(levels, 2, (16, 4)), 2)]
    elif blocks.minimum is None:
        raise ValueError(f"{kind.name} has a minimum")
    elif kind.name == "Q4_1":
        halves = torch.unflatten(levels, 2, (2, 16)).transpose(2, 3)
        parts = [scale, _half_bytes(blocks.minimum), _joined(halves, 4)]
    else:
        parts = [_factor_bytes(blocks), _quarters(levels), scale, _half_bytes(-blocks.minimum)]
    return torch.cat(parts, 2).flatten(1)


def decode(kind: Kind, data: Tensor) -> Blocks:
    """The inverse of `encode`: uint8 ``[rows, bytes]`` of whole blocks."""
    blocks = torch.unflatten(data, 1, (-1, kind.bytes))
    minimum, factors = None, None
    if kind.name == "TQ1_0":
        levels, scale = _from_base3(blocks[:, :, :52]), blocks[:, :, 52:]
    elif kind.name == "TQ2_0":
        levels, scale = _from_quarters(blocks[:, :, :64]), blocks[:, :, 64:]
    elif kind.name == "Q2_0":
        scale, levels = blocks[:, :, :2], _split(blocks[:, :, 2:], 2).flatten(2)
    elif kind.name == "Q4_1":
        scale, minimum = blocks[:, :, :2], _halves(blocks[:, :, 2:4])
        levels = _split(blocks[:, :, 4:], 4).transpose(2, 3).flatten(2)
    else:
        scale, minimum = blocks[:, :, 80:82], -_halves(blocks[:, :, 82:84])
        levels = _from_quarters(blocks[:, :, 16:80])
        pair = blocks[:, :, :16].flatten(1)
        factors = (pair & 15, pair >> 4)
    return Blocks(levels.flatten(1), _halves(scale), minimum, factors)


def scales(kind: Kind, data: Tensor) -> tuple[Tensor, Tensor | None]:
    """Scale and minimum alone of uint8 ``[rows, bytes]``: float16 ``[rows, blocks]``, or None."""
    blocks = torch.unflatten(data, 1, (-1, kind.bytes))
    if kind.name == "Q4_1":
        return _halves(blocks[:, :, :2]), _halves(blocks[:, :, 2:4])
    if kind.name == "Q2_K":
        return _halves(blocks[:, :, 80:82]), -_halves(blocks[:, :, 82:84])
    at = 0 if kind.name == "Q2_0" else kind.bytes - 2
    return _halves(blocks[:, :, at : at + 2]), None


def _spread(values: Tensor, over: Tensor) -> Tensor:
    """One value per block ``[rows, n]`` as one per column of ``over`` ``[rows, columns]``."""
    return values.repeat_interleave(over.shape[1] // values.shape[1], 1)


def _half_bytes(values: Tensor) -> Tensor:
    """float16 ``[rows, blocks]`` as uint8 ``[rows, blocks, 2]``."""
    return values.contiguous().unsqueeze(2).view(torch.uint8)


def _halves(data: Tensor) -> Tensor:
    """The inverse: float16 ``[rows, blocks]``."""
    return data.contiguous().view(torch.float16).squeeze(2)


def _joined(levels: Tensor, bits: int) -> Tensor:
    """The last dimension joined into bytes, the first in the lowest bits."""
    joined = torch.zeros(levels.shape[:-1], dtype=torch.uint8)
    for place in range(levels.shape[-1]):
        joined |= levels[..., place] << (bits * place)
    return joined


def _split(data: Tensor, bits: int) -> Tensor:
    """The inverse of `_joined`."""
    mask = (1 << bits) - 1
    return torch.stack([(data >> shift) & mask for shift in range(0, 8, bits)], -1)


def _quarters(levels: Tensor) -> Tensor:
    """256 levels as 64 bytes: byte ``m`` of a half holds its levels m, m+32, m+64, m+96."""
    return _joined(torch.unflatten(levels, 2, (2, 4, 32)).transpose(3, 4), 2).flatten(2)


def _from_quarters(data: Tensor) -> Tensor:
    return _split(torch.unflatten(data, 2, (2, 32)), 2).transpose(3, 4).flatten(2)


def _base3(levels: Tensor) -> Tensor:
    """256 levels as 52 bytes, five (the last four bytes: four) to a byte.

    A byte is ``ceil(number * 256 / 243)``, so that a digit is read by multiplying with a power of
    three and taking what is carried out of eight bits.
    """
    wide = levels.to(torch.int32)
    parts = (wide[:, :, :160], 5, 32), (wide[:, :, 160:240], 5, 16), (wide[:, :, 240:], 4, 4)
    numbers = []
    for part, digits, count in parts:
        powers = torch.tensor(_THREES[:digits], dtype=torch.int32).unsqueeze(1)
        numbers.append((torch.unflatten(part, 2, (digits, count)) * powers).sum(2))
    return ((torch.cat(numbers, 2) * 256 + 242) // 243).to(torch.uint8)


def _from_base3(data: Tensor) -> Tensor:
    parts = (data[:, :, :32], 5), (data[:, :, 32:48], 5), (data[:, :, 48:], 4)
    levels = []
    for part, digits in parts:
        for digit in range(digits):
            carried = (part.to(torch.int32) * 3**digit) % 256
            levels.append((carried * 3) >> 8)
    return torch.cat(levels, 2).to(torch.uint8)


def _factor_bytes(blocks: Blocks) -> Tensor:
    """16 bytes a block: factor of the scale low, of the minimum high; 1 if none are given."""
    rows, columns = blocks.levels.shape
    if blocks.factors is None:
        return torch.full((rows, columns // 256, FINE), 0x11, dtype=torch.uint8)
    of_scale, of_minimum = blocks.factors
    return torch.unflatten(of_scale | (of_minimum << 4), 1, (-1, 16))
