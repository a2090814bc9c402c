"""Products with packed ternary weights, and which implementation makes them.

`ternary_matmul` is the one function: C on the CPU (`native`), Triton on CUDA, and a plain product
of the unpacked weight everywhere else. ``TERNQ_KERNEL`` (``auto``, ``native``, ``triton``,
``torch``) chooses; `choice` says what is used, and why.
"""

import importlib.metadata
import importlib.util
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from ternq.errors import RecipeError
from ternq.kernels import native
from ternq.kernels.build import LIBRARY
from ternq.kernels.packed import Act, PackedWeight, reference

__all__ = [
    "Act",
    "PackedWeight",
    "choice",
    "convert",
    "fast",
    "rounds_activations",
    "table_product",
    "ternary_matmul",
    "using",
]

KERNELS = ("auto", "native", "triton", "torch")
FEW = 16  # tokens that an output head is asked for at once, at most, by the C kernels
SMALLEST = 2**14  # weights of a matrix; smaller ones take no longer unpacked
WIDEST = 1.3  # bytes in memory to bytes in the file, at most: short odd groups are padded to 16

_forced: str | None = None
_warned = False


@contextmanager
def using(kernel: str) -> Iterator[None]:
    """Within, ``kernel`` is used in place of what ``TERNQ_KERNEL`` says."""
    global _forced
    before, _forced = _forced, kernel
    try:
        yield
    finally:
        _forced = before


@contextmanager
def one_thread() -> Iterator[None]:
    """Keep torch to one thread, where its others would only wait, or spin on cores of ours."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def wanted() -> str:
    """What was asked for. RecipeError for a name that is none of `KERNELS`."""
    name = _forced or os.environ.get("TERNQ_KERNEL") or "auto"
    if name not in KERNELS:
        raise RecipeError(f"TERNQ_KERNEL is '{name}'.", f"Known: {', '.join(KERNELS)}.")
    return name


def library() -> native.Native | None:
    """The C kernels, where they are to be used; their absence is said once.

    Raises:
        RecipeError: ``TERNQ_KERNEL=native``, and there are none.
    """
    global _warned
    name = wanted()
    if name not in ("auto", "native"):
        return None
    found, why = native.load()
    if found is None and name == "native":
        raise RecipeError(f"TERNQ_KERNEL is 'native', but ternq's CPU kernels are missing: {why}.")
    if found is None and not _warned:
        _warned = True
        mend = "" if LIBRARY.is_file() else " With a C compiler at hand, install ternq again."
        said = (
            f"ternq's CPU kernels are missing ({why}): packed layers run unpacked, and training "
            "rounds by torch; both are slower."
        )
        warnings.warn(said + mend, stacklevel=2)
    return found


def choice(device: torch.device | str = "cpu") -> str:
    """What makes the products on a device, in words for a report."""
    if torch.device(device).type == "cpu":
        found = library()
        if found is not None:
            return f"native ({found.isa}), {torch.get_num_threads()} threads"
        if wanted() in ("torch", "triton"):
            return "torch" if wanted() == "torch" else "torch (TERNQ_KERNEL is 'triton')"
        return f"torch ({native.load()[1]})"
    return triton_here()[1] if torch.device(device).type == "cuda" else "torch"


def rounds_activations(device: torch.device | str) -> bool:
    """Whether a device's kernels can round activations to 8 bits."""
    return torch.device(device).type == "cpu" and library() is not None


def triton_here() -> tuple[bool, str]:
    """Whether CUDA's products are Triton's, and what is used instead, or which Triton.

    Raises:
        RecipeError: ``TERNQ_KERNEL=triton``, and it is not installed.
    """
    name = wanted()
    if name not in ("auto", "triton"):
        return False, "torch"
    if importlib.util.find_spec("triton") is None:
        if name == "triton":
            raise RecipeError("TERNQ_KERNEL is 'triton', but Triton is not installed.")
        return False, "torch (Triton is not installed)"
    return True, f"triton {importlib.metadata.version('triton')}"


def _on_gpu(weight: PackedWeight) -> bool:
    """Whether a weight is, or would become, one of Triton's."""
    if weight.layout != "base3":
        return weight.layout == "triton"
    if weight.codes.device.type != "cuda" or not triton_here()[0]:
        return False
    from ternq.kernels import gpu

    return gpu.fits(weight)


def fast(weight: PackedWeight) -> bool:
    """Whether there is a layout in memory for this weight that is worth its room."""
    if weight.layout != "base3" or weight.codes.device.type != "cpu" or weight.scale is None:
        return False
    if weight.rows * weight.columns < SMALLEST or (found := library()) is None:
        return False
    stored = [t.nbytes for t in (weight.codes, weight.scale, weight.shift) if t is not None]
    size = found.size(weight.rows, weight.columns, weight.group_size, weight.shifted)
    return size <= WIDEST * sum(stored)


def convert(weight: PackedWeight) -> PackedWeight:
    """The weight as the kernel of its device reads it; as it is where there is none."""
    if weight.layout == "base3" and _on_gpu(weight):
        from ternq.kernels import gpu

        return gpu.convert(weight)
    found = library() if fast(weight) else None
    return weight if found is None else found.convert(weight)


def restore(weight: PackedWeight) -> PackedWeight:
    """The file's form again, to the bit."""
    if weight.layout == "triton":
        from ternq.kernels import gpu

        return gpu.restore(weight)
    return weight if weight.layout == "base3" else _native().restore(weight)


