"""GGUF for llama.cpp: one file with weights, configuration and tokenizer.

Without shifts the ternary types hold every weight exactly; with shifts Q4_1 does with one rounding
(`ternq.formats.gguf_fit`). Everything else keeps its type, but that one-dimensional tensors are
float32, as llama.cpp wants them. docs/gguf.md says which types there are and what they cost.

The file is written tensor by tensor and read back by gguf-py, which decodes what it knows; Q2_0,
which it does not, is decoded by `ternq.formats.gguf_codec`.
"""

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ternq import hf
from ternq.errors import RecipeError, VerificationError
from ternq.formats import Exported, Options
from ternq.formats.gguf_codec import KINDS, Kind, encode
from ternq.formats.gguf_file import Header
from ternq.formats.gguf_fit import fitted, smallest
from ternq.formats.gguf_models import ROPE_FACTORS, Model, described, interleaved, uninterleaved
from ternq.formats.gguf_tokenizer import Vocabulary, vocabulary
from ternq.progress import Event, Progress
from ternq.source import Source

OWN_KEY = "ternq.source"  # JSON: configuration, group size and shift of what was exported
_DENSE = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 30}
_DENSE_NAMES = {0: "F32", 1: "F16", 30: "BF16"}


@dataclass
class _Plan:
    """What goes into the file, and what came of it.

    ``meant`` has the SHA-256 of the values of every tensor that was written, in float32 and with
    rows as transformers has them.
    """

    source: Source
    model: Model
    kinds: Mapping[str, Kind]
    options: Options
    rounded: dict[str, float] = field(default_factory=dict)
    lost: dict[str, float] = field(default_factory=dict)
    meant: dict[str, bytes] = field(default_factory=dict)

    def packed(self, module: str) -> Tensor:
        """The bytes of a layer; what it lost is noted."""
        kind, options = self.kinds[module], self.options
        fit = fitted(module, self.source.layer(module), kind, options.exact, options.lossy)
        if fit.lost is not None:
            self.lost[module] = fit.lost
        elif fit.error:
            self.rounded[module] = fit.error
        name = f"{module}.weight"
        self.meant[name] = _digest(fit.blocks.values())
        return self.rows(name, encode(kind, fit.blocks))

    def dense(self, name: str, wide: bool) -> Tensor:
        """The bytes of another tensor; ``wide`` makes it float32."""
        tensor = self.source.tensor(name)
        self.meant[name] = _digest(tensor.float())
        rows = self.rows(name, tensor).contiguous()
        return rows.float() if wide else rows.view(torch.uint8)

    @property
    def usual(self) -> Kind:
        """The type of most weights; it names the file."""
        names = [kind.name for kind in self.kinds.values()]
        return KINDS[max(KINDS, key=names.count)]

    def rows(self, name: str, tensor: Tensor) -> Tensor:
        """A tensor with its rows where llama.cpp wants them."""
        heads = self.model.heads.get(name)
        return tensor if heads is None else interleaved(tensor, heads)


def export(source: Source, folder: Path, options: Options, progress: Progress) -> Exported:
    """Write ``<name>-<type>.gguf``; ``options.encoding`` is the type, by default the one that fits.

    Raises:
        RecipeError: a model, tokenizer or layer that the file cannot hold (as it is).
        VerificationError: what is read back is not what was written.
    """
    model = described(source)
    kinds, why = chosen(source, options)
    size = _embedding_rows(source, model)
    tokens = vocabulary(source.base, size, source.config, options.lossy)
    plan = _Plan(source, model, kinds, options)
    path = folder / f"{source.name}-{plan.usual.name}.gguf"
    _write(path, plan, tokens, progress)
    reader = _verify(path, plan, progress)
    sizes = {name: source.size(name) for name in source.modules}
    return Exported(
        encoding="+".join(dict.fromkeys([plan.usual.name, *(k.name for k in kinds.values())])),
        bits=sum(8 * _bytes(kinds[n].id, (out, in_)) for n, (in_, out) in sizes.items()),
        checked=len(source.modules),
        reader=reader,
        rounded=plan.rounded,
        lost=plan.lost,
        notes=[why, *tokens.notes, *model.notes],
    )


