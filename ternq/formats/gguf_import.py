"""GGUF files of ternary types, taken in: codes and scales as they stand in the file.

TQ1_0, TQ2_0 and Q2_0 have one scale for each block; neighbouring blocks of equal scales become one
group again, of the largest size that all layers agree on. Q4_1 and Q2_K are taken in where a block
holds at most three values, evenly spaced. Configuration and tokenizer come from transformers, but
the configuration of a file of ours stands in it as it was.
"""

import json
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ternq import checkpoint, hf
from ternq.errors import InputError
from ternq.formats.gguf import OWN_KEY
from ternq.formats.gguf_codec import KINDS, Blocks, Kind, decode, scales
from ternq.formats.gguf_file import Header
from ternq.formats.gguf_models import ARCHITECTURES, ROPE_FACTORS, name_map, uninterleaved
from ternq.formats.groups import largest_error
from ternq.source import Source
from ternq.ternary import TernaryWeight

_BY_ID = {kind.id: kind for kind in KINDS.values()}
_DENSE = {0: torch.float32, 1: torch.float16, 30: torch.bfloat16}
_DIGITS = {"type": "Digits", "individual_digits": True}
_SINGLE_DIGITS = ("smollm", "starcoder", "refact", "codeshell", "command-r")


@contextmanager
def opened(path: Path) -> Iterator[Source]:
    """The ternary model in a GGUF file; its configuration and tokenizer lie in a temporary folder.

    Raises:
        InputError: it is damaged, of an architecture that is not known here, or not ternary; the
            message names tensor and row.
    """
    header = Header(path)
    with tempfile.TemporaryDirectory() as name:
        base = Path(name)
        _write_base(header, base)
        yield _source(path, header, base)


