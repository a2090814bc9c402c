"""The Triton kernels against float64, under Triton's interpreter: `test_triton` runs this file.

The interpreter cuts bfloat16 off where a GPU rounds it, so that type's bounds are wide here.
"""

import pytest
import torch
from torch import Tensor

from ternq import kernels
from ternq.kernels import gpu
from ternq.kernels.packed import PackedWeight
from ternq.modeling_ternq import PackedLinear
from ternq.packing import pack_base3
from ternq.ternary import n_groups

DTYPES = {torch.float32: 5e-6, torch.float16: 2e-3, torch.bfloat16: 2e-2}
SHAPES = [  # rows, columns, group size: ragged in each way; groups of some fields or some blocks
    (7, 576, 128),
    (33, 130, 64),
    (20, 100, 128),
    (17, 200, 200),
    (5, 600, 256),
    (18, 80, 32),
    (3, 40, 16),
    (1, 1, 128),
]


FEW_PROGRAMS = gpu.Tile(64, 2, 1, 1)  # each costs the interpreter the same, whatever its size


def weight(rows: int, columns: int, group_size: int, shift: bool = True) -> PackedWeight:
    """Random, as stored."""
    generator = torch.Generator().manual_seed(rows * columns)
    codes = torch.randint(-1, 2, (rows, columns), generator=generator).to(torch.int8)
    groups = rows, n_groups(columns, group_size)
    scale = torch.rand(groups, generator=generator).half()
    shifts = torch.randn(groups, generator=generator).half() if shift else None
    return PackedWeight.of(pack_base3(codes), scale, shifts, columns, group_size)


