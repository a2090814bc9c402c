"""compressed-tensors, two bits a weight: for plain transformers and for vLLM.

The layout is ``pack-quantized`` with symmetric weights (compressed-tensors 0.20.0,
compressors/pack_quantized, read): ``weight_packed`` int32 ``[out, ceil(in / 16)]`` holds code + 2
in two bits, the first code in the lowest; ``weight_scale`` ``[out, in / group]``; ``weight_shape``
int64 ``[2]``. Zero points there are integers, so a shift has no place.

Scales are float16 as they are here, and so is the model: transformers converts a scale to the
model's type when it loads, and bfloat16 would round it.
"""

import contextlib
import copy
import io
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ternq import checkpoint
from ternq.errors import InputError, RecipeError, VerificationError
from ternq.files import read_json
from ternq.formats import Exported, Options, folders
from ternq.formats.bits import DIGITS_PER_WORD, packed
from ternq.formats.groups import (
    common_size,
    largest_error,
    regrouped,
    regrouping,
    relative_error,
)
from ternq.progress import Event, Progress
from ternq.proof import LARGEST_LOADED, ROUNDED_TOLERANCE
from ternq.source import Source
from ternq.ternary import TernaryWeight
from ternq.writer import Layout

ENCODINGS = ("float16", "bfloat16", "float32")
PARTS = ("weight_packed", "weight_scale", "weight_shape")
_PROBE = (2, 16)  # rows and tokens of the text that logits are compared on
# what the library and transformers raise for a folder that they cannot read
_REFUSALS = (OSError, ValueError, KeyError, RuntimeError, TypeError, AttributeError)

Shapes = Mapping[str, tuple[int, int]]  # rows and columns of every ternary layer
Sizes = Mapping[str, int]  # and the columns in a group


@dataclass(frozen=True)
class Layer:
    """A layer as the file holds it, without shift, and what that cost."""

    weight: TernaryWeight
    rounded: float
    lost: float

    def tensors(self) -> dict[str, Tensor]:
        """By their names in the file."""
        words = packed((self.weight.codes + 2).to(torch.uint8))
        shape = torch.tensor(self.weight.codes.shape)
        return dict(zip(PARTS, (words, self.weight.scale, shape), strict=True))


def export(source: Source, folder: Path, options: Options, progress: Progress) -> Exported:
    """Write the model in two-bit compressed-tensors, and have that library decompress it.

    Raises:
        InputError: the package compressed-tensors is not installed.
        RecipeError: a shift without ``lossy``, a value beyond the type, rounding that ``exact``
            forbids, or a layer that is not ``nn.Linear``.
        VerificationError: the library reads something else than was written.
    """
    version, dtype = _installed(), check(source, options)
    skeleton = folders.begin(source, folder, dtype)
    others = folders.others_of(source, skeleton, dtype, options)
    shapes = {n: tuple(skeleton.get_submodule(n).weight.shape) for n in source.modules}
    sizes = {n: common_size(shape[1], source.group_size) for n, shape in shapes.items()}
    layout = _layout(shapes, sizes, dtype)
    config = _config(skeleton, shapes, sizes)
    folders.write_config(source, folder, dtype, {"quantization_config": config})
    rounded: dict[str, float] = {}
    lost: dict[str, float] = {}

    def stored(module: str) -> Layer:
        return _layer(source, module, sizes[module], dtype, options)

    def tensors(module: str) -> dict[str, Tensor]:
        layer = stored(module)
        rounded.update({module: layer.rounded} if layer.rounded else {})
        lost.update({module: layer.lost} if layer.lost else {})
        return layer.tensors()

    folders.write(folder, others, layout, tensors, progress)
    how = _verify(folder, others, skeleton, stored, progress)
    return Exported(
        encoding=_encoding(shapes, sizes, dtype),
        bits=folders.bits(layout),
        checked=len(source.modules),
        reader=f"compressed-tensors {version}{how}",
        rounded=rounded,
        lost=lost,
        notes=others.notes() + regrouping(source, sizes),
    )


def check(source: Source, options: Options) -> torch.dtype:
    """The type of the scales; refuses what `export` would, as far as the first layer tells."""
    _installed()
    folders.refuse_transposed(source, "and compressed-tensors compresses nn.Linear only")
    dtype = folders.chosen_dtype(options, "float16", ENCODINGS, "compressed-tensors")
    for first in source.modules[:1]:
        size = common_size(source.size(first)[0], source.group_size)
        _layer(source, first, size, dtype, options)
    return dtype


