"""GGUF for llama.cpp: one file with weights, configuration and tokenizer.

Without shifts the ternary types hold every weight exactly; with shifts Q4_1 does with one rounding
(`ternq.formats.gguf_fit`). Everything else keeps its type, but that one-dimensional tensors are
float32, as llama.cpp wants them. docs/gguf.md says which types there are and what they cost.

The file is written tensor by tensor and read back by gguf-py, which decodes what it knows; Q2_0,
which it does not, is decoded by `ternq.formats.gguf_codec`.
"""

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ternq import hf
from ternq.errors import RecipeError, VerificationError
from ternq.formats import Exported, Options
from ternq.formats.gguf_codec import KINDS, Kind, encode
from ternq.formats.gguf_file import Header
from ternq.formats.gguf_fit import Fitted, fitted, smallest
from ternq.formats.gguf_models import ROPE_FACTORS, Model, described, interleaved, uninterleaved
from ternq.formats.gguf_tokenizer import Vocabulary, vocabulary
from ternq.progress import Event, Progress
from ternq.source import Source

OWN_KEY = "ternq.source"  # JSON: configuration, group size and shift of what was exported
_DENSE = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 30}
_DENSE_NAMES = {0: "F32", 1: "F16", 30: "BF16"}


@dataclass
class _Plan:
    """What goes into the file, in order."""

    source: Source
    model: Model
    kinds: Mapping[str, Kind]
    options: Options
    rounded: dict[str, float] = field(default_factory=dict)
    lost: dict[str, float] = field(default_factory=dict)

    def fitted(self, module: str) -> Fitted:
        """A layer in blocks, its rows as transformers has them."""
        weight = self.source.layer(module)
        return fitted(module, weight, self.kinds[module], self.options.exact, self.options.lossy)

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
    for module in source.modules:
        fit = plan.fitted(module)
        if fit.lost is not None:
            plan.lost[module] = fit.lost
        elif fit.error:
            plan.rounded[module] = fit.error
        progress(Event("plan", module))
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

    writer = GGUFWriter(path, plan.model.architecture)
    try:
        _add_settings(writer, plan)
        _add_tokens(writer, tokens)
        _add_infos(writer, plan)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        parts = list(_parts(plan))
        for done, (name, _, _, data) in enumerate(parts, 1):
            writer.write_tensor_data(data().numpy())
            progress(Event("pack", name, done=done, total=len(parts)))
    finally:
        writer.close()


def _parts(plan: _Plan) -> Iterator[tuple[str, int, tuple[int, ...], Callable[[], Tensor]]]:
    """Name, type's id, shape and bytes of every tensor, ternary layers last."""
    source, names = plan.source, plan.model.names
    if plan.model.rope_factors is not None:
        factors = plan.model.rope_factors
        yield ROPE_FACTORS, 0, tuple(factors.shape), lambda: factors
    for name, (dtype, shape) in source.others.items():
        kind = _dense_type(name, dtype, shape)

        def dense(name: str = name, kind: int = kind) -> Tensor:
            tensor = plan.rows(name, source.tensor(name)).contiguous()
            return tensor.float() if kind == 0 else tensor.view(torch.uint8)

        yield names[name], kind, shape, dense
    for module in source.modules:
        columns, rows = source.size(module)

        def packed(module: str = module) -> Tensor:
            data = encode(plan.kinds[module], plan.fitted(module).blocks)
            return plan.rows(f"{module}.weight", data)

        yield names[f"{module}.weight"], plan.kinds[module].id, (rows, columns), packed


def _dense_type(name: str, dtype: torch.dtype, shape: tuple[int, ...]) -> int:
    if dtype not in _DENSE:
        raise RecipeError(f"{name} is {dtype}, which is not written to a GGUF file.")
    return 0 if len(shape) == 1 else _DENSE[dtype]


def _bytes(kind: int, shape: tuple[int, ...]) -> int:
    """The bytes of a tensor."""
    of = {0: (1, 4), 1: (1, 2), 30: (1, 2)} | {k.id: (k.block, k.bytes) for k in KINDS.values()}
    block, size = of[kind]
    return torch.Size(shape).numel() // block * size


def _add_infos(writer: Any, plan: _Plan) -> None:
    import numpy as np

    for name, kind, shape, _ in _parts(plan):
        size = _bytes(kind, shape)
        writer.add_tensor_info(name, shape, np.dtype(np.int8), size, raw_dtype=kind)


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
    source, names = plan.source, plan.model.names
    expected = set(names.values()) | (
        {ROPE_FACTORS} if plan.model.rope_factors is not None else set()
    )
    header = Header(path)
    if set(header.tensors) != expected:
        wrong = min(set(header.tensors) ^ expected)
        raise VerificationError(
            f"{path.name} has other tensors than were written, such as {wrong}."
        )
    if plan.model.rope_factors is not None:
        _compare(ROPE_FACTORS, read(ROPE_FACTORS), plan.model.rope_factors)
    for name in source.others:
        _compare(name, _own_rows(plan, name, read(names[name])), source.tensor(name).float())
    for done, module in enumerate(source.modules, 1):
        name = f"{module}.weight"
        stored = _own_rows(plan, name, read(names[name]))
        _compare(name, stored, plan.fitted(module).blocks.values())
        if module not in plan.rounded and module not in plan.lost:
            _compare(name, stored, source.layer(module).dequantized())
        progress(Event("verify", done=done, total=len(source.modules)))
    return reader


def _own_rows(plan: _Plan, name: str, tensor: Tensor) -> Tensor:
    heads = plan.model.heads.get(name)
    return tensor if heads is None else uninterleaved(tensor, heads)


def _compare(name: str, stored: Tensor, meant: Tensor) -> None:
    if not torch.equal(stored, meant):
        raise VerificationError(f"{name} is not in the file what was written.")


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
