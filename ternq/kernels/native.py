"""The C kernels (``csrc/ternq.h``) through ctypes: layout, numbers, product.

A call costs a few microseconds where a torch operator written in Python costs twenty, and a small
model makes two hundred a token. The threads are those of torch's own OpenMP, whose entry point is
handed over, so that no second pool competes for the cores.
"""

import ctypes
import functools
import os
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from ternq.kernels.build import LIBRARY
from ternq.kernels.packed import Act, PackedWeight

ABI = 2
DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
TABLES = DTYPES | {torch.int8: 3}
ACTS: dict[str, int] = {"exact": 0, "int8": 1}
_DENSE_TOKENS = 64  # from here on a dense product is worth opening the weight, where it is faster
_DENSE_WEIGHTS = 2**24  # that are opened in one go

_pointer, _int64, _int = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int


class Matrix(ctypes.Structure):
    """``ternq_matrix``."""

    _fields_ = [
        ("rows", _int64),
        ("columns", _int64),
        ("group", _int64),
        ("has_shift", _int64),
        ("data", _pointer),
    ]


class Latent(ctypes.Structure):
    """``ternq_latent``."""

    _fields_ = [
        *((name, _int64) for name in ("rows", "columns", "group")),
        *((name, _pointer) for name in ("numbers", "values", "codes", "scale", "shift")),
        *((name, _pointer) for name in ("to_scale", "to_shift")),
        *((name, _int) for name in ("dtype", "value_dtype", "ttq")),
    ]


_matrix = ctypes.POINTER(Matrix)
_latent = ctypes.POINTER(Latent)
_SIGNATURES = {
    "ternq_abi": (_int, ()),
    "ternq_isa": (ctypes.c_char_p, ()),
    "ternq_set_isa": (_int, (ctypes.c_char_p,)),
    "ternq_set_parallel": (None, (_pointer,)),
    "ternq_layout_bytes": (_int64, (_int64, _int64, _int64, _int64)),
    "ternq_layout": (
        _int,
        (_pointer, _pointer, _pointer, _int64, _int64, _int64, _pointer, _int),
    ),
    "ternq_restore": (_int, (_matrix, _pointer, _pointer, _pointer, _int)),
    "ternq_dense": (_int, (_matrix, _int64, _int64, _pointer, _int, _int)),
    "ternq_linear": (
        _int,
        (_matrix, _pointer, _int64, _pointer, _pointer, _int, _int, _int),
    ),
    "ternq_table_product": (
        _int,
        (_pointer, _pointer, _int64, _int64, _int64, _pointer, _int64, _pointer, _int),
    ),
    "ternq_ternarize": (_int, (_latent, _int)),
    "ternq_descend": (_int, (_latent, _int)),
    "ternq_decoder_new": (_pointer, (_pointer, _int64, _int64, _int)),
    "ternq_decoder_step": (_int, (_pointer, _pointer, _int64, _int64, _int, _pointer)),
    "ternq_decoder_free": (None, (_pointer,)),
}


