"""MLX's affine quantization with two bits: for mlx-lm, on Apple silicon above all.

A weight is ``scales * q + biases`` with q in {0, 1, 2, 3} (mlx 0.32.4, the documentation of
``mlx.core.quantize``): q = code + 1 and biases = shift - scale. Without shift that is exact; with
it the bias is rounded once to float16. A negative scale says the same with q = 1 - code and
biases = shift + scale: of the two the one that rounds less is taken, which keeps the error below
5e-4 of the scale as long as the shift is at most twice the scale.

MLX promotes where types are mixed, so all tensors have one type: float16, or float32, which loses
of a shift only what is below 1e-7 of the scale.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ternq import checkpoint
from ternq.errors import RecipeError, VerificationError
from ternq.formats import Exported, Options, folders
from ternq.formats.bits import DIGITS_PER_WORD, packed, unpacked
from ternq.formats.groups import common_size, largest_error, regrouped, regrouping
from ternq.progress import Event, Progress
from ternq.source import Source
from ternq.ternary import TernaryWeight, grouped, ungrouped
from ternq.writer import Layout

SIZES = (128, 64, 32)  # of groups that MLX knows
PARTS = ("weight", "scales", "biases")
BOUND = 5e-4  # of a scale: what one rounding of the bias may cost
ENCODINGS = ("float16", "float32")


@dataclass(frozen=True)
class Affine:
    """A weight as MLX holds it: ``scales * digits + biases``.

    ``digits`` uint8 ``[out, in]``, at most 2; ``scales`` and ``biases`` ``[out, groups]``.
    """

    digits: Tensor
    scales: Tensor
    biases: Tensor

    def tensors(self) -> dict[str, Tensor]:
        """By their names in the file."""
        words = packed(self.digits).view(torch.uint32)
        return dict(zip(PARTS, (words, self.scales, self.biases), strict=True))

    def values(self, group_size: int) -> Tensor:
        """The weight, float32 ``[out, in]``."""
        groups = grouped(self.digits.float(), group_size) * self.scales.float().unsqueeze(2)
        return ungrouped(groups + self.biases.float().unsqueeze(2), self.digits.shape[1])


def export(source: Source, folder: Path, options: Options, progress: Progress) -> Exported:
    """Write the model for mlx-lm; MLX itself decodes it where it is installed, else we do.

    Raises:
        RecipeError: rows that no group of MLX divides, values beyond the type, a bias that rounds
            by more than `BOUND` without ``lossy``, or at all with ``exact``.
        VerificationError: what is read is not what was written.
    """
    dtype = check(source, options)
    skeleton = folders.begin(source, folder, dtype)
    shapes = {n: tuple(skeleton.get_submodule(n).weight.shape) for n in source.modules}
    sizes = {n: _size(n, shape[1], source.group_size) for n, shape in shapes.items()}
    others = folders.others_of(source, skeleton, dtype, options)
    settings = _settings(sizes)
    twice = {"quantization": settings, "quantization_config": settings}  # mlx-lm writes both
    folders.write_config(source, folder, dtype, twice)
    layout = _layout(shapes, sizes, dtype)
    rounded: dict[str, float] = {}

    def tensors(module: str) -> dict[str, Tensor]:
        stored, error = _layer(source, module, sizes[module], dtype, options)
        if error:
            rounded[module] = error
        return stored.tensors()

    folders.write(folder, others, layout, tensors, progress)
    reader = _verify(folder, others, skeleton, sizes, progress)
    return Exported(
        encoding=_encoding(sizes, dtype),
        bits=folders.bits(layout),
        checked=len(source.modules),
        reader=reader,
        rounded=rounded,
        notes=others.notes() + regrouping(source, sizes),
    )


def check(source: Source, options: Options) -> torch.dtype:
    """The type of the file; refuses what `export` would, by all shapes and the first layer."""
    folders.refuse_transposed(source, "whose weight mlx-lm transposes when it loads")
    dtype = folders.chosen_dtype(options, "float16", ENCODINGS, "mlx")
    sizes = {n: _size(n, source.size(n)[0], source.group_size) for n in source.modules}
    for first in source.modules[:1]:
        _layer(source, first, sizes[first], dtype, options)
    return dtype


def affine(weight: TernaryWeight, dtype: torch.dtype = torch.float16) -> Affine:
    """A ternary weight in MLX's form, each group with the sign of scale that rounds less.

    Not finite where ``dtype`` cannot hold a bias.
    """
    scale = weight.scale.double()
    shift = torch.zeros_like(scale) if weight.shift is None else weight.shift.double()
    up, down = shift - scale, shift + scale
    error_up, error_down = ((bias.to(dtype).double() - bias).abs() for bias in (up, down))
    flip = error_down < error_up
    scales = torch.where(flip, -scale, scale).to(dtype)
    biases = torch.where(flip, down, up).to(dtype)
    columns = torch.arange(weight.codes.shape[1]) // weight.group_size
    codes = torch.where(flip[:, columns], -weight.codes, weight.codes)
    return Affine((codes + 1).to(torch.uint8), scales, biases)


def _layer(
    source: Source, module: str, size: int, dtype: torch.dtype, options: Options
) -> tuple[Affine, float]:
    """A layer in MLX's form, and its largest error in units of the scale."""
    weight = source.layer(module)
    stored = affine(regrouped(weight, size), dtype)
    largest = 2 * stored.scales.abs().float() + stored.biases.abs().float()
    if not bool((largest <= torch.finfo(dtype).max).all()):
        raise RecipeError(
            f"Layer {module} has values that {checkpoint.dtype_name(dtype)} cannot hold.",
            "Choose --encoding float32.",
        )
    error = largest_error(weight, stored.values(size))
    if error and options.exact:
        raise RecipeError(
            f"Layer {module} is not exact in MLX: its bias is rounded, by {error:.2g} of a scale.",
            "Choose --encoding float32, or leave out --exact.",
        )
    if error > BOUND and not options.lossy:
        raise RecipeError(
            f"Layer {module} has shifts much larger than their scales: rounding the bias moves a "
            f"weight by {error:.2g} of a scale, more than {BOUND:g}.",
            "Choose --encoding float32, or pass --lossy.",
        )
    return stored, error


