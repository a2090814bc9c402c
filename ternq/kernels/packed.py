"""A packed ternary weight as kernels take it, and the plain product that they are held against."""

from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from ternq import packing, ternary

Act = Literal["exact", "int8"]
"""What activations are rounded to: 16 bits per (at most) 128 columns, or 8."""


@dataclass(frozen=True)
class PackedWeight:
    """``scale * code + shift``, ``[rows, columns]``, in the file's form or in that of a kernel.

    ``layout`` ``base3``: codes uint8 ``[rows, ceil(columns / 5)]``, scale and shift float16
    ``[rows, groups]``. ``words`` and ``triton``: all in ``codes``, as ``csrc/ternq.h`` and `gpu`
    say; scale and shift are None, and ``shifted`` tells whether there are shifts.
    """

    codes: Tensor
    scale: Tensor | None
    shift: Tensor | None
    rows: int
    columns: int
    group_size: int
    shifted: bool
    layout: str = "base3"

    @classmethod
    def of(
        cls, codes: Tensor, scale: Tensor, shift: Tensor | None, columns: int, group_size: int
    ) -> "PackedWeight":
        """What a file holds. ValueError for tensors of other types or shapes."""
        rows, groups = len(codes), -(-columns // group_size)
        if codes.dtype != torch.uint8 or codes.shape != (rows, -(-columns // 5)):
            raise ValueError(f"codes {codes.dtype} {list(codes.shape)} for {columns} columns")
        for factor in (scale,) if shift is None else (scale, shift):
            if factor.dtype != torch.float16 or factor.shape != (rows, groups):
                raise ValueError(
                    f"scale or shift {factor.dtype} {list(factor.shape)} for {rows} rows of "
                    f"{groups} groups"
                )
        return cls(codes, scale, shift, len(codes), columns, group_size, shift is not None)

    def dequantized(self) -> Tensor:
        """Float32 ``[rows, columns]``. ValueError for a layout that a kernel made."""
        if self.layout != "base3" or self.scale is None:
            raise ValueError(f"the layout '{self.layout}' is its kernel's own")
        codes = packing.unpack_base3(self.codes, self.columns)
        return ternary.dequantize(codes, self.scale, self.shift, self.group_size)

    def __reduce__(self) -> Any:
        return type(self), tuple(getattr(self, name) for name in self.__dataclass_fields__)


def reference(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``x @ weight.T + bias`` in ``x``'s dtype: what every kernel must agree with.

    ``x`` ``[..., columns]``, ``weight`` float32 ``[rows, columns]``, as dequantized.
    """
    if not x.is_floating_point():
        raise ValueError(f"activations are {x.dtype}, and no floating-point numbers")
    if bias is not None:
        if bias.shape != weight.shape[:1]:
            raise ValueError(f"a bias {[*bias.shape]} for {len(weight)} rows")
        bias = bias.to(x.dtype)
    with torch.autocast(x.device.type, enabled=False):
        return F.linear(x, weight.to(x.dtype), bias)
