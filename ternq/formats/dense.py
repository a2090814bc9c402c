"""Dense safetensors for plain transformers: every product ``scale * code + shift`` written out.

For programs that know no packed format. The numbers are rounded to the type of the file, bfloat16
unless another is asked for: that is what this format is, and it is said per layer. float32 is
always exact.
"""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ternq import checkpoint, hf
from ternq.errors import RecipeError, TernqError, VerificationError
from ternq.formats import Exported, Options, folders
from ternq.formats.groups import largest_error
from ternq.progress import Event, Progress
from ternq.proof import LARGEST_LOADED
from ternq.source import Source

ENCODINGS = ("bfloat16", "float16", "float32")


def export(source: Source, folder: Path, options: Options, progress: Progress) -> Exported:
    """Write the model as a dense one, and have transformers load it again.

    Raises:
        RecipeError: no such encoding, a value beyond it, or rounding that ``exact`` forbids.
        VerificationError: what is read is not what was written.
    """
    dtype = check(source, options)
    skeleton = folders.begin(source, folder, dtype)
    others = folders.others_of(source, skeleton, dtype, options)
    state = skeleton.state_dict()
    names = [f"{module}.weight" for module in source.modules]
    layout = {name: (dtype, tuple(state[name].shape)) for name in names}
    rounded: dict[str, float] = {}

    def tensors(module: str) -> dict[str, Tensor]:
        weight, error = _rounded(source, module, dtype, options)
        if error:
            rounded[module] = error
        return {"weight": weight}

    folders.write(folder, others, layout, tensors, progress)
    reader = _verify(folder, others, skeleton, progress)
    return Exported(
        encoding=checkpoint.dtype_name(dtype),
        bits=folders.bits(layout),
        checked=len(source.modules),
        reader=reader,
        rounded=rounded,
        notes=others.notes(),
    )


def check(source: Source, options: Options) -> torch.dtype:
    """The type of the file; refuses what `export` would, as far as the first layer tells."""
    dtype = folders.chosen_dtype(options, "bfloat16", ENCODINGS, "dense")
    for first in source.modules[:1]:  # of a model that is not ternary there is none
        _rounded(source, first, dtype, options)
    return dtype


def _rounded(
    source: Source, module: str, dtype: torch.dtype, options: Options
) -> tuple[Tensor, float]:
    """A layer's weight for the file, and its largest error in units of the scale."""
    weight = source.layer(module)
    stored = weight.dequantized().to(dtype)
    if not bool(stored.isfinite().all()):
        raise RecipeError(
            f"Layer {module} has values that {checkpoint.dtype_name(dtype)} cannot hold.",
            "Choose --encoding bfloat16 or float32.",
        )
    error = largest_error(weight, stored)
    if error and options.exact:
        raise RecipeError(
            f"Layer {module} is not exact in {checkpoint.dtype_name(dtype)}: rounding moves a "
            f"weight by {error:.2g} of its scale.",
            "Choose --encoding float32, or leave out --exact.",
        )
    return _as_held(source, module, stored), error


def _as_held(source: Source, module: str, weight: Tensor) -> Tensor:
    """A weight ``[out, in]`` as the model holds it: ``Conv1D`` wants ``[in, out]``."""
    return weight.t().contiguous() if module in source.transposed else weight


def _verify(folder: Path, others: folders.Others, skeleton: Any, progress: Progress) -> str:
    """Compare every tensor of the file; returns who read it."""
    source = others.source
    written = checkpoint.TensorFolder(folder)
    folders.check_names(skeleton, written.shapes)
    small = source.parameters <= LARGEST_LOADED
    state = _loaded(folder, others.dtype) if small else written
    folders.check_others(state, others)
    for done, module in enumerate(source.modules, 1):
        weight = source.layer(module).dequantized().to(others.dtype)
        if not folders.same(state[f"{module}.weight"], _as_held(source, module, weight)):
            raise VerificationError(f"Layer {module} is not in the file what was written.")
        progress(Event("verify", done=done, total=len(source.modules)))
    return "transformers" if small else "safetensors, names and shapes by transformers"


def _loaded(folder: Path, dtype: torch.dtype) -> dict[str, Tensor]:
    """The state of the model that transformers makes of the folder."""
    try:
        model = hf.load(str(folder), dtype=dtype, offline=True).model
    except TernqError as error:
        raise VerificationError(f"transformers cannot load the folder: {error.message}") from error
    state: dict[str, Tensor] = model.state_dict()
    return state
