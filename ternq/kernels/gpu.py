"""``y = x W'`` on CUDA in Triton, from codes that stay packed in memory, two bits each.

A weight in memory (layout ``triton``) is one buffer of words, scales and shifts, each padded to 16
bytes. A row is cut into blocks of 128 columns, the last filled up with code 0. A block is 16 words
of 16 bits: bits ``2 f`` and ``2 f + 1`` of word ``w`` hold code + 1 of column ``16 f + w``. So a
thread reads 8 neighbouring words, and a shift and a mask of them are 8 neighbouring columns; and a
dot product of the tensor cores, 16 columns long, is one field of 16 words. Scales and shifts are
float16 ``[rows, groups]``, as in the file.

A digit ``d`` (code + 1) that is put into bits 21 and 22 of a float32 of the exponent of 1 is the
number ``1 + d / 4``, so no instruction converts. With ``v`` that number, a weight is
``scale * code + shift = 4 scale * v + (shift - 5 scale)``.

`gemv` is for one token, where reading the weights is the cost: in every group it adds up ``x * v``
in float32 and multiplies the sum by the scale; the second term is that of the sum of ``x``. `gemm`
is for more: tiles of ``W`` are made in the type of ``x`` for the tensor cores, which add up in
float32. Under ``TRITON_INTERPRET=1``, set before triton is imported, both run on a CPU, slowly.
A NaN or an infinity in a token makes all its outputs NaN or infinite. docs/gpu.md says more.
"""

# triton's decorators and functions have no types
# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"

from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from ternq.kernels.packed import PackedWeight
from ternq.packing import pack_base3, unpack_base3
from ternq.ternary import n_groups

LAYOUT = "triton"
BLOCK = 128  # columns
_MASK = 0x600000
_PART = 2**26  # weights that are converted in one go


@dataclass(frozen=True)
class Tile:
    """What one program works on: ``rows`` of the weight by ``across``, and how it is run.

    ``across`` counts blocks of the weight that `gemv` reads at once, or tokens of `gemm`.
    """

    rows: int
    across: int
    warps: int
    stages: int


def fits(weight: PackedWeight) -> bool:
    """Whether `convert` takes this weight: groups must end where a block or a field ends."""
    size = weight.group_size
    return size >= weight.columns or size % BLOCK == 0 or size in (16, 32, 64)