class Native:
    """A loaded library.

    Raises:
        OSError: it cannot be loaded, or is of another version of ternq.
    """

    def __init__(self, path: Path = LIBRARY) -> None:
        self.library = ctypes.CDLL(str(path))
        try:
            for name, (result, arguments) in _SIGNATURES.items():
                function = getattr(self.library, name)
                function.restype, function.argtypes = result, arguments
        except AttributeError as error:
            raise OSError(f"{path} is of another version of ternq") from error
        if self.library.ternq_abi() != ABI:
            raise OSError(f"{path} is of another version of ternq")
        self._linear = self.library.ternq_linear
        parallel = getattr(ctypes.CDLL(None), "GOMP_parallel", None)
        if parallel is not None:
            self.library.ternq_set_parallel(ctypes.cast(parallel, _pointer))

    @property
    def isa(self) -> str:
        """The instruction set in use: ``avx512``, ``avx2``, ``neon`` or ``portable``."""
        name: bytes = self.library.ternq_isa()
        return name.decode()

    def use_isa(self, name: str | None) -> bool:
        """Use an instruction set, None for the best; False where this machine does not have it."""
        given = None if name is None else name.encode()
        done: int = self.library.ternq_set_isa(given)
        return done == 0

    def size(self, rows: int, columns: int, group_size: int, shifted: bool) -> int:
        """Bytes in memory. ValueError for sizes that are out of bounds."""
        size: int = self.library.ternq_layout_bytes(rows, columns, group_size, shifted)
        if size < 0:
            raise ValueError(f"no matrix has {rows} rows of {columns} columns, groups {group_size}")
        return size

    def convert(self, weight: PackedWeight) -> PackedWeight:
        """From the file's form to that in memory."""
        assert weight.scale is not None
        size = self.size(weight.rows, weight.columns, weight.group_size, weight.shifted)
        words = torch.empty(size, dtype=torch.uint8)
        parts = [t.contiguous() for t in (weight.codes, weight.scale)]
        shift = None if weight.shift is None else weight.shift.contiguous()
        status = self.library.ternq_layout(
            *(t.data_ptr() for t in parts),
            None if shift is None else shift.data_ptr(),
            weight.rows,
            weight.columns,
            weight.group_size,
            words.data_ptr(),
            torch.get_num_threads(),
        )
        _check(status)
        sizes = weight.rows, weight.columns, weight.group_size, weight.shifted
        return PackedWeight(words, None, None, *sizes, layout="words")

    def restore(self, weight: PackedWeight) -> PackedWeight:
        """The file's form again, to the bit."""
        groups = -(-weight.columns // weight.group_size)
        codes = torch.empty(weight.rows, -(-weight.columns // 5), dtype=torch.uint8)
        scale = torch.empty(weight.rows, groups, dtype=torch.float16)
        shift = torch.empty_like(scale) if weight.shifted else None
        pointers = [None if t is None else t.data_ptr() for t in (codes, scale, shift)]
        matrix = matrix_of(weight)
        status = self.library.ternq_restore(matrix, *pointers, torch.get_num_threads())
        _check(status)
        return PackedWeight.of(codes, scale, shift, weight.columns, weight.group_size)

    def dense(
        self,
        weight: PackedWeight,
        dtype: torch.dtype = torch.float32,
        first: int = 0,
        last: int | None = None,
    ) -> Tensor:
        """Rows ``first`` to ``last - 1`` as numbers."""
        last = weight.rows if last is None else last
        out = torch.empty(last - first, weight.columns, dtype=dtype)
        threads = torch.get_num_threads()
        matrix = matrix_of(weight)
        _check(
            self.library.ternq_dense(matrix, first, last, out.data_ptr(), DTYPES[dtype], threads)
        )
        return out

    def matmul(
        self, x: Tensor, weight: PackedWeight, bias: Tensor | None = None, act: Act = "exact"
    ) -> Tensor:
        """``x @ weight.T + bias``; ``x`` ``[..., columns]`` of a type in `DTYPES`, on the CPU."""
        columns, dtype, shape = weight.columns, x.dtype, x.shape
        if not shape or shape[-1] != columns or not x.is_cpu:
            raise ValueError(f"x is {[*shape]} on {x.device}; the weight has {columns} columns")
        if bias is not None and (bias.shape != (weight.rows,) or not bias.is_cpu):
            raise ValueError(f"a bias {[*bias.shape]} on {bias.device} for {weight.rows} rows")
        tokens = x.numel() // columns
        if act == "exact" and tokens >= _DENSE_TOKENS and _dense_is_faster(dtype, self.isa):
            with torch.autocast("cpu", enabled=False):
                return self._opened(x, weight, bias)
        x = (x.resolve_neg() if x.is_neg() else x).contiguous()
        at = x.data_ptr()
        if at % 4:  # a view of bytes that begins anywhere
            x = x.clone(memory_format=torch.contiguous_format)
            at = x.data_ptr()
        if bias is not None:
            bias = bias.to(dtype).contiguous()
        y = x.new_empty(*shape[:-1], weight.rows)  # a tuple would take a microsecond longer
        status = self._linear(
            matrix_of(weight),
            at,
            tokens,
            y.data_ptr(),
            None if bias is None else bias.data_ptr(),
            DTYPES[dtype],
            ACTS[act],
            torch.get_num_threads(),
        )
        if status:
            _check(status)
        return y

    def table_product(self, x: Tensor, table: Tensor, scale: Tensor | None = None) -> Tensor:
        """``x @ table.T`` in ``x``'s dtype, for the few tokens that an output head is asked for.

        ``table`` ``[rows, columns]``, contiguous, of a type in `TABLES`, is read as it is stored;
        int8 rows have a float16 ``scale`` each. Activations and sums are float32.
        """
        rows, columns = table.shape
        if not x.ndim or x.shape[-1] != columns:
            raise ValueError(f"x is {[*x.shape]}; the table has {columns} columns")
        given = x.float().contiguous()
        y = given.new_empty((*x.shape[:-1], rows))
        status = self.library.ternq_table_product(
            table.data_ptr(),
            None if scale is None else scale.data_ptr(),
            TABLES[table.dtype],
            rows,
            columns,
            given.data_ptr(),
            given.numel() // columns,
            y.data_ptr(),
            torch.get_num_threads(),
        )
        _check(status)
        return y.to(x.dtype)

    def quantize(self, weight: Tensor, group_size: int) -> Tensor:
        """See `ternq.rounding.quantize`."""
        codes = torch.empty(weight.shape, dtype=torch.int8)
        given = {"numbers": _plain(weight), "codes": codes}
        self._latent(self.library.ternq_ternarize, given, group_size)
        return codes

    def rounded(
        self,
        weight: Tensor,
        scale: Tensor,
        shift: Tensor | None,
        group_size: int,
        dtype: torch.dtype,
    ) -> tuple[Tensor, Tensor]:
        """See `ternq.rounding.rounded`."""
        codes = torch.empty(weight.shape, dtype=torch.int8)
        values = torch.empty(weight.shape, dtype=dtype)
        given: dict[str, Tensor | None] = {"numbers": _plain(weight), "values": values}
        given |= {"codes": codes, "scale": _per_group(scale), "shift": _per_group(shift)}
        self._latent(self.library.ternq_ternarize, given, group_size)
        return values, codes

    def descend(
        self,
        gradient: Tensor,
        codes: Tensor,
        scale: Tensor,
        group_size: int,
        ttq: bool,
        dtype: torch.dtype,
        wanted: tuple[bool, bool, bool],
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """See `ternq.rounding.straight_through`."""
        gradient = _plain(gradient)
        as_it_is = not ttq and gradient.dtype == dtype
        new = wanted[0] and not as_it_is
        to_weight = torch.empty(gradient.shape, dtype=dtype) if new else None
        sums = [torch.empty(scale.shape) if w else None for w in wanted[1:]]
        given = {"numbers": gradient, "values": to_weight, "codes": codes.contiguous()}
        given |= {"scale": _per_group(scale), "to_scale": sums[0], "to_shift": sums[1]}
        if new or any(wanted[1:]):
            self._latent(self.library.ternq_descend, given, group_size, ttq)
        own = [None if s is None else s.to(scale.dtype) for s in sums]
        return gradient if wanted[0] and as_it_is else to_weight, own[0], own[1]

    def _latent(
        self,
        function: Callable[..., int],
        given: Mapping[str, Tensor | None],
        group_size: int,
        ttq: bool = False,
    ) -> None:
        """Call ``function`` with pointers to the tensors ``given``, which live until it returns."""
        numbers, values = given["numbers"], given.get("values")
        assert numbers is not None
        rows, columns = numbers.shape
        pointers = {name: t.data_ptr() for name, t in given.items() if t is not None}
        of = Latent(
            rows=rows,
            columns=columns,
            group=min(group_size, columns),
            dtype=DTYPES[numbers.dtype],
            value_dtype=0 if values is None else DTYPES[values.dtype],
            ttq=ttq,
            **pointers,
        )
        if numbers.numel():
            _check(function(of, torch.get_num_threads()))

    def _opened(self, x: Tensor, weight: PackedWeight, bias: Tensor | None) -> Tensor:
        """The same by torch's dense product, some rows of the weight after another."""
        step = max(16, _DENSE_WEIGHTS // weight.columns // 16 * 16)
        if step >= weight.rows:
            bias = None if bias is None else bias.to(x.dtype)
            return torch.nn.functional.linear(x, self.dense(weight, x.dtype), bias)
        y = x.new_empty((*x.shape[:-1], weight.rows))
        for first in range(0, weight.rows, step):
            last = min(first + step, weight.rows)
            y[..., first:last] = x @ self.dense(weight, x.dtype, first, last).T
        return y if bias is None else y.add_(bias)


def _plain(tensor: Tensor) -> Tensor:
    """The same numbers one behind the other, at an address that the C code takes."""
    tensor = tensor.detach().contiguous()
    return tensor.clone() if tensor.data_ptr() % 4 else tensor


def _per_group(values: Tensor | None) -> Tensor | None:
    return None if values is None else _plain(values.float())


def matrix_of(weight: PackedWeight) -> Matrix:
    """A converted weight as the C code takes it; made once, it lives as long as the weight."""
    made: Matrix | None = vars(weight).get("_matrix")
    if made is None:
        sizes = weight.rows, weight.columns, weight.group_size, weight.shifted
        made = vars(weight)["_matrix"] = Matrix(*sizes, weight.codes.data_ptr())
    return made


@functools.cache
def _dense_is_faster(dtype: torch.dtype, isa: str) -> bool:
    """Whether torch's dense product of many tokens is faster on this machine than ours."""
    if dtype == torch.bfloat16 and isa != "portable":
        return torch.cpu._is_amx_tile_supported()
    if isa == "portable":
        return dtype == torch.float32
    return isa == "avx2" and torch.backends.cpu.get_cpu_capability() == "AVX512"


def _check(status: int) -> None:
    if status == -2:
        raise MemoryError("no memory for the product of a packed weight")
    if status:
        raise ValueError("sizes that no packed weight has")


@functools.cache
def load() -> tuple[Native | None, str]:
    """The library that was compiled when ternq was installed; or None, and why there is none.

    ``TERNQ_ISA`` names an instruction set, for measurements and tests.
    """
    if not LIBRARY.is_file():
        return None, "they were not compiled when ternq was installed"
    try:
        native = Native()
    except OSError as error:
        return None, str(error)
    isa = os.environ.get("TERNQ_ISA")
    if isa and not native.use_isa(isa):
        return None, f"this machine has no '{isa}' (TERNQ_ISA)"
    return native, ""
