"""The ternq format (docs/format.md), written layer by layer from a `Source`.

Codes are packed from integers, never from the output of the straight-through estimator, which
leaves the grid in floating point. What is written can be read by `ternq.modeling_ternq`, of which
a copy lies in the folder.
"""

import inspect
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

from ternq import checkpoint, hf, int8, modeling_ternq, packing
from ternq.errors import RecipeError, VerificationError
from ternq.files import write_json
from ternq.progress import Event, Progress
from ternq.publish import FORMAT_VERSION
from ternq.source import Source, constant_rows
from ternq.ternary import n_groups
from ternq.weights import Tally, embeddings
from ternq.writer import Layout, TensorWriter

CODE = "modeling_ternq.py"
_ARCHITECTURE = '''

# --- how `trust_remote_code=True` finds the model -------------------------------------------------

from transformers import {config}, {model}  # noqa: E402


class Ternq{config}({config}):
    """The configuration; loading it makes transformers know the format."""


class Ternq{model}({model}):
    """The model; its packed layers are put in by the quantizer."""

    config_class = Ternq{config}
'''


@dataclass
class Written:
    """What was written: SHA-256 of every tensor, counts, and what was lost on the way."""

    digests: dict[str, bytes]
    tally: Tally
    constant_rows: int = 0
    int8_errors: dict[str, float] = field(default_factory=dict)


def write(
    source: Source, folder: Path, dtype: torch.dtype, eight_bit: bool, progress: Progress
) -> Written:
    """Write everything of an artefact but manifest and card.

    Parameters become ``dtype``; with ``eight_bit`` embeddings and output head become int8.

    Raises:
        VerificationError: a value that its type in the file cannot hold.
        RecipeError: embeddings of a kind that cannot be int8.
    """
    ends = embeddings(source.skeleton)
    tables = _tables(ends) if eight_bit else {}
    parameters = {n for n, _ in source.skeleton.named_parameters(remove_duplicate=False)}
    layout = _layout(source, dtype, parameters, tables)
    written, done = Written({}, Tally()), 0
    with TensorWriter(folder, layout) as writer:
        for name in _order(source):
            if name in source.modules:
                for part, tensor in _packed(source, name, written):
                    writer.write(f"{name}.{part}", tensor)
                done += 1
                progress(Event("pack", done=done, total=len(source.modules)))
            elif name in tables:
                for part, tensor in _eight_bit(name, source.tensor(name), written):
                    writer.write(f"{name.removesuffix('weight')}{part}", tensor)
            else:
                kept = dtype if name in parameters else source.others[name][0]
                tensor = _converted(name, source.tensor(name), kept)
                writer.write(name, tensor)
                if name in parameters:
                    count, own = tensor.numel(), name.rpartition(".")[0] in ends
                    written.tally.add_dense(count, 8 * tensor.nbytes, embedding=own)
        written.digests = writer.digests
    _write_config(source, folder, dtype, tables)
    (folder / CODE).write_text(code(source), encoding="utf-8")
    return written


def _layout(
    source: Source, dtype: torch.dtype, parameters: set[str], tables: dict[str, str]
) -> Layout:
    """Name -> type and shape of every tensor of the artefact, in the model's order."""
    layout: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {}
    for name in _order(source):
        if name in source.modules:
            columns, rows = source.size(name)
            groups = (torch.float16, (rows, n_groups(columns, source.group_size)))
            layout[f"{name}.weight"] = (torch.uint8, (rows, packing.packed_width(columns)))
            layout[f"{name}.weight_scale"] = groups
            if source.shift:
                layout[f"{name}.weight_shift"] = groups
        else:
            own, shape = source.others[name]
            if name in tables:
                layout[name] = (torch.int8, shape)
                layout[f"{name}_scale"] = (torch.float16, shape[:1])
            else:
                kept = dtype if name in parameters and own.is_floating_point else own
                layout[name] = (kept, shape)
    return layout


