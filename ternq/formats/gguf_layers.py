"""Tensors of a GGUF file: codes and scales as they stand there, by the names of transformers.

TQ1_0, TQ2_0 and Q2_0 have one scale for each block; neighbouring blocks of equal scales become one
group again, of the largest size that all layers agree on. Q4_1 and Q2_K are taken in where a group
holds at most three values, evenly spaced.
"""

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ternq.errors import InputError
from ternq.formats.gguf_codec import FINE, KINDS, Blocks, Kind, decode, scales
from ternq.formats.gguf_file import Header
from ternq.formats.gguf_models import uninterleaved
from ternq.formats.groups import largest_error
from ternq.ternary import TernaryWeight

_BY_ID = {kind.id: kind for kind in KINDS.values()}


@dataclass(frozen=True)
class Tensors:
    """The file by the names of transformers."""

    header: Header
    names: dict[str, str]
    heads: dict[str, int]

    def kind(self, name: str) -> Kind | None:
        """The type of a tensor if it is one of ours."""
        return _BY_ID.get(self.header.tensors[self.names[name]].type)

    def rows(self, name: str, tensor: Tensor) -> Tensor:
        """Rows in the order of transformers."""
        heads = self.heads.get(name)
        return tensor if heads is None else uninterleaved(tensor, heads)


def values(header: Header, name: str) -> Tensor:
    """A tensor of a file as float32, whatever its type; what is not ours is left to gguf-py.

    Raises:
        InputError: a type that neither of us knows, or rows that its blocks do not divide.
    """
    entry = header.tensors[name]
    kind = _BY_ID.get(entry.type)
    if kind is None:
        return values_by_gguf(header, name)
    return decode(kind, _blocks(header, name, kind)).values().reshape(entry.shape)