def chosen(source: Source, options: Options) -> tuple[dict[str, Kind], str]:
    """The type of every layer, and why, in a sentence.

    It is the one that was asked for, or the smallest that fits all layers. Where the rows of a
    layer are no multiple of its block, a type of smaller blocks takes its place.

    Raises:
        RecipeError: there is no such type, or none whose blocks divide the rows of a layer.
    """
    sizes = {name: source.size(name)[0] for name in source.modules}
    fitting = {n: smallest(size, source.group_size, source.shift) for n, size in sizes.items()}
    if options.encoding is None:
        usual = min((kind or KINDS["Q4_1"] for kind in fitting.values()), key=lambda k: k.block)
        why = f"The type is {usual.name}: "
        if source.shift:
            why += "the weights have shifts."
        else:
            why += "the smallest whose blocks divide all rows and groups."
    elif options.encoding.upper() in KINDS:
        usual = KINDS[options.encoding.upper()]
        why = f"The type {usual.name} was asked for."
    else:
        raise RecipeError(
            f"The format gguf has no type '{options.encoding}' that holds ternary weights.",
            f"It has {', '.join(KINDS)}.",
        )
    kinds = dict.fromkeys(sizes, usual)
    replaced: dict[str, set[int]] = {}
    for name, size in sizes.items():
        other = fitting[name]
        if size % usual.block and other is not None and other.block < usual.block:
            kinds[name] = other
            replaced.setdefault(other.name, set()).add(size)
    for other_name, widths in replaced.items():
        count = sum(kind.name == other_name for kind in kinds.values())
        why += (
            f" {count} of {len(kinds)} layers are {other_name}, since blocks of {usual.block} do "
            f"not divide rows of {' and '.join(map(str, sorted(widths)))}."
        )
    return kinds, why


def _embedding_rows(source: Source, model: Model) -> int:
    name = next(n for n, new in model.names.items() if new == "token_embd.weight")
    if name in source.others:
        return source.others[name][1][0]
    return source.size(name.removesuffix(".weight"))[1]


# --- writing --------------------------------------------------------------------------------------


def _write(path: Path, plan: _Plan, tokens: Vocabulary, progress: Progress) -> None:
    from gguf import GGUFWriter

    parts = list(_parts(plan))
    writer: Any = GGUFWriter(path, plan.model.architecture)  # takes ids of types it has no name for
    try:
        _add_settings(writer, plan)
        _add_tokens(writer, tokens)
        for part in parts:
            writer.add_tensor_info(*part.info, raw_dtype=part.type)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for done, part in enumerate(parts, 1):
            writer.write_tensor_data(part.data().numpy())
            progress(Event("pack", done=done, total=len(parts)))
    except BaseException:
        writer.close()
        path.unlink(missing_ok=True)
        raise
    writer.close()


@dataclass(frozen=True)
class _Part:
    """A tensor of the file: its name there, its type's id, its shape, and who makes its bytes."""

    name: str
    type: int
    shape: tuple[int, ...]
    data: Callable[[], Tensor]

    @property
    def info(self) -> tuple[Any, ...]:
        """What gguf-py's writer is told of it; the type of its numbers is given apart."""
        import numpy as np

        return self.name, self.shape, np.dtype(np.int8), _bytes(self.type, self.shape)


def _parts(plan: _Plan) -> Iterator[_Part]:
    """Every tensor, ternary layers last."""
    source, names = plan.source, plan.model.names
    factors = plan.model.rope_factors
    if factors is not None:
        yield _Part(ROPE_FACTORS, 0, tuple(factors.shape), lambda: factors)
    for name, (dtype, shape) in source.others.items():
        kind = _dense_type(name, dtype, shape)
        yield _Part(names[name], kind, shape, partial(plan.dense, name, kind == 0))
    for module in source.modules:
        columns, rows = source.size(module)
        data = partial(plan.packed, module)
        yield _Part(names[f"{module}.weight"], plan.kinds[module].id, (rows, columns), data)


def _dense_type(name: str, dtype: torch.dtype, shape: tuple[int, ...]) -> int:
    if dtype not in _DENSE:
        raise RecipeError(f"{name} is {dtype}, which is not written to a GGUF file.")
    return 0 if len(shape) == 1 else _DENSE[dtype]