def inputs(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(dtype)


def error(y: Tensor, exact: Tensor) -> float:
    """Relative, of the norm."""
    return float((y.double() - exact).norm() / exact.norm())


@pytest.mark.parametrize("shape", [*SHAPES, (4, 0, 128), (0, 300, 128)])
@pytest.mark.parametrize("shift", [True, False])
def test_conversion_is_undone_to_the_bit(shape: tuple[int, int, int], shift: bool) -> None:
    stored = weight(*shape, shift=shift)
    packed = gpu.convert(stored)
    groups = shape[0] * n_groups(shape[1], shape[2]) * (2 if shift else 1)
    assert packed.codes.numel() - shape[0] * -(-shape[1] // 128) * 32 - 2 * groups in range(31)
    again = gpu.restore(packed)
    assert again.layout == "base3"
    for name in ("codes", "scale", "shift"):
        a, b = getattr(stored, name), getattr(again, name)
        assert a is b if a is None else torch.equal(a, b)


def test_the_layout_is_the_documented_one() -> None:
    stored = weight(3, 300, 128)
    codes = (stored.dequantized() - stored.shift.repeat_interleave(128, 1)[:, :300]).sign()
    words = gpu.convert(stored).codes.view(torch.int16)[: 3 * 48].view(3, 48)
    for row, column in ((0, 0), (1, 17), (2, 127), (0, 128), (2, 299)):
        block, inside = divmod(column, 128)
        field, word = divmod(inside, 16)
        digit = int(words[row, block * 16 + word]) >> 2 * field & 3
        assert digit - 1 == codes[row, column]


@pytest.mark.parametrize(
    ("shape", "dtype"),
    [
        *((shape, torch.float16) for shape in SHAPES),
        *((shape, dtype) for shape in SHAPES[:2] for dtype in (torch.float32, torch.bfloat16)),
    ],
)
def test_products_equal_float64(shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    rows, columns, _ = shape
    for shift in (True, False):
        stored = weight(*shape, shift=shift)
        packed, dense = gpu.convert(stored), stored.dequantized().double()
        x, bias = inputs(5, columns, dtype=dtype), inputs(rows, dtype=dtype)
        many = gpu.gemm(x, packed, bias)
        one = gpu.gemv(x[:1], packed, bias, tile=FEW_PROGRAMS)
        for y in (many, one):
            exact = x[: len(y)].double() @ dense.T + bias.double()
            assert y.dtype == dtype and y.shape == exact.shape
            assert error(y, exact) < DTYPES[dtype]


@pytest.mark.parametrize("tile", [(4, 4, 1, 1), (8, 1, 2, 3), (64, 8, 4, 2)])
def test_the_tile_does_not_matter(tile: tuple[int, int, int, int]) -> None:
    stored, x = weight(12, 400, 128), inputs(1, 400)
    exact = x.double() @ stored.dequantized().double().T
    assert error(gpu.gemv(x, gpu.convert(stored), tile=gpu.Tile(*tile)), exact) < 5e-6


def test_many_tokens_take_several_tiles() -> None:
    stored, x = weight(150, 150, 128), inputs(70, 150, dtype=torch.float16)
    exact = x.double() @ stored.dequantized().double().T
    for tile in (None, gpu.Tile(64, 32, 4, 3), gpu.Tile(128, 128, 8, 3)):
        assert error(gpu.gemm(x, gpu.convert(stored), tile=tile), exact) < 2e-3


@pytest.mark.parametrize("shape", [(0, 200), (2, 0, 200)])
def test_an_empty_batch_is_empty(shape: tuple[int, ...]) -> None:
    y = gpu.matmul(torch.zeros(shape), gpu.convert(weight(6, 200, 128)))
    assert y.shape == (*shape[:-1], 6)


def test_leading_axes_and_strides() -> None:
    packed = gpu.convert(weight(6, 200, 128))
    x = inputs(200, 3, 2).permute(1, 2, 0)  # not contiguous
    assert torch.equal(gpu.matmul(x, packed), gpu.matmul(x.contiguous(), packed))
    assert gpu.matmul(x, packed).shape == (3, 2, 6)
    every_second = inputs(1, 400)[:, ::2]
    assert torch.equal(
        gpu.matmul(every_second, packed), gpu.matmul(every_second.contiguous(), packed)
    )
    vector = inputs(200)
    assert torch.equal(gpu.matmul(vector, packed), gpu.matmul(vector[None], packed)[0])


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # numpy's, of inf - inf
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_shows(value: float) -> None:
    packed = gpu.convert(weight(6, 200, 128))
    x = inputs(3, 200)
    x[1, 150] = value
    for kernel, rows in ((gpu.gemm, x), (gpu.gemv, x[1:2])):
        finite = kernel(rows, packed).isfinite().all(1)
        assert finite.tolist() == ([True, False, True] if len(rows) == 3 else [False])


def test_the_one_function_reaches_them() -> None:
    stored, x, bias = weight(6, 200, 128), inputs(3, 200), inputs(6)
    packed = gpu.convert(stored)
    expected = gpu.matmul(x, packed, bias)
    assert torch.equal(kernels.ternary_matmul(x, packed, bias=bias), expected)
    apart = torch.zeros(12)
    apart[::2] = bias
    assert torch.equal(gpu.matmul(x, packed, apart[::2]), expected)
    assert torch.equal(kernels.dequantized(packed), stored.dequantized())
    assert torch.equal(kernels.restore(packed).codes, stored.codes)
    assert kernels.convert(stored).layout != "triton"  # on a CPU


def test_a_packed_layer_takes_this_form(monkeypatch: pytest.MonkeyPatch) -> None:
    stored = weight(6, 200, 128)
    layer = PackedLinear(200, 6, bias=True, group_size=128, shift=True)
    layer.weight, layer.weight_scale, layer.weight_shift = stored.codes, stored.scale, stored.shift
    before = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    x = inputs(2, 200)
    monkeypatch.setattr(kernels, "convert", gpu.convert)  # a CPU would choose its own
    with torch.inference_mode():
        y = layer(x)
    assert [name for name, _ in layer.named_buffers()] == ["words"]
    assert error(y, x.double() @ stored.dequantized().double().T) < DTYPES[torch.float32]
    after = layer.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_what_is_refused() -> None:
    stored = weight(6, 200, 100)
    assert not gpu.fits(stored)
    with pytest.raises(ValueError, match="groups of 100 columns"):
        gpu.convert(stored)
    packed = gpu.convert(weight(6, 200, 128))
    for x in (torch.zeros(2, 199), torch.zeros(2, 200, dtype=torch.float64)):
        with pytest.raises(ValueError, match="the weight has 200 columns"):
            gpu.matmul(x, packed)
    with pytest.raises(ValueError, match="a bias"):
        gpu.matmul(torch.zeros(2, 200), packed, torch.zeros(5))
    with pytest.raises(ValueError, match="takes one token, not 2"):
        gpu.gemv(torch.zeros(2, 200), packed)
    with pytest.raises(ValueError, match="not 'triton'"):
        gpu.matmul(torch.zeros(2, 200), weight(6, 200, 128))
    with pytest.raises(ValueError, match="not 'base3'"):
        gpu.convert(packed)