def values_by_gguf(header: Header, name: str) -> Tensor:
    """The same by gguf-py alone."""
    import gguf

    entry = header.tensors[name]
    try:
        known = gguf.GGMLQuantizationType(entry.type)
        block, size = gguf.GGML_QUANT_SIZES[known]
        _refuse_parts(header, name, block)
        data = header.data(name, math.prod(entry.shape) // block * size)
        found = gguf.quants.dequantize(data.numpy(), known)
    except (ValueError, KeyError, NotImplementedError) as error:
        raise InputError(
            f"{header.path}: {name} is of type {entry.type}, which is unknown here."
        ) from error
    return torch.from_numpy(found).reshape(entry.shape)


def _blocks(header: Header, name: str, kind: Kind) -> Tensor:
    """The bytes of a tensor of one of our types: uint8 ``[rows, bytes]``."""
    _refuse_parts(header, name, kind.block)
    return header.data(name, math.prod(header.tensors[name].shape) // kind.block * kind.bytes)


def _refuse_parts(header: Header, name: str, block: int) -> None:
    if header.tensors[name].shape[-1] % block:
        raise InputError(f"{header.path} is damaged: {name} has rows of parts of blocks.")


def grouping(tensors: Tensors, modules: tuple[str, ...], own: Any) -> tuple[int, bool]:
    """The largest groups in which all layers have one scale and minimum each, and if there is a
    shift: whether a weight of level 1 is not 0 somewhere.

    Layers are looked at one after another, and each leaves what sizes it agrees with.
    """
    kinds = {name: _ternary(tensors, name) for name in modules}
    shapes = [(tensors.header.tensors[stored].shape[-1], k.block) for stored, k in kinds.values()]
    widest, smallest = max(columns for columns, _ in shapes), max(block for _, block in shapes)
    sizes = [smallest * 2**power for power in range(32) if smallest * 2**power < widest]
    given = [own] if type(own) is int and 0 < own < 2**31 else []
    left, shift = list(dict.fromkeys([*given, widest, *reversed(sizes)])), False
    for stored, kind in kinds.values():
        scale, minimum = scales(kind, _blocks(tensors.header, stored, kind))
        left = [size for size in left if _agree(kind.block, scale, minimum, size)]
        shift |= minimum is not None and bool((scale.float() + minimum.float() != 0).any())
    if not left:
        raise InputError(f"{tensors.header.path}: the blocks of its layers agree on no group size.")
    return left[0], shift


def _agree(block: int, scale: Tensor, minimum: Tensor | None, size: int) -> bool:
    """Whether the blocks of a group are alike; without minima those of scale 0 go along."""
    columns = scale.shape[1] * block
    if size < columns and size % block:
        return False
    per_group = min(columns, size) // block
    own = _in_groups(scale, per_group)
    same = own == _largest(own)
    if minimum is None:
        return bool((same | (own == 0)).all())
    below = _in_groups(minimum, per_group)
    return bool(same.all()) and bool((below == below[:, :, :1]).all())


def _in_groups(matrix: Tensor, size: int) -> Tensor:
    """``[rows, n]`` as ``[rows, groups, size]``; a short last group repeats its last value."""
    missing = -matrix.shape[1] % size
    filled = torch.cat([matrix, matrix[:, -1:].expand(-1, missing)], 1)
    return torch.unflatten(filled, 1, (-1, size))


def _largest(groups: Tensor) -> Tensor:
    """The value of largest magnitude of each group: ``[rows, groups, 1]``."""
    return groups.gather(2, groups.abs().argmax(2, keepdim=True))


def _ternary(tensors: Tensors, name: str) -> tuple[str, Kind]:
    """The tensor that holds a ternary layer, and its type."""
    kind = tensors.kind(f"{name}.weight")
    assert kind is not None
    return tensors.names[f"{name}.weight"], kind


def layer(
    tensors: Tensors, name: str, group_size: int, shift: bool, rounded: dict[str, float]
) -> TernaryWeight:
    """A layer's codes, scales and shifts, in their one stored form.

    Raises:
        InputError: a group has more than three values, or values that are not evenly spaced, or
            that float16 cannot hold.
    """
    stored, kind = _ternary(tensors, name)
    raw = tensors.rows(f"{name}.weight", _blocks(tensors.header, stored, kind))
    blocks = decode(kind, raw)
    _refuse_fine(tensors, stored, kind, blocks)
    if shift and kind.minimum:
        weight = _with_minimum(tensors, stored, kind, blocks, group_size)
    else:
        weight = _without_minimum(tensors, stored, kind, blocks, group_size)
        if shift:
            weight = replace(weight, shift=torch.zeros_like(weight.scale))
    try:
        weight = weight.canonical()
    except ValueError as error:
        raise InputError(f"{tensors.header.path}: {stored} cannot be taken in: {error}.") from error
    lost = largest_error(weight, blocks.values())
    if lost:
        rounded[name] = lost
    return weight


def _refuse_fine(tensors: Tensors, stored: str, kind: Kind, blocks: Blocks) -> None:
    if blocks.factors is not None and any(bool((f != 1).any()) for f in blocks.factors):
        raise InputError(
            f"{tensors.header.path} is not ternary: {stored} ({kind.name}) has scales for each "
            f"{FINE} columns; a ternary weight has three values in a group."
        )


def _without_minimum(
    tensors: Tensors, stored: str, kind: Kind, blocks: Blocks, group_size: int
) -> TernaryWeight:
    wrong = (blocks.levels > 2).any(1)
    if bool(wrong.any()):
        row = int(wrong.nonzero()[0])
        value = int(blocks.levels[row].max())
        raise InputError(
            f"{tensors.header.path} is not ternary: {stored}, row {row} holds the value {value} of "
            f"{kind.name}, which is the code {value - 1}; codes are -1, 0 and +1."
        )
    columns = blocks.levels.shape[1]
    live = (blocks.scale != 0).repeat_interleave(kind.block, 1)
    codes = torch.where(live, blocks.levels.to(torch.int8) - 1, 0).to(torch.int8)
    per_group = min(columns, group_size) // kind.block
    scale = _largest(_in_groups(blocks.scale, per_group)).squeeze(2)
    return TernaryWeight(codes, scale, None, group_size)


def _with_minimum(
    tensors: Tensors, stored: str, kind: Kind, blocks: Blocks, group_size: int
) -> TernaryWeight:
    """The middle of three levels is code 0; of two, level 1 if it can be; one level is code 0."""
    assert blocks.minimum is not None
    columns = blocks.levels.shape[1]
    size = min(columns, group_size)
    levels = _in_groups(blocks.levels, size)
    low, high = levels.amin(2), levels.amax(2)
    if bool((high - low > 2).any()):
        row = int((high - low > 2).any(1).nonzero()[0])
        raise InputError(
            f"{tensors.header.path} is not ternary: {stored} ({kind.name}), row {row} has "
            f"{int((high - low)[row].max()) + 1} levels; a ternary weight has three values in a "
            "group."
        )
    centre = torch.where(high - low == 2, low + 1, low.clamp(1, kind.top - 1))
    centre = torch.where(high == low, low, centre).float()
    d = _in_groups(blocks.scale, size // kind.block)[:, :, 0].float()
    minimum = _in_groups(blocks.minimum, size // kind.block)[:, :, 0].float()
    sign = torch.where(d < 0, -1.0, 1.0)
    codes = (levels.float() - centre.unsqueeze(2)) * sign.unsqueeze(2)
    codes = torch.where((d == 0).unsqueeze(2), torch.zeros_like(codes), codes)
    codes = codes.flatten(1)[:, :columns].to(torch.int8).contiguous()
    return TernaryWeight(codes, d.abs().half(), (minimum + centre * d).half() + 0.0, group_size)