def _bytes(kind: int, shape: tuple[int, ...]) -> int:
    """The bytes of a tensor."""
    of = {0: (1, 4), 1: (1, 2), 30: (1, 2)} | {k.id: (k.block, k.bytes) for k in KINDS.values()}
    block, size = of[kind]
    return torch.Size(shape).numel() // block * size


def _add_settings(writer: Any, plan: _Plan) -> None:
    source = plan.source
    writer.add_type("model")
    writer.add_name(source.name)
    licence = (source.about.get("base_model") or {}).get("license") or hf.licence(source.base)
    writer.add_license(licence or "")
    writer.add_quantization_version(2)
    writer.add_file_type(plan.usual.file_type)
    add = {int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}
    for key, value in plan.model.settings.items():
        add[type(value)](key, value)
    own = {
        "config": dict(source.config),
        "group_size": source.group_size,
        "shift": source.shift,
    }
    writer.add_string(OWN_KEY, json.dumps(own))


def _add_tokens(writer: Any, tokens: Vocabulary) -> None:
    writer.add_tokenizer_model(tokens.model)
    writer.add_tokenizer_pre(tokens.pre)
    writer.add_token_list(tokens.tokens)
    writer.add_token_types(tokens.types)
    if tokens.merges is not None:
        writer.add_token_merges(tokens.merges)
    if tokens.scores is not None:
        writer.add_token_scores(tokens.scores)
        writer.add_add_space_prefix(tokens.add_prefix)
    add = {
        "bos": writer.add_bos_token_id,
        "eos": writer.add_eos_token_id,
        "unknown": writer.add_unk_token_id,
        "padding": writer.add_pad_token_id,
    }
    for name, number in tokens.ids.items():
        add[name](number)
    writer.add_add_bos_token(tokens.add_bos)
    writer.add_add_eos_token(tokens.add_eos)
    if tokens.chat_template:
        writer.add_chat_template(tokens.chat_template)


# --- reading back ---------------------------------------------------------------------------------


def _verify(path: Path, plan: _Plan, progress: Progress) -> str:
    """Compare every tensor of the file with what was meant; returns who read it."""
    read, reader = _values_of(path, set(plan.kinds.values()))
    names, factors = plan.model.names, plan.model.rope_factors
    expected = set(names.values()) | (set() if factors is None else {ROPE_FACTORS})
    wrong = set(Header(path).tensors) ^ expected
    if wrong:
        raise VerificationError(f"{path.name} lacks {min(wrong)}, or has it against the plan.")
    if factors is not None and not torch.equal(read(ROPE_FACTORS), factors):
        raise VerificationError(f"{ROPE_FACTORS} is not in the file what was written.")
    for done, (name, meant) in enumerate(plan.meant.items(), 1):
        heads = plan.model.heads.get(name)
        stored = read(names[name])
        if _digest(stored if heads is None else uninterleaved(stored, heads)) != meant:
            raise VerificationError(f"{name} is not in the file what was written.")
        progress(Event("verify", done=done, total=len(plan.meant)))
    return reader


def _digest(values: Tensor) -> bytes:
    """SHA-256 of float32 values; -0 counts as 0."""
    return hashlib.sha256((values + 0.0).contiguous().numpy().data).digest()


def _values_of(path: Path, kinds: set[Kind]) -> tuple[Callable[[str], Tensor], str]:
    """A function that reads a tensor as float32, and the name of the program that it uses."""
    import gguf

    from ternq.formats.gguf_import import values

    known = {member.value for member in gguf.GGMLQuantizationType}
    if not {kind.id for kind in kinds} <= known:
        header = Header(path)
        return lambda name: values(header, name), "ternq (gguf-py does not know Q2_0)"
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}

    def read(name: str) -> Tensor:
        tensor = tensors[name]
        found = torch.from_numpy(gguf.quants.dequantize(tensor.data, tensor.tensor_type).copy())
        return found.reshape([int(n) for n in reversed(tensor.shape)])

    return read, f"gguf-py {_version('gguf')}"


def _version(package: str) -> str:
    import importlib.metadata

    return importlib.metadata.version(package)