def values(header: Header, name: str) -> Tensor:
    """A tensor of a file as float32, whatever its type; what gguf-py decodes is left to it.

    Raises:
        InputError: a type that neither of us knows, or rows that its blocks do not divide.
    """
    import gguf

    entry = header.tensors[name]
    kind = _BY_ID.get(entry.type)
    if kind is not None:
        return decode(kind, _blocks(header, name, kind)).values().reshape(entry.shape)
    try:
        known = gguf.GGMLQuantizationType(entry.type)
        block, size = gguf.GGML_QUANT_SIZES[known]
        data = header.data(name, torch.Size(entry.shape).numel() // block * size)
        found = gguf.quants.dequantize(data.numpy(), known)
    except (ValueError, KeyError, NotImplementedError) as error:
        raise InputError(
            f"{header.path}: {name} is of type {entry.type}, which is unknown here."
        ) from error
    return torch.from_numpy(found).reshape(entry.shape)


def _blocks(header: Header, name: str, kind: Kind) -> Tensor:
    """The bytes of a tensor of one of our types: uint8 ``[rows, bytes]``."""
    shape = header.tensors[name].shape
    if shape[-1] % kind.block:
        raise InputError(f"{header.path} is damaged: {name} has rows of parts of blocks.")
    return header.data(name, torch.Size(shape).numel() // kind.block * kind.bytes)


# --- the source -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Tensors:
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


def _source(path: Path, header: Header, base: Path) -> Source:
    config = checkpoint.read_json(base / "config.json")
    skeleton = hf.skeleton(base)
    tensors = _named(header, config, skeleton)
    linears = {n for n, m in skeleton.named_modules() if isinstance(m, torch.nn.Linear)}
    head = skeleton.get_output_embeddings()
    modules = tuple(
        name
        for name, module in skeleton.named_modules()
        if name in linears and module is not head and tensors.kind(f"{name}.weight") is not None
    )
    if not modules:
        raise InputError(
            f"{path} is not ternary: none of its linear layers is {', '.join(KINDS)}.",
            f"Make it ternary first: ternq ternarize {path}",
        )
    own = _own(header)
    group_size = _group_size(tensors, modules, own.get("group_size"))
    shift = own.get("shift") is True or _has_shift(tensors, modules)
    weights = {f"{module}.weight" for module in modules}
    dtype = _DENSE.get(header.tensors["token_embd.weight"].type, torch.float32)
    others = {n: _dense(tensors, n, dtype) for n in tensors.names if n not in weights}
    rounded: dict[str, float] = {}

    def tensor(name: str) -> Tensor:
        return tensors.rows(name, values(header, tensors.names[name])).to(others[name])

    return Source(
        name=path.stem,
        base=base,
        config=config,
        skeleton=skeleton,
        modules=modules,
        others={n: (kept, header.tensors[tensors.names[n]].shape) for n, kept in others.items()},
        group_size=group_size,
        shift=shift,
        dtype=dtype,
        layer=lambda name: _layer(tensors, name, group_size, shift, rounded),
        tensor=tensor,
        rounded=rounded,
        about={"base_model": {"name": path.name, "license": header.fields.get("general.license")}},
    )


def _dense(tensors: _Tensors, name: str, dtype: torch.dtype) -> torch.dtype:
    """The type a dense tensor is given in: the model's if its values are of that, else float32."""
    stored = tensors.names[name]
    kind = tensors.header.tensors[stored].type
    if kind != 0 or dtype == torch.float32:
        return _DENSE.get(kind, torch.float32)
    found = values(tensors.header, stored)
    return dtype if torch.equal(found.to(dtype).float(), found) else torch.float32


def _named(header: Header, config: dict[str, Any], skeleton: Any) -> _Tensors:
    """Every parameter of the model, and the tensor that holds it."""
    kind = str(config.get("model_type"))
    if kind not in ARCHITECTURES:
        raise InputError(
            f"{header.path} is of the type '{kind}'; {', '.join(ARCHITECTURES)} are taken in."
        )
    architecture = ARCHITECTURES[kind]
    known = name_map(architecture.name, int(config["num_hidden_layers"]))
    tied = getattr(skeleton, "all_tied_weights_keys", {})
    names: dict[str, str] = {}
    for name, parameter in skeleton.state_dict().items():
        new = known.get_name(name, try_suffixes=(".weight", ".bias"))
        if name in tied and new not in header.tensors:
            continue
        if new not in header.tensors:
            raise InputError(
                f"{header.path} lacks {new or name}, which its configuration asks for."
            )
        if header.tensors[new].shape != tuple(parameter.shape):
            raise InputError(f"{header.path} is damaged: {new} has another shape in the model.")
        names[name] = new
    unknown = set(header.tensors) - set(names.values()) - {ROPE_FACTORS}
    if unknown:
        raise InputError(f"{header.path} holds {min(unknown)}, which the model has no place for.")
    heads: dict[str, int] = {}
    if architecture.interleaved:
        queries = int(config["num_attention_heads"])
        of = {"attn_q": queries, "attn_k": int(config.get("num_key_value_heads") or queries)}
        parts = {name: new.split(".")[-2] for name, new in names.items()}
        heads = {name: of[part] for name, part in parts.items() if part in of}
    return _Tensors(header, names, heads)


def _own(header: Header) -> dict[str, Any]:
    """What a file of ours says of its source."""
    try:
        own = json.loads(header.fields.get(OWN_KEY, "{}"))
    except (ValueError, TypeError):
        own = None
    if not isinstance(own, dict):
        raise InputError(f"{header.path} is damaged: {OWN_KEY} is no JSON object.")
    return own


# --- groups and codes -----------------------------------------------------------------------------


def _group_size(tensors: _Tensors, modules: tuple[str, ...], own: Any) -> int:
    """The largest groups in which all layers have one scale and minimum each."""
    pairs = []
    for name in modules:
        kind = _BY_ID[tensors.header.tensors[tensors.names[f"{name}.weight"]].type]
        pairs.append((kind.block, *_scales(tensors, name)))
    smallest = max(block for block, _, _ in pairs)
    widest = max(block * scale.shape[1] for block, scale, _ in pairs)
    sizes = [smallest * 2**power for power in range(32) if smallest * 2**power < widest]
    for size in dict.fromkeys([own, widest, *reversed(sizes)]):
        if type(size) is int and size > 0 and all(_agree(*pair, size) for pair in pairs):
            return size
    raise InputError(f"{tensors.header.path}: the blocks of its layers agree on no group size.")


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


def _has_shift(tensors: _Tensors, modules: tuple[str, ...]) -> bool:
    """Whether a weight of level 1 is not 0 somewhere."""
    for name in modules:
        scale, minimum = _scales(tensors, name)
        if minimum is not None and bool((scale.float() + minimum.float() != 0).any()):
            return True
    return False


def _scales(tensors: _Tensors, name: str) -> tuple[Tensor, Tensor | None]:
    stored = tensors.names[f"{name}.weight"]
    kind = _BY_ID[tensors.header.tensors[stored].type]
    return scales(kind, _blocks(tensors.header, stored, kind))


def _layer(
    tensors: _Tensors, name: str, group_size: int, shift: bool, rounded: dict[str, float]
) -> TernaryWeight:
    """A layer's codes, scales and shifts.

    Raises:
        InputError: a group has more than three values, or values that are not evenly spaced.
    """
    stored = tensors.names[f"{name}.weight"]
    kind = _BY_ID[tensors.header.tensors[stored].type]
    raw = tensors.rows(f"{name}.weight", _blocks(tensors.header, stored, kind))
    blocks = decode(kind, raw)
    if kind.minimum:
        weight = _with_minimum(tensors, stored, kind, blocks, group_size)
        weight = weight if shift else replace(weight, shift=None)
    else:
        weight = _without_minimum(tensors, stored, kind, blocks, group_size)
        if shift:
            weight = replace(weight, shift=torch.zeros_like(weight.scale))
    error = largest_error(weight, blocks.values())
    if error:
        rounded[name] = error
    return weight


def _without_minimum(
    tensors: _Tensors, stored: str, kind: Kind, blocks: Blocks, group_size: int
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
    tensors: _Tensors, stored: str, kind: Kind, blocks: Blocks, group_size: int
) -> TernaryWeight:
    """The middle of three levels is code 0; where fewer stand, level 1 if it can be."""
    assert blocks.minimum is not None
    columns = blocks.levels.shape[1]
    size = min(columns, group_size)
    levels = _in_groups(blocks.levels, size)
    low, high = levels.amin(2), levels.amax(2)
    fine = blocks.factors is not None and any(bool((f != 1).any()) for f in blocks.factors)
    if fine or bool((high - low > 2).any()):
        row = 0 if fine else int((high - low > 2).any(1).nonzero()[0])
        values = (
            "scales for each 16 columns" if fine else f"{int((high - low)[row].max()) + 1} levels"
        )
        raise InputError(
            f"{tensors.header.path} is not ternary: {stored} ({kind.name}), row {row} has "
            f"{values}; a ternary weight has three values in a group."
        )
    centre = torch.where(high - low == 2, low + 1, low.clamp(1, kind.top - 1)).float()
    d = _in_groups(blocks.scale, size // kind.block)[:, :, 0].float()
    minimum = _in_groups(blocks.minimum, size // kind.block)[:, :, 0].float()
    sign = torch.where(d < 0, -1.0, 1.0)
    codes = (levels.float() - centre.unsqueeze(2)) * sign.unsqueeze(2)
    codes = torch.where((d == 0).unsqueeze(2), torch.zeros_like(codes), codes)
    codes = codes.flatten(1)[:, :columns].to(torch.int8).contiguous()
    return TernaryWeight(codes, d.abs().half(), (minimum + centre * d).half() + 0.0, group_size)


# --- configuration and tokenizer ------------------------------------------------------------------


def _write_base(header: Header, base: Path) -> None:
    """Have transformers write configuration and tokenizer, and mend what it does not know."""
    door: Any = hf  # hf.save_gguf_base(file, folder)
    header.without_data(base / "header.gguf")
    door.save_gguf_base(base / "header.gguf", base)
    (base / "header.gguf").unlink()
    own = _own(header).get("config")
    found = checkpoint.read_json(base / "config.json")
    config = own if isinstance(own, dict) else _mended(header, found)
    left_out = ("quantization_config", "auto_map")
    checkpoint.write_json(
        base / "config.json", {k: v for k, v in config.items() if k not in left_out}
    )
    _mend_tokenizer(header, base / "tokenizer.json")


def _mended(header: Header, config: dict[str, Any]) -> dict[str, Any]:
    """Settings of another program's file that transformers does not read."""
    if ROPE_FACTORS in header.tensors:
        raise InputError(
            f"{header.path} scales its rotary embedding by {ROPE_FACTORS}, which cannot be put "
            "into a configuration."
        )
    name = header.fields.get("general.architecture")
    if header.fields.get(f"{name}.rope.scaling.type", "none") != "none":
        raise InputError(f"{header.path} scales its rotary embedding, which is not taken in yet.")
    size = header.fields.get(f"{name}.attention.key_length")
    if size is not None:
        config["head_dim"] = size
    config["attention_bias"] = name == "llama" and "blk.0.attn_q.bias" in header.tensors
    config["mlp_bias"] = "blk.0.ffn_up.bias" in header.tensors
    return config


def _mend_tokenizer(header: Header, path: Path) -> None:
    """Single digits, where llama.cpp's name for the cut says so; transformers forgets them."""
    data = checkpoint.read_json(path)
    cut = data.get("pre_tokenizer") or {}
    if header.fields.get("tokenizer.ggml.pre") in _SINGLE_DIGITS and cut.get("type") == "ByteLevel":
        data["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [_DIGITS, cut]}
        checkpoint.write_json(path, data)
