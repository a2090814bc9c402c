"""From a latent weight to its ternary value, and from the gradient of that to its own.

A latent weight is ``[out, in]``; `quantize` gives its codes by TWN's threshold (Li et al. 2016,
arXiv 1605.04711, as quoted by CAT-Q, arXiv 2606.26650), `fake_quantize` its value ``scale * code +
shift`` with a gradient (DLT, see `ternq.ternary` for sources). Computed by the C kernels
(``kernels/csrc/latent.h``) on a CPU, by one compiled kernel on a GPU with Triton, else by torch.
"""

import functools
from collections.abc import Callable, Iterator
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensor

from ternq.kernels import library
from ternq.kernels.native import DTYPES, Native

_CACHED = 2**18  # weights rounded in one go: what a core's cache holds from pass to pass
THRESHOLD = 0.7  # of the group's mean absolute value: TWN's rule
VARIANTS = 128  # shapes and types of weights, compiled one by one on a GPU


class Piece(NamedTuple):
    """Rows of a weight, and consecutive groups of them that have one size."""

    rows: slice
    columns: slice
    groups: slice
    size: int

    def of(self, matrix: Tensor) -> Tensor:
        """This piece of a matrix ``[out, in]``, a view ``[rows, groups, size]``."""
        part = matrix[self.rows, self.columns]
        return part.view(len(part), -1, self.size)

    def per_group(self, values: Tensor) -> Tensor:
        """This piece of a value per group ``[out, groups]``, a view ``[rows, groups, 1]``."""
        return values[self.rows, self.groups].unsqueeze(2)


