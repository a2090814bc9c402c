"""A model folder of another program, as far as all of them are alike.

Configuration, tokenizer and every tensor that is not ternary: copied by name, converted to one
type, written shard by shard, read back. What a format does with ternary layers is its own.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ternq import checkpoint, hf, outlines
from ternq.errors import RecipeError, VerificationError
from ternq.files import write_json
from ternq.formats import Options
from ternq.progress import Event, Progress
from ternq.source import Source
from ternq.writer import Layout, write_tensors

SHARD_BYTES = 5 * 10**8


@dataclass(frozen=True)
class Others:
    """The tensors that are not ternary, in the export's type; integers and buffers keep theirs.

    ``changed`` counts the values that the type cannot hold as they are, ``largest_change`` is the
    largest difference.
    """

    source: Source
    dtype: torch.dtype
    buffers: frozenset[str]
    layout: Layout
    changed: int
    largest_change: float

    def tensor(self, name: str) -> Tensor:
        """One of them, converted; `VerificationError` if it is not finite."""
        tensor = self.source.tensor(name)
        refuse_not_finite(name, tensor)
        return _converted(tensor, self.dtype, name in self.buffers)

    def notes(self) -> list[str]:
        """What rounding them cost, in a sentence, or nothing."""
        if not self.changed:
            return []
        return [
            f"{self.changed:,} values of tensors that are not ternary are rounded to "
            f"{checkpoint.dtype_name(self.dtype)}, by at most {self.largest_change:.2g}."
        ]


def chosen_dtype(
    options: Options, default: str, allowed: tuple[str, ...], what: str
) -> torch.dtype:
    """The type that ``options.encoding`` names; `RecipeError` if ``what`` has no such encoding."""
    name = options.encoding or default
    if name not in allowed:
        raise RecipeError(
            f"The format {what} has no encoding '{name}'.", f"It has {', '.join(allowed)}."
        )
    dtype: torch.dtype = getattr(torch, name)
    return dtype


def begin(source: Source, folder: Path, dtype: torch.dtype) -> Any:
    """Write configuration and base files; returns the empty model that they describe."""
    hf.copy_base(source.base, folder)
    write_config(source, folder, dtype, {})
    return outlines.skeleton(folder)


def write_config(source: Source, folder: Path, dtype: torch.dtype, more: Mapping[str, Any]) -> None:
    """Write ``config.json``: the model's own, its type, older names, and what the format adds."""
    left_out = ("quantization_config", "quantization", "torch_dtype")
    config = {name: value for name, value in source.config.items() if name not in left_out}
    config["dtype"] = checkpoint.dtype_name(dtype)
    write_json(folder / "config.json", {**older_names(config), **config, **more})


def others_of(source: Source, skeleton: Any, dtype: torch.dtype, options: Options) -> Others:
    """Look at every tensor that is not ternary: types, shapes, and what the conversion changes.

    Raises:
        RecipeError: a value is beyond the type, or changes and ``options.exact`` was given.
        VerificationError: a value is NaN or infinite.
    """
    buffers = frozenset(name for name, _ in skeleton.named_buffers())
    layout, changed, largest = {}, 0, 0.0
    for name in source.others:
        tensor = source.tensor(name)
        refuse_not_finite(name, tensor)
        new = _converted(tensor, dtype, name in buffers)
        layout[name] = (new.dtype, tuple(new.shape))
        if new.dtype == tensor.dtype:
            continue
        change = (new.double() - tensor.double()).abs()
        changed += int((change != 0).sum())
        largest = max(largest, float(change.max()) if change.numel() else 0.0)
        if not math.isfinite(largest):
            raise RecipeError(
                f"{name} has values that {checkpoint.dtype_name(dtype)} cannot hold.",
                "Choose --encoding float32.",
            )
        if changed and options.exact:
            raise RecipeError(
                f"{name} is not exact in {checkpoint.dtype_name(dtype)}.",
                "Choose --encoding float32, or leave out --exact.",
            )
    return Others(source, dtype, buffers, layout, changed, largest)