def _order(source: Source) -> Iterator[str]:
    """Names of ternary modules and of other tensors, as they come in the model."""
    modules, given = set(source.modules), set()
    for name in source.skeleton.state_dict():
        module = name.rpartition(".")[0]
        if module in modules and name.endswith(".weight"):
            yield module
        elif name in source.others:
            given.add(name)
            yield name
    yield from (name for name in source.others if name not in given)


def _packed(source: Source, name: str, written: Written) -> Iterator[tuple[str, Tensor]]:
    """The tensors of a packed layer; what the reader of the artefact makes of them is checked."""
    weight = source.layer(name)
    packed = packing.pack_base3(weight.codes)
    if not torch.equal(modeling_ternq.unpack(packed, weight.codes.shape[1]), weight.codes):
        raise VerificationError(f"Layer {name}: packing its codes does not keep them.")
    written.tally.add_layer(weight.codes, weight.group_size, weight.shift is not None)
    written.constant_rows += int(constant_rows(weight).sum())
    yield "weight", packed
    yield "weight_scale", weight.scale
    if weight.shift is not None:
        yield "weight_shift", weight.shift


def _tables(ends: dict[str, nn.Module]) -> dict[str, str]:
    """Name of the stored tensor -> module, for input embedding and output head."""
    found = {}
    for name, module in ends.items():
        if type(module) not in (nn.Embedding, nn.Linear, modeling_ternq.DenseHead):
            raise RecipeError(
                f"--embeddings int8: {name} is a {type(module).__name__}, which has no 8-bit form.",
                "Leave --embeddings out.",
            )
        found[f"{name}.weight"] = name
    return found


def _eight_bit(name: str, tensor: Tensor, written: Written) -> Iterator[tuple[str, Tensor]]:
    try:
        codes, scale = int8.quantize_rows(tensor)
    except ValueError as error:
        raise VerificationError(f"{name} cannot be stored in 8 bits: {error}.") from error
    exact = tensor.float()
    lost = (int8.dequantize_rows(codes, scale) - exact).norm() / exact.norm().clamp(1e-30)
    written.int8_errors[name] = float(lost)
    written.tally.add_dense(codes.numel(), 8 * (codes.nbytes + scale.nbytes), embedding=True)
    yield "weight", codes
    yield "weight_scale", scale


def _converted(name: str, tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """The tensor in its type of the file; values that are not finite are refused."""
    if not tensor.is_floating_point():
        return tensor
    new = tensor.to(dtype)
    if not bool(new.isfinite().all()):
        if not bool(tensor.isfinite().all()):
            raise VerificationError(f"{name} has values that are NaN or infinite.")
        raise VerificationError(
            f"{name} has values that {checkpoint.dtype_name(dtype)} cannot hold.",
            "Start from a float32 or bfloat16 checkpoint.",
        )
    return new


def _write_config(source: Source, folder: Path, dtype: torch.dtype, tables: dict[str, str]) -> None:
    """Configuration, tokenizer and generation settings."""
    hf.copy_base(source.base, folder)
    config = dict(source.config)
    model = type(source.skeleton).__name__
    name = type(source.skeleton.config).__name__
    config.setdefault("architectures", [model])
    config["dtype"] = checkpoint.dtype_name(dtype)
    config["auto_map"] = {
        "AutoConfig": f"modeling_ternq.Ternq{name}",
        "AutoModelForCausalLM": f"modeling_ternq.Ternq{model}",
    }
    config["quantization_config"] = {
        "quant_method": modeling_ternq.METHOD,
        "format_version": FORMAT_VERSION,
        "codec": "base3",
        "group_size": source.group_size,
        "shift": source.shift,
        "modules": list(source.modules),
        "int8_modules": list(tables.values()),
    }
    write_json(folder / "config.json", config)


def code(source: Source) -> str:
    """The copy of `ternq.modeling_ternq`, with the classes that ``auto_map`` names."""
    text = inspect.getsource(modeling_ternq)
    names = {"config": source.skeleton.config, "model": source.skeleton}
    classes = _ARCHITECTURE.format(**{k: type(v).__name__ for k, v in names.items()})
    return text + classes