def _size(module: str, columns: int, group_size: int) -> int:
    """The largest group of MLX that divides a layer's row and its groups."""
    whole = common_size(columns, group_size)
    for size in SIZES:
        if whole % size == 0:
            return size
    raise RecipeError(
        f"Layer {module} has rows of {columns} in groups of {group_size}, and MLX knows groups of "
        "32, 64 or 128 only.",
        "Choose --format dense, or --format compressed-tensors for a model without shifts.",
    )


def _layout(
    shapes: dict[str, tuple[int, int]], sizes: dict[str, int], dtype: torch.dtype
) -> Layout:
    """Types and shapes of the tensors of all layers."""
    layout: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {}
    for name, (rows, columns) in shapes.items():
        layout[f"{name}.weight"] = (torch.uint32, (rows, columns // DIGITS_PER_WORD))
        for part in PARTS[1:]:
            layout[f"{name}.{part}"] = (dtype, (rows, columns // sizes[name]))
    return layout


def _settings(sizes: dict[str, int]) -> dict[str, Any]:
    """What ``config.json`` says: the commonest size for all, and the layers that differ."""
    counts = list(sizes.values())
    usual = max(SIZES, key=counts.count)
    one = {"bits": 2, "mode": "affine"}
    differing = {n: {"group_size": s, **one} for n, s in sizes.items() if s != usual}
    return {"group_size": usual, **one, **differing}


def _encoding(sizes: dict[str, int], dtype: torch.dtype) -> str:
    """Such as ``affine 2 bit group 128 float16``."""
    groups = " and ".join(f"group {size}" for size in sorted(set(sizes.values())))
    return f"affine 2 bit {groups} {checkpoint.dtype_name(dtype)}"


def _verify(
    folder: Path,
    others: folders.Others,
    skeleton: Any,
    sizes: dict[str, int],
    progress: Progress,
) -> str:
    """Decode every layer; returns who did it."""
    written = checkpoint.TensorFolder(folder)
    folders.check_names(skeleton, _shapes_in_model(written, skeleton, sizes))
    folders.check_others(written, others)
    reader, decode = _reader()
    for done, (module, size) in enumerate(sizes.items(), 1):
        words, scales, biases = (written[f"{module}.{part}"] for part in PARTS)
        expected = affine(regrouped(others.source.layer(module), size), others.dtype).values(size)
        if not torch.equal(decode(words, scales, biases, size), expected):
            raise VerificationError(f"Layer {module} is not in the file what was written.")
        progress(Event("verify", done=done, total=len(sizes)))
    return reader


def _shapes_in_model(
    written: checkpoint.TensorFolder, skeleton: Any, sizes: dict[str, int]
) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the file as the model that is not quantized would have them."""
    added = {f"{module}.{part}" for module in sizes for part in PARTS}
    shapes = {name: shape for name, shape in written.shapes.items() if name not in added}
    for module in sizes:
        shapes[f"{module}.weight"] = tuple(skeleton.get_submodule(module).weight.shape)
    return shapes


def _reader() -> tuple[str, Callable[[Tensor, Tensor, Tensor, int], Tensor]]:
    """Who decodes, and how: words, scales, biases and group size to float32 ``[out, in]``."""
    try:
        import mlx.core as mx
    except ImportError:
        return "ternq's own decoder (mlx is not installed)", _decoded

    def decode(words: Tensor, scales: Tensor, biases: Tensor, size: int) -> Tensor:
        arrays = [mx.array(part.numpy()) for part in (words, scales.float(), biases.float())]
        weight = mx.dequantize(*arrays, group_size=size, bits=2, mode="affine")
        return torch.from_numpy(np.array(weight))

    return f"mlx {mx.__version__}", decode


def _decoded(words: Tensor, scales: Tensor, biases: Tensor, size: int) -> Tensor:
    return Affine(unpacked(words), scales, biases).values(size)