def pieces(weight: Tensor, group_size: int) -> Iterator[Piece]:
    """A weight ``[out, in]`` in pieces: a short last group apart; rows by what a cache holds.

    A GPU takes all rows at once. Of a weight without numbers, of which memory is counted, the first
    piece will do. Whatever rounds goes by these pieces, so that sums are made in one order and
    codes are the same to the bit.
    """
    rows, columns = weight.shape
    size = min(group_size, columns)
    full = columns // size
    step = max(1, _CACHED // columns if weight.device.type == "cpu" else rows)
    for first in range(0, rows, step):
        if first and isinstance(weight, FakeTensor):
            return
        part = slice(first, first + step)
        yield Piece(part, slice(0, full * size), slice(0, full), size)
        if rest := columns - full * size:
            yield Piece(part, slice(full * size, columns), slice(full, full + 1), rest)


def _codes(groups: Tensor) -> tuple[Tensor, Tensor]:
    """Codes of ``[rows, groups, size]`` as floats, and the thresholds ``[rows, groups, 1]``.

    The comparison is made in place, since bools and choices are several times slower in torch on a
    CPU than floats.
    """
    codes = groups.abs()
    threshold = codes.sum(2, keepdim=True).mul_(THRESHOLD / groups.shape[2])
    return torch.copysign(codes.gt_(threshold), groups, out=codes), threshold


def quantize(weight: Tensor, group_size: int) -> Tensor:
    """Codes of a weight ``[out, in]``: the sign where ``|w| > 0.7 * mean|w|`` of the group, else 0.

    Returns int8 ``[out, in]``. Of Gaussian weights 42 % become 0.

    >>> quantize(torch.tensor([[1.0, -2.0, 0.1, 0.0]]), 4).tolist()
    [[1, -1, 0, 0]]
    """
    weight = weight.detach()
    if native := _native(weight):
        return native.quantize(weight, group_size)
    codes = torch.empty(weight.shape, dtype=torch.int8, device=weight.device)
    for piece in pieces(weight, group_size):
        piece.of(codes).copy_(_codes(piece.of(weight).float())[0])
    return codes


def _rounded(
    weight: Tensor, scale: Tensor, shift: Tensor | None, group_size: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    values = torch.empty(weight.shape, dtype=dtype, device=weight.device)
    codes = torch.empty(weight.shape, dtype=torch.int8, device=weight.device)
    for piece in pieces(weight, group_size):
        own, threshold = _codes(piece.of(weight).float())
        piece.of(codes).copy_(own)
        # A weight that is not finite has no code; its group becomes NaN, for the loss to tell.
        own.mul_(piece.per_group(scale) + threshold * 0)
        if shift is not None:
            own.add_(piece.per_group(shift))
        piece.of(values).copy_(own)
    return values, codes


def _native(weight: Tensor) -> Native | None:
    """The C kernels where they round a weight: one on the CPU, that has numbers.

    Their sums are made in one order on every processor, and another than torch's; so whatever
    rounds asks here.
    """
    plain = type(weight) in (Tensor, nn.Parameter) and weight.device.type == "cpu"
    if not plain or weight.dtype not in DTYPES or torch.compiler.is_compiling():
        return None
    return library()


def fuses(device: torch.device) -> bool:
    """Whether passes over a weight are fused into one kernel there: on a GPU with Triton.

    On a CPU the C kernels do it; `torch.compile` would need a C++ compiler at run time. Without
    them pieces stay in its cache.
    """
    return device.type == "cuda" and bool(torch.utils._triton.has_triton())


@functools.cache
def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    from torch._dynamo import config

    # Each shape and type is compiled by itself; beyond the limit, 8, torch would run it eagerly.
    config.recompile_limit = max(config.recompile_limit, VARIANTS)
    return torch.compile(function, dynamic=False)


def rounded(
    weight: Tensor,
    scale: Tensor,
    shift: Tensor | None,
    group_size: int,
    dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor]:
    """The value of `fake_quantize` and its codes, ``[out, in]`` of ``dtype`` and int8; no gradient.

    The value is computed in float32 and rounded once. The weight is read once from memory.
    """
    with torch.no_grad():
        if native := _native(weight):
            made = dtype if dtype in DTYPES else torch.float32
            value, codes = native.rounded(weight, scale, shift, group_size, made)
            return value.to(dtype), codes
        run = _compiled(_rounded) if fuses(weight.device) else _rounded
        found: tuple[Tensor, Tensor] = run(weight, scale, shift, group_size, dtype)
        return found


def _gradients(
    gradient: Tensor,
    codes: Tensor,
    scale: Tensor,
    group_size: int,
    ste: str,
    dtype: torch.dtype,
    wanted: tuple[bool, bool, bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    to_weight = None
    if wanted[0]:
        as_it_is = ste == "identity" and gradient.dtype == dtype
        to_weight = gradient if as_it_is else torch.empty_like(gradient, dtype=dtype)
    to_scale = torch.empty_like(scale) if wanted[1] else None
    to_shift = torch.empty_like(scale) if wanted[2] else None
    for piece in pieces(gradient, group_size):
        into = None if to_weight is None or to_weight is gradient else piece.of(to_weight)
        if into is not None and into.dtype == torch.float32:
            g = into.copy_(piece.of(gradient))
        else:
            g = piece.of(gradient).float()
        if to_shift is not None:
            piece.per_group(to_shift).copy_(g.sum(2, keepdim=True))
        if to_scale is not None:
            own = piece.of(codes).float().mul_(g)
            piece.per_group(to_scale).copy_(own.sum(2, keepdim=True))
        if into is not None and ste == "ttq":
            nonzero = piece.of(codes).float().abs_()
            g = g * (1 - nonzero).add_(nonzero * piece.per_group(scale))
        if into is not None and g is not into:
            into.copy_(g)
    return to_weight, to_scale, to_shift


def straight_through(
    gradient: Tensor,
    codes: Tensor,
    scale: Tensor,
    group_size: int,
    ste: str = "identity",
    *,
    dtype: torch.dtype = torch.float32,
    wanted: tuple[bool, bool, bool] = (True, True, True),
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """The gradients of `fake_quantize` for weight, scale and shift, from that of its value.

    ``wanted`` says which; the others are None. That of the weight is of ``dtype``; it may be
    ``gradient`` itself.
    """
    with torch.no_grad():
        if (native := _native(gradient)) and dtype in DTYPES:
            return native.descend(gradient, codes, scale, group_size, ste == "ttq", dtype, wanted)
        run = _compiled(_gradients) if fuses(gradient.device) else _gradients
        found: tuple[Tensor | None, Tensor | None, Tensor | None] = run(
            gradient.contiguous(), codes, scale, group_size, ste, dtype, wanted
        )
        return found


class _FakeQuantize(torch.autograd.Function):
    """`fake_quantize` with its straight-through gradient."""

    @staticmethod
    def forward(
        ctx: Any,
        weight: Tensor,
        scale: Tensor,
        shift: Tensor | None,
        group_size: int,
        ste: str,
        dtype: torch.dtype,
    ) -> Tensor:
        value, codes = rounded(weight, scale, shift, group_size, dtype)
        ctx.save_for_backward(codes, scale)
        ctx.group_size, ctx.ste, ctx.dtype = group_size, ste, weight.dtype
        return value

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        codes, scale = ctx.saved_tensors
        found = straight_through(
            gradients[0],
            codes,
            scale,
            ctx.group_size,
            ctx.ste,
            dtype=ctx.dtype,
            wanted=ctx.needs_input_grad[:3],
        )
        return *found, None, None, None


def fake_quantize(
    weight: Tensor,
    scale: Tensor,
    shift: Tensor | None,
    group_size: int,
    ste: Literal["identity", "ttq"] = "identity",
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """The value of `dequantize(quantize(weight))` with a gradient: ``[out, in]`` of ``dtype``.

    ``d scale = sum g * code`` and ``d shift = sum g`` over the group (chain rule). The rounding
    passes its gradient straight through: ``d w = g`` (``identity``), or ``g * scale`` where the
    code is not 0 and ``g`` where it is (``ttq``, after Trained Ternary Quantization; attributed to
    TernaryLLM by a reviewer of Tequila, arXiv 2509.23809; original not seen). Sums are in float32.
    """
    value: Tensor = _FakeQuantize.apply(weight, scale, shift, group_size, ste, dtype)  # type: ignore[no-untyped-call]
    return value