def _layout(shapes: Shapes, sizes: Sizes, dtype: torch.dtype) -> Layout:
    """Types and shapes of the tensors of all layers."""
    layout: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {}
    for name, (rows, columns) in shapes.items():
        layout[f"{name}.weight_packed"] = (torch.int32, (rows, -(-columns // DIGITS_PER_WORD)))
        layout[f"{name}.weight_scale"] = (dtype, (rows, columns // sizes[name]))
        layout[f"{name}.weight_shape"] = (torch.int64, (2,))
    return layout


def _layer(source: Source, module: str, size: int, dtype: torch.dtype, options: Options) -> Layer:
    """A layer without shift, in groups of ``size``, its scale in ``dtype``."""
    original = source.layer(module)
    plain = _without_shift(module, original, options)
    stored = replace(plain, scale=plain.scale.to(dtype))
    error = largest_error(plain, stored.dequantized())
    if error and options.exact:
        raise RecipeError(
            f"Layer {module} is not exact in {checkpoint.dtype_name(dtype)}: rounding moves a "
            f"weight by {error:.2g} of its scale.",
            "Leave out --encoding, or --exact.",
        )
    lost = 0.0 if _equal(original, plain) else relative_error(original, stored.dequantized())
    return Layer(regrouped(stored, size), error, lost)


def _without_shift(module: str, weight: TernaryWeight, options: Options) -> TernaryWeight:
    """The weight without shifts: those of groups of one value become codes and scale.

    Raises:
        RecipeError: other groups have shifts, and they may not be dropped.
    """
    if weight.shift is None:
        return weight
    single = weight.scale == 0
    if bool(weight.shift[~single].any()) and (options.exact or not options.lossy):
        raise RecipeError(
            f"Layer {module} has shifts, and compressed-tensors holds none: its zero points are "
            "integers.",
            "Choose --format mlx, --format gguf (Q4_1) or --format dense, or train with "
            "--no-shift. --lossy drops the shifts.",
        )
    sign = torch.where(single, weight.shift.sign(), torch.zeros_like(weight.shift)).to(torch.int8)
    columns = torch.arange(weight.codes.shape[1]) // weight.group_size
    scale = torch.where(single, weight.shift.abs(), weight.scale)
    return TernaryWeight(weight.codes + sign[:, columns], scale, None, weight.group_size)


def _equal(a: TernaryWeight, b: TernaryWeight) -> bool:
    return torch.equal(a.dequantized(), b.dequantized())


def _config(skeleton: Any, shapes: Shapes, sizes: Sizes) -> dict[str, Any]:
    """The ``quantization_config``: a group of settings for every group size."""
    settings: dict[int | None, list[str]] = {}
    for name, size in sizes.items():
        settings.setdefault(_strategy_size(shapes[name], size), []).append(name)
    groups = {
        f"group_{number}": {
            "targets": ["Linear"] if len(settings) == 1 else names,
            "weights": {
                "num_bits": 2,
                "type": "int",
                "symmetric": True,
                "strategy": "group" if size else "channel",
                "group_size": size,
                "dynamic": False,
            },
            "input_activations": None,
            "output_activations": None,
        }
        for number, (size, names) in enumerate(settings.items())
    }
    linears = [name for name, module in skeleton.named_modules() if isinstance(module, nn.Linear)]
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": groups,
        "ignore": [name for name in linears if name not in sizes],
    }


def _strategy_size(shape: tuple[int, int], size: int) -> int | None:
    """The group size to write; None if a row is one group ("channel")."""
    return None if size == shape[1] else size


def _encoding(shapes: Shapes, sizes: Sizes, dtype: torch.dtype) -> str:
    """Such as ``W2 group 128 float16``."""
    found = {_strategy_size(shapes[name], size) for name, size in sizes.items()}
    kinds = [f"group {size}" for size in sorted(size for size in found if size)]
    kinds += ["channel"] if None in found else []
    return f"W2 {' and '.join(kinds)} {checkpoint.dtype_name(dtype)}"


def _installed() -> str:
    """The version of the library; `InputError` if there is none."""
    try:
        import compressed_tensors
    except ImportError as error:
        raise InputError(
            "The format compressed-tensors needs the package compressed-tensors.",
            "pip install 'ternq[compressed-tensors]'",
        ) from error
    version: str = compressed_tensors.__version__
    return version


def _verify(
    folder: Path,
    others: folders.Others,
    skeleton: Any,
    stored: Callable[[str], Layer],
    progress: Progress,
) -> str:
    """Read the folder by the library's own functions; says how, beyond the library's name.

    What transformers does is done here to the empty model: the library reads the configuration,
    puts its parameters in, and so says which tensors of which shapes it expects.
    """
    small = others.source.parameters <= LARGEST_LOADED
    kind, config = type(skeleton), copy.deepcopy(skeleton.config)
    written = checkpoint.TensorFolder(folder)
    with _asked("compressed-tensors"):
        schemes = _schemes(folder, skeleton)
    if set(schemes) != set(others.source.modules):
        raise VerificationError("compressed-tensors takes other layers for compressed.")
    folders.check_names(skeleton, written.shapes)
    folders.check_others(written, others)
    for done, (module, scheme) in enumerate(schemes.items(), 1):
        with _asked("compressed-tensors"):
            read = _decompressed(written, module, scheme)
        if not folders.same(read, stored(module).weight.dequantized().to(others.dtype)):
            raise VerificationError(f"Layer {module} is not in the file what was written.")
        progress(Event("verify", done=done, total=len(schemes)))
    if not small:
        return ", layer by layer"
    _compare_model(folder, kind, config, others, stored)
    return ", through transformers"


def _schemes(folder: Path, skeleton: Any) -> dict[str, Any]:
    """Have the library prepare the empty model; returns the scheme of every compressed layer."""
    from compressed_tensors.compressors import ModelCompressor
    from compressed_tensors.quantization import QuantizationConfig, apply_quantization_config

    content = read_json(folder / "config.json")["quantization_config"]
    config = QuantizationConfig.model_validate(content)
    apply_quantization_config(skeleton, config, show_progress=False)
    ModelCompressor(quantization_config=config).compress_model(skeleton)
    found = ((n, getattr(m, "quantization_scheme", None)) for n, m in skeleton.named_modules())
    return {name: scheme for name, scheme in found if scheme is not None}


def _decompressed(written: checkpoint.TensorFolder, module: str, scheme: Any) -> Tensor:
    """The weight ``[out, in]`` that the library makes of a layer's tensors."""
    from compressed_tensors.compressors import PackedQuantizationCompressor

    state = {part: written[f"{module}.{part}"] for part in PARTS}
    weight: Tensor = PackedQuantizationCompressor.decompress(state, scheme)["weight"]
    return weight


def _compare_model(
    folder: Path,
    kind: Any,
    config: Any,
    others: folders.Others,
    stored: Callable[[str], Layer],
) -> None:
    """Load through transformers in float32; compare logits and weights with a dense model's."""
    dense = kind(config).eval()
    state = {name: others.tensor(name) for name in others.layout}
    for module in others.source.modules:
        state[f"{module}.weight"] = stored(module).weight.dequantized()
    dense.load_state_dict(state, strict=False)
    with _asked("transformers"):
        again = kind.from_pretrained(folder, dtype=torch.float32, local_files_only=True).eval()
        vocabulary = dense.get_input_embeddings().num_embeddings
        ids = torch.arange(_PROBE[0] * _PROBE[1]).view(_PROBE) % vocabulary
        with torch.no_grad():
            expected, found = dense(input_ids=ids).logits, again(input_ids=ids).logits
    difference = float((found - expected).abs().max())
    if not difference <= ROUNDED_TOLERANCE * float(expected.abs().max()):
        raise VerificationError(
            f"Logits through transformers differ by {difference:.3g} from those of a dense model "
            "with the same weights."
        )
    for module in others.source.modules:
        weight = again.get_submodule(module).weight
        if not torch.equal(weight, dense.get_submodule(module).weight):
            raise VerificationError(f"Layer {module} is not in transformers what was written.")


@contextlib.contextmanager
def _asked(reader: str) -> Iterator[None]:
    """Keep the reader's progress bars off the screen; its refusal is a `VerificationError`."""
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            yield
    except _REFUSALS as error:
        raise VerificationError(f"{reader} cannot read what was written: {error}") from error