def convert(weight: PackedWeight) -> PackedWeight:
    """A weight as it is stored (docs/format.md), on any device, as the kernels read it.

    Raises:
        ValueError: another layout, or a group size that does not fit.
    """
    if weight.layout != "base3" or weight.scale is None:
        raise ValueError(f"a weight in the layout '{weight.layout}', not 'base3'")
    if not fits(weight):
        raise ValueError(
            f"groups of {weight.group_size} columns: the Triton kernels have 16, 32, 64 "
            "and multiples of 128"
        )
    step = max(1, _PART // max(1, weight.columns))
    words = [_words(unpack_base3(part, weight.columns)) for part in weight.codes.split(step)]
    parts = [torch.cat(words), weight.scale, weight.shift]
    flat = [part.reshape(-1).view(torch.uint8) for part in parts if part is not None]
    buffer = torch.cat([F.pad(part, (0, -len(part) % 16)) for part in flat])
    return replace(weight, codes=buffer, scale=None, shift=None, layout=LAYOUT)


def restore(weight: PackedWeight) -> PackedWeight:
    """The stored form again, to the bit: the inverse of `convert`."""
    words, scale, shift = _split(weight)
    rows = words.view(torch.uint8).split(max(1, _PART // max(1, weight.columns)))
    codes = torch.cat([pack_base3(_codes(part)[:, : weight.columns]) for part in rows])
    shift = None if shift is None else shift.clone()
    return replace(weight, codes=codes, scale=scale.clone(), shift=shift, layout="base3")


def _split(weight: PackedWeight) -> tuple[Tensor, Tensor, Tensor | None]:
    """Views of the buffer: words int16 ``[rows, 16 blocks]``, scale and shift float16."""
    if weight.layout != LAYOUT:
        raise ValueError(f"a weight in the layout '{weight.layout}', not '{LAYOUT}'")
    values, start, parts = weight.codes.view(torch.int16), 0, []
    groups = n_groups(weight.columns, weight.group_size)
    for width in (16 * n_groups(weight.columns, BLOCK), groups, groups)[: 2 + weight.shifted]:
        count = weight.rows * width
        parts.append(values[start : start + count].view(weight.rows, width))
        start += -(-count // 8) * 8
    shift = parts[2].view(torch.float16) if weight.shifted else None
    return parts[0], parts[1].view(torch.float16), shift


def _words(codes: Tensor) -> Tensor:
    rows, columns = codes.shape
    digits = F.pad((codes + 1).view(torch.uint8), (0, -columns % BLOCK), value=1)
    blocks = digits.shape[1] // BLOCK
    fields = digits.view(rows, blocks, 2, 4, 16)  # of a word's low and high byte
    words = fields[..., 0, :] | fields[..., 1, :] << 2
    words = words | fields[..., 2, :] << 4 | fields[..., 3, :] << 6
    low_first = words.transpose(2, 3)  # as every machine with CUDA stores numbers
    return low_first.reshape(rows, blocks * 32)


def _codes(words: Tensor) -> Tensor:
    blocks = words.shape[1] // 32
    halves = words.view(len(words), blocks, 16, 2).transpose(2, 3).unsqueeze(3)
    places = torch.arange(0, 8, 2, dtype=torch.uint8, device=words.device).view(4, 1)
    digits: Tensor = halves >> places & 3
    return (digits.to(torch.int8) - 1).reshape(len(words), blocks * BLOCK)


def matmul(x: Tensor, weight: PackedWeight, bias: Tensor | None = None) -> Tensor:
    """``x W' + bias``: ``[..., columns]`` to ``[..., rows]``, of the type of ``x``. No gradient.

    ``x`` is float32, float16 or bfloat16. Sums are in float32; `gemm` rounds weights to the type of
    ``x``, as a dense layer of that type does, `gemv` does not.

    Raises:
        ValueError: another type or shape, or a weight in another layout.
    """
    return (gemv if x.numel() <= weight.columns else gemm)(x, weight, bias)


def gemv(
    x: Tensor, weight: PackedWeight, bias: Tensor | None = None, tile: Tile | None = None
) -> Tensor:
    """`matmul` for one token; ValueError for more."""
    flat, y = _ends(x, weight, bias)
    if len(flat) > 1:
        raise ValueError(f"gemv takes one token, not {len(flat)}")
    if y.numel():
        tile = tile or gemv_tile(weight.rows)
        with torch.cuda.device_of(flat):
            _gemv[(triton.cdiv(weight.rows, tile.rows),)](
                *_arguments(flat, weight, bias, y),
                R=tile.rows,
                B=tile.across,
                STAGES=tile.stages,
                num_warps=tile.warps,
            )
    return y.view(*x.shape[:-1], weight.rows)


def gemm(
    x: Tensor, weight: PackedWeight, bias: Tensor | None = None, tile: Tile | None = None
) -> Tensor:
    """`matmul` for any number of tokens."""
    flat, y = _ends(x, weight, bias)
    if y.numel():
        wide = x.dtype == torch.float32
        tile = tile or gemm_tile(weight.rows, len(flat), _hopper(x.device), wide)
        grid = triton.cdiv(weight.rows, tile.rows) * triton.cdiv(len(flat), tile.across)
        with torch.cuda.device_of(flat):
            _gemm[(grid,)](
                *_arguments(flat, weight, bias, y),
                N=tile.across,
                R=tile.rows,
                DOT=tl.float32 if _INTERPRETED else _TYPES[x.dtype],
                num_warps=tile.warps,
                num_stages=tile.stages,
            )
    return y.view(*x.shape[:-1], weight.rows)


def gemv_tile(rows: int) -> Tile:
    """The tile for so many rows: chosen by counting instructions, not yet on a card."""
    return Tile(16 if rows >= 8192 else 4, 4, 1, 3)


def gemm_tile(rows: int, tokens: int, hopper: bool = False, wide: bool = False) -> Tile:
    """The tile for so many rows and tokens: chosen by counting instructions, not yet on a card.

    ``hopper`` has larger tiles; ``wide`` is float32, whose tiles are small or registers run out.
    """
    if wide:
        return Tile(64, 32, 4, 2)
    if tokens <= 16:
        return Tile(64, 16, 4, 4) if rows >= 8192 else Tile(16, 16, 1, 4)
    if tokens <= 64:
        return Tile(64, triton.next_power_of_2(tokens), 4, 3)
    return Tile(128, 256 if hopper and tokens > 128 else 128, 8, 3)


def _hopper(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.get_device_capability(device)[0] == 9


_INTERPRETED = triton.knobs.runtime.interpret  # whose tl.dot takes bfloat16 for integers
_TYPES = {
    torch.float32: tl.float32,
    torch.float16: tl.float16,
    torch.bfloat16: tl.bfloat16,
}


def _ends(x: Tensor, weight: PackedWeight, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """The input as ``[tokens, columns]`` and an empty output."""
    if x.dtype not in _TYPES or not x.ndim or x.shape[-1] != weight.columns:
        raise ValueError(f"x is {x.dtype} {list(x.shape)}; the weight has {weight.columns} columns")
    if bias is not None and bias.shape != (weight.rows,):
        raise ValueError(f"a bias {list(bias.shape)} for {weight.rows} rows")
    for given in (x,) if bias is None else (x, bias):
        if given.device != weight.codes.device:
            raise ValueError(f"a tensor on {given.device}, the weight on {weight.codes.device}")
    flat = x.resolve_neg().reshape(-1, weight.columns).contiguous()
    return flat, flat.new_empty(len(flat), weight.rows)


def _arguments(x: Tensor, weight: PackedWeight, bias: Tensor | None, y: Tensor) -> tuple[Any, ...]:
    """What both kernels take, from ``x`` to ``BIAS``."""
    words, scale, shift = _split(weight)
    groups, blocks = scale.shape[1], words.shape[1] // 16
    size = weight.group_size if groups > 1 else max(1, blocks) * BLOCK
    sizes = (len(x), weight.rows, weight.columns, groups, blocks, max(1, size // BLOCK))
    flags = (min(8, size // 16), weight.shifted, bias is not None)
    bias = None if bias is None else bias.contiguous()
    return x, words, scale, shift, bias, y, *sizes, _MASK, *flags


@triton.jit
def _numbers(word, field: tl.constexpr, mask):
    """``1 + d / 4`` of the digits in a field of the words, float32.

    ``mask`` is `_MASK` out of a register: an instruction takes but one constant.
    """
    bits = (word.to(tl.int32) << (21 - 2 * field)) & mask | 0x3F800000
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def _gemv(
    x, codes, scale, shift, bias, y,
    tokens, rows, columns, groups, blocks, per_group, mask,
    FIELDS: tl.constexpr, SHIFT: tl.constexpr, BIAS: tl.constexpr,
    R: tl.constexpr, B: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """R rows; axes are row, block and word."""
    first_row = tl.program_id(0).to(tl.int64) * R
    row = first_row + tl.arange(0, R)[:, None]
    place = tl.arange(0, 16)[None, None, :]
    total = tl.zeros((R, B), tl.float32)
    for first in tl.range(0, blocks, B, num_stages=STAGES):
        block = first + tl.arange(0, B)[None, :]
        inside = (row < rows) & (block < blocks)
        address = (row * blocks + block)[:, :, None] * 16 + place
        word = tl.load(codes + address, mask=inside[:, :, None], other=0)
        for part in tl.static_range(8 // FIELDS):
            product = tl.zeros((R, B, 16), tl.float32)
            plain = tl.zeros((1, B, 16), tl.float32)
            for field in tl.static_range(part * FIELDS, part * FIELDS + FIELDS):
                column = block[:, :, None] * 128 + field * 16 + place
                value = tl.load(x + column, mask=column < columns, other=0).to(tl.float32)
                product += value * _numbers(word, field, mask)
                plain += value
            group = block // per_group * (8 // FIELDS) + part
            there = inside & (group < groups)
            alpha, offset = _line(scale, shift, row * groups + group, there, SHIFT)
            total += alpha * tl.sum(product, 2) + offset * tl.sum(plain, 2)
    answer = tl.sum(total, 1)
    row = first_row + tl.arange(0, R)
    if BIAS:
        answer += tl.load(bias + row, mask=row < rows, other=0).to(tl.float32)
    tl.store(y + row, answer.to(y.dtype.element_ty), mask=row < rows)


@triton.jit
def _line(scale, shift, address, inside, SHIFT: tl.constexpr):
    """A weight in terms of its number: ``4 scale`` and ``shift - 5 scale``."""
    alpha = tl.load(scale + address, mask=inside, other=0).to(tl.float32)
    offset = -5 * alpha
    if SHIFT:
        offset += tl.load(shift + address, mask=inside, other=0).to(tl.float32)
    return 4 * alpha, offset


@triton.jit(do_not_specialize=["tokens"])  # or prompts of some lengths would compile it anew
def _gemm(
    x, codes, scale, shift, bias, y,
    tokens, rows, columns, groups, blocks, per_group, mask,
    FIELDS: tl.constexpr, SHIFT: tl.constexpr, BIAS: tl.constexpr,
    N: tl.constexpr, R: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """R rows and N tokens, block by block; the rows are the tensor cores' first operand."""
    tiles = tl.cdiv(rows, R)
    row = (tl.program_id(0) % tiles).to(tl.int64) * R + tl.arange(0, R)
    token = (tl.program_id(0) // tiles).to(tl.int64) * N + tl.arange(0, N)
    place = tl.arange(0, 16)
    total = tl.zeros((R, N), tl.float32)
    for block in range(blocks):
        address = (row * blocks + block)[:, None] * 16 + place[None, :]
        word = tl.load(codes + address, mask=row[:, None] < rows, other=0)
        for part in tl.static_range(8 // FIELDS):
            group = block // per_group * (8 // FIELDS) + part
            inside = (row < rows) & (group < groups)
            alpha, offset = _line(scale, shift, row * groups + group, inside, SHIFT)
            for field in tl.static_range(part * FIELDS, part * FIELDS + FIELDS):
                column = block * 128 + field * 16 + place
                there = (column[:, None] < columns) & (token[None, :] < tokens)
                value = tl.load(x + token[None, :] * columns + column[:, None], mask=there, other=0)
                weight = _numbers(word, field, mask) * alpha[:, None] + offset[:, None]
                weight = weight.to(x.dtype.element_ty).to(DOT)
                total = tl.dot(weight, value.to(DOT), total, input_precision="tf32x3")
    if BIAS:
        total += tl.load(bias + row, mask=row < rows, other=0).to(tl.float32)[:, None]
    here = (row[:, None] < rows) & (token[None, :] < tokens)
    tl.store(y + token[None, :] * rows + row[:, None], total.to(y.dtype.element_ty), mask=here)
