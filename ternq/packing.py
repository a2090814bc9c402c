"""Ternary codes and bytes: five codes to a byte, since 3^5 = 243 fits in 256.

That is 1.6 bits a weight where the entropy bound is log2(3) = 1.585, and a byte is read with no
state from its neighbours. Each row is padded on its own, so a row can be read, sharded or skipped
without its neighbours. The layout is frozen as format version 1 (docs/format.md).
"""

import torch
from torch import Tensor

CODES_PER_BYTE = 5
LARGEST_BYTE = 3**CODES_PER_BYTE - 1
_PART = 2**19  # codes that are packed in one go, so that the passes over them stay in the cache
_PLACES = tuple(3**k for k in reversed(range(CODES_PER_BYTE)))  # 81, 27, 9, 3, 1
_CODES = [[byte // place % 3 - 1 for place in _PLACES] for byte in range(256)]


def packed_width(columns: int) -> int:
    """Bytes in a row of ``columns`` codes: ceil(columns / 5). ValueError if negative."""
    if columns < 0:
        raise ValueError(f"a row cannot have {columns} columns")
    return -(-columns // CODES_PER_BYTE)


def pack_base3(codes: Tensor, *, check: bool = True) -> Tensor:
    """Int8 codes [out, in] in {-1, 0, +1} to uint8 [out, ceil(in / 5)], first code in the 81s.

    Raises ValueError for another shape or type and, with ``check``, for another value.

    >>> pack_base3(torch.tensor([[-1, 0, 1, 0, -1, 1]], dtype=torch.int8)).tolist()
    [[48, 202]]
    """
    if codes.ndim != 2 or codes.dtype != torch.int8:
        raise ValueError(f"codes are int8 [out, in], not {codes.dtype} {list(codes.shape)}")
    if check and codes.numel() and (codes.min() < -1 or codes.max() > 1):
        raise ValueError("codes are -1, 0 or +1")
    step = max(1, _PART // max(1, codes.shape[1]))
    parts = [_packed(part) for part in torch.split(codes, step)]
    return torch.cat(parts)


def _packed(codes: Tensor) -> Tensor:
    rows, columns = codes.shape
    width = packed_width(columns)
    digits = torch.ones(rows, width * CODES_PER_BYTE, dtype=torch.uint8, device=codes.device)
    digits[:, :columns] = codes.view(torch.uint8) + 1  # -1 is 255 there, and 256 is 0
    digits = digits.view(rows, width, CODES_PER_BYTE)
    packed = digits[..., 0].clone()
    for place in range(1, CODES_PER_BYTE):
        packed.mul_(3).add_(digits[..., place])
    return packed


def unpack_base3(packed: Tensor, columns: int, *, check: bool = False) -> Tensor:
    """Uint8 [out, ceil(columns / 5)] to int8 codes [out, columns], the inverse of `pack_base3`.

    Raises ValueError for another shape or type and, with ``check``, for a byte over 242 or
    padding that is not code 0: nothing `pack_base3` writes.

    >>> unpack_base3(torch.tensor([[48, 202]], dtype=torch.uint8), 6).tolist()
    [[-1, 0, 1, 0, -1, 1]]
    """
    if packed.ndim != 2 or packed.dtype != torch.uint8:
        raise ValueError(f"packed codes are uint8 [out, w], not {packed.dtype} {[*packed.shape]}")
    rows, width = packed.shape
    if width != packed_width(columns):
        raise ValueError(f"{columns} codes take {packed_width(columns)} bytes a row, not {width}")
    if check and packed.numel() and packed.max() > LARGEST_BYTE:
        raise ValueError(f"byte {int(packed.max())} holds no five codes: at most {LARGEST_BYTE}")
    table = torch.tensor(_CODES, dtype=torch.int8, device=packed.device)
    codes = table.index_select(0, packed.flatten().int()).view(rows, width * CODES_PER_BYTE)
    if check and codes[:, columns:].any():
        raise ValueError("the padding at the end of a row is not code 0")
    return codes[:, :columns].contiguous()