def dequantized(weight: PackedWeight) -> Tensor:
    """The numbers of a weight in any form, float32 ``[rows, columns]``."""
    if weight.layout != "words":
        return restore(weight).dequantized()
    sizes = weight.rows, weight.columns, weight.group_size, weight.shifted
    numbers: Tensor = torch.ops.ternq.dense(weight.codes, *sizes)
    return numbers


def _native() -> native.Native:
    found, why = native.load()
    if found is None:  # the weight was converted by it
        raise RuntimeError(why)
    return found


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _is_native() -> bool:
    """Whether the CPU's products are those of the C kernels; compilers take it for settled."""
    return library() is not None


def _product(x: Tensor, weight: PackedWeight, bias: Tensor | None, act: Act) -> Tensor:
    if weight.layout == "triton":
        from ternq.kernels import gpu

        return gpu.matmul(x, weight, bias)
    return _native().matmul(x, weight, bias, act)


def ternary_matmul(
    x: Tensor, packed: PackedWeight, act: Act = "exact", bias: Tensor | None = None
) -> Tensor:
    """``x @ packed.T + bias`` in ``x``'s dtype (float32, bfloat16, float16): ``[..., rows]``.

    ``act`` is what activations are rounded to inside the kernel: ``exact`` 16 bits per (at most)
    128 columns, an error below that of float16; ``int8`` 8 bits. Infinities and NaN propagate as in
    a dense product. The plain product and Triton's round nothing. There is no gradient.

    Raises:
        ValueError: shapes, types or devices that do not fit.
    """
    if act not in native.ACTS:
        raise ValueError(f"activations are 'exact' or 'int8', not '{act}'")
    if packed.layout != "base3" and x.dtype in native.DTYPES and _forced != "torch":
        if type(x) is Tensor and not torch.compiler.is_compiling():
            return _product(x, packed, bias, act)
        sizes = packed.rows, packed.columns, packed.group_size, packed.shifted
        product: Tensor = torch.ops.ternq.matmul(x, packed.codes, bias, *sizes, act)
        return product
    return reference(x, dequantized(packed), bias)


def table_product(x: Tensor, table: Tensor, scale: Tensor | None = None) -> Tensor | None:
    """``x @ table.T`` of an output head and a few tokens on the CPU; None where torch should do it.

    ``table`` ``[rows, columns]`` is float32, bfloat16, float16, or int8 with a float16 ``scale``
    ``[rows]``. It is read once, by all threads, where torch's product of a single token leaves
    float32 to one of them and opens int8 first. There is no gradient.
    """
    if x.device.type != "cpu" or table.device.type != "cpu" or not _is_native():
        return None
    if not x.ndim or x.shape[-1] != table.shape[1]:  # torch says what is wrong
        return None
    if not 0 < x.numel() <= FEW * x.shape[-1] or x.dtype not in native.DTYPES:
        return None
    if torch.is_autocast_enabled("cpu"):
        return None
    if torch.is_grad_enabled() and (x.requires_grad or table.requires_grad):
        return None
    product: Tensor = torch.ops.ternq.table(x, table, scale)
    return product


# What a compiler sees. A plain registration costs half of what `custom_op` does a call.
torch.library.define(
    "ternq::matmul",
    "(Tensor x, Tensor words, Tensor? bias, int rows, int columns, int group_size, bool shifted, "
    "str act) -> Tensor",
)


@torch.library.impl("ternq::matmul", ("CPU", "CUDA"))
def _matmul(
    x: Tensor,
    words: Tensor,
    bias: Tensor | None,
    rows: int,
    columns: int,
    group_size: int,
    shifted: bool,
    act: Act,
) -> Tensor:
    return _product(x, _converted(words, rows, columns, group_size, shifted), bias, act)


def _converted(
    words: Tensor, rows: int, columns: int, group_size: int, shifted: bool
) -> PackedWeight:
    layout = "words" if words.device.type == "cpu" else "triton"
    return PackedWeight(words, None, None, rows, columns, group_size, shifted, layout)


@torch.library.register_fake("ternq::matmul")  # type: ignore[untyped-decorator]
def _(x: Tensor, words: Tensor, bias: Tensor | None, rows: int, *_: object) -> Tensor:
    return x.new_empty((*x.shape[:-1], rows))


torch.library.define(
    "ternq::dense",
    "(Tensor words, int rows, int columns, int group_size, bool shifted) -> Tensor",
)


@torch.library.impl("ternq::dense", "CPU")
def _dense(words: Tensor, rows: int, columns: int, group_size: int, shifted: bool) -> Tensor:
    return _native().dense(_converted(words, rows, columns, group_size, shifted))


@torch.library.register_fake("ternq::dense")  # type: ignore[untyped-decorator]
def _(words: Tensor, rows: int, columns: int, *_: object) -> Tensor:
    return words.new_empty((rows, columns), dtype=torch.float32)


torch.library.define("ternq::table", "(Tensor x, Tensor table, Tensor? scale) -> Tensor")


@torch.library.impl("ternq::table", "CPU")
def _table(x: Tensor, table: Tensor, scale: Tensor | None) -> Tensor:
    scale = None if scale is None else scale.contiguous()
    return _native().table_product(x, table.contiguous(), scale)


@torch.library.register_fake("ternq::table")  # type: ignore[untyped-decorator]
def _(x: Tensor, table: Tensor, _: object) -> Tensor:
    return x.new_empty((*x.shape[:-1], len(table)))