def write(
    folder: Path,
    others: Others,
    layers: Layout,
    tensors: Callable[[str], dict[str, Tensor]],
    progress: Progress,
) -> None:
    """Write all tensors. ``tensors`` gives those of a layer by the last part of their names.

    In the layout the tensors of a layer stand together, so each layer is asked for once.
    """
    modules = list(dict.fromkeys(name.rpartition(".")[0] for name in layers))
    held: dict[str, dict[str, Tensor]] = {}

    def tensor(name: str) -> Tensor:
        if name in others.layout:
            return others.tensor(name)
        module, _, part = name.rpartition(".")
        if module not in held:
            held.clear()
            held[module] = tensors(module)
            progress(Event("pack", done=modules.index(module) + 1, total=len(modules)))
        return held[module][part]

    write_tensors(folder, {**others.layout, **layers}, tensor, SHARD_BYTES)


def check_others(state: Mapping[str, Tensor] | checkpoint.TensorFolder, others: Others) -> None:
    """Compare every tensor that is not ternary; VerificationError if it is not what was written."""
    for name in others.layout:
        if not same(state[name], others.tensor(name)):
            raise VerificationError(f"{name} is not in the file what was written.")


def check_names(skeleton: Any, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Every tensor of the model stands in the file, tied ones once, and nothing else does.

    Raises:
        VerificationError: a name is missing, unknown, there twice, or of another shape.
    """
    state = skeleton.state_dict(keep_vars=True)
    alike: dict[int, set[str]] = {}
    for name, tensor in state.items():
        alike.setdefault(id(tensor), set()).add(name)
    for names in alike.values():
        if len(names & shapes.keys()) != 1:
            raise VerificationError(f"{min(names)} does not stand once in the file.")
    for name, shape in shapes.items():
        if name not in state or shape != tuple(state[name].shape):
            raise VerificationError(f"The model has no {name} of shape {list(shape)}.")


def bits(layout: Layout) -> int:
    """Bits that the tensors of a layout take."""
    return 8 * sum(dtype.itemsize * math.prod(shape) for dtype, shape in layout.values())


def refuse_transposed(source: Source, why: str) -> None:
    """`RecipeError` for a model whose layers are `Conv1D`, where a format has only `nn.Linear`."""
    if source.transposed:
        raise RecipeError(
            f"{min(source.transposed)} is a Conv1D, {why}.",
            "Choose --format dense.",
        )


def refuse_not_finite(name: str, tensor: Tensor) -> None:
    """`VerificationError` for a tensor that holds NaN or an infinity."""
    if not bool(tensor.isfinite().all()):
        raise VerificationError(f"{name} holds values that are not finite.")


def same(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors are alike in type, shape and value."""
    return a.dtype == b.dtype and torch.equal(a, b)


def older_names(config: Mapping[str, Any]) -> dict[str, Any]:
    """The rotary settings under the names that readers other than transformers 5 look for.

    transformers 5 writes them into ``rope_parameters`` only. mlx-lm 0.32.2 (models/llama.py,
    models/qwen2.py, read) does not look there and would take another base without a word.
    """
    rope = config.get("rope_parameters")
    if not isinstance(rope, dict) or "rope_theta" not in rope:
        return {}
    names = {"rope_theta": rope["rope_theta"]}
    if rope.get("rope_type", "default") != "default":
        names["rope_scaling"] = {k: v for k, v in rope.items() if k != "rope_theta"}
    if "partial_rotary_factor" in rope:
        names["partial_rotary_factor"] = rope["partial_rotary_factor"]
    if config.get("model_type") == "gpt_neox":
        names["rotary_emb_base"] = rope["rope_theta"]
        names["rotary_pct"] = rope.get("partial_rotary_factor", 1.0)
    return names


def _converted(tensor: Tensor, dtype: torch.dtype, is_buffer: bool) -> Tensor:
    return tensor if is_buffer or not tensor.is_floating_point() else tensor.to(dtype)
