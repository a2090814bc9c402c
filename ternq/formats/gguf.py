"""GGUF for llama.cpp: one file with weights, configuration and tokenizer.

Without shifts the ternary types hold every weight exactly; with shifts Q4_1 does with one rounding
(`ternq.formats.gguf_fit`). Everything else keeps its type, but that one-dimensional tensors are
float32, as llama.cpp wants them. docs/gguf.md says which types there are and what they cost.

The file is written tensor by tensor and read back by gguf-py, which decodes what it knows; Q2_0,
which it does not, is decoded by `ternq.formats.gguf_codec`.
"""

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from ternq.errors import RecipeError, VerificationError
from ternq.formats import Exported, Options
from ternq.formats.gguf_codec import KINDS, Kind
from ternq.formats.gguf_file import Header
from ternq.formats.gguf_fit import smallest
from ternq.formats.gguf_layers import values, values_by_gguf
from ternq.formats.gguf_models import ROPE_FACTORS, Model, described, uninterleaved
from ternq.formats.gguf_tokenizer import vocabulary
from ternq.formats.gguf_writer import Plan, digest, stored_bytes, write
from ternq.progress import Event, Progress
from ternq.source import Source


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
    plan = Plan(source, model, kinds, options)
    path = folder / f"{source.name}-{plan.usual.name}.gguf"
    write(path, plan, tokens, progress)
    reader = _verify(path, plan, progress)
    sizes = {name: source.size(name) for name in source.modules}
    return Exported(
        encoding="+".join(dict.fromkeys([plan.usual.name, *(k.name for k in kinds.values())])),
        bits=sum(8 * stored_bytes(kinds[n].id, (out, in_)) for n, (in_, out) in sizes.items()),
        checked=len(source.modules),
        reader=reader,
        rounded=plan.rounded,
        lost=plan.lost,
        notes=[why, *tokens.notes, *model.notes],
    )


def check(source: Source, options: Options) -> None:
    """Refuse what `export` would, as far as configuration and shapes tell."""
    described(source)
    chosen(source, options)


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


# --- reading back ---------------------------------------------------------------------------------


def _verify(path: Path, plan: Plan, progress: Progress) -> str:
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
        if digest(stored if heads is None else uninterleaved(stored, heads)) != meant:
            raise VerificationError(f"{name} is not in the file what was written.")
        progress(Event("verify", done=done, total=len(plan.meant)))
    return reader


def _values_of(path: Path, kinds: set[Kind]) -> tuple[Callable[[str], Tensor], str]:
    """A function that reads a tensor as float32, and the name of the program that it uses."""
    import gguf

    known = {member.value for member in gguf.GGMLQuantizationType}
    if not {kind.id for kind in kinds} <= known:
        header = Header(path)

        def mixed(name: str) -> Tensor:
            by = values_by_gguf if header.tensors[name].type in known else values
            return by(header, name)

        return mixed, f"gguf-py {_version('gguf')}; layers of Q2_0, which it does not know: ternq"
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}

    def read(name: str) -> Tensor:
        tensor = tensors[name]
        found = torch.from_numpy(gguf.quants.dequantize(tensor.data, tensor.tensor_type).copy())
        return found.reshape([int(n) for n in reversed(tensor.shape)])

    return read, f"gguf-py {_version('gguf')}"


def _version(package: str) -> str:
    import importlib.metadata

    return importlib.metadata.version(package)
