"""Ternary by value: what is recovered gives the tensor back; what is not ternary is named."""

import itertools
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from ternq import rounding, ternary
from ternq.recover import NotTernaryError, recover, scheme_of
from ternq.ternary import TernaryWeight

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def made(columns: int, group_size: int, shift: bool, seed: int = 0) -> TernaryWeight:
    """A ternary weight as training makes them."""
    torch.manual_seed(seed)
    dense = torch.randn(12, columns) * 0.05 + 0.003
    codes = rounding.quantize(dense, group_size)
    scale, offset = ternary.fit(dense, codes, group_size, shift)
    return TernaryWeight(codes, scale, offset, group_size).canonical()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("columns", "group_size"), [(576, 128), (64, 64), (50, 16), (40, 99)])
def test_without_shifts_codes_come_back_to_the_bit(
    dtype: torch.dtype, columns: int, group_size: int
) -> None:
    weight = made(columns, group_size, shift=False)
    dense = weight.dequantized().to(dtype)
    found = recover(dense, group_size, shift=False)
    assert found.error == 0
    assert torch.equal(found.weight.codes, weight.codes)
    assert torch.equal(found.weight.dequantized().to(dtype), dense)
    assert found.weight.is_canonical()
    if dtype != torch.bfloat16:  # which holds fewer digits than the scale had
        assert found.weight.same(weight)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("columns", "group_size"), [(576, 128), (64, 64), (50, 16)])
def test_with_shifts_the_values_come_back_to_the_bit(
    dtype: torch.dtype, columns: int, group_size: int
) -> None:
    weight = made(columns, group_size, shift=True)
    dense = weight.dequantized().to(dtype)
    found = recover(dense, group_size, shift=True)
    assert found.error == 0
    assert torch.equal(found.weight.dequantized().to(dtype), dense)
    assert found.weight.is_canonical()


def test_with_shifts_float32_gives_the_very_numbers_where_all_three_codes_are() -> None:
    weight = made(576, 192, shift=True)
    found = recover(weight.dequantized(), 192, shift=True).weight
    assert found.same(weight)


HALVES = st.floats(2**-10, 8, width=16)


@settings(max_examples=200, deadline=None, derandomize=True, database=None)
@example(codes=[0, 1, -1], scale=1.0, shift=0.00390625, dtype=torch.bfloat16)
@given(
    codes=st.lists(st.integers(-1, 1), min_size=1, max_size=9),
    scale=HALVES,
    shift=st.floats(-4, 4, width=16),
    dtype=st.sampled_from(DTYPES),
)
def test_any_group_comes_back(
    codes: list[int], scale: float, shift: float, dtype: torch.dtype
) -> None:
    row = torch.tensor([codes], dtype=torch.int8)
    own = TernaryWeight(row, torch.tensor([[scale]]), torch.tensor([[shift]]), 16)
    dense = own.dequantized().to(dtype)
    found = recover(dense, 16, shift=True)
    assert torch.equal(found.weight.dequantized().to(dtype), dense) == (found.error == 0)
    if dtype != torch.float32:  # there a sum of two float16 numbers may be beyond float16
        exists = brute_force(dense)
        assert (found.error == 0) == exists


def brute_force(dense: Tensor) -> bool:
    """Whether any codes, and float16 scale and shift near the values, round to this group."""
    values = sorted(set(dense.flatten().double().tolist()))
    near = torch.arange(-300, 301, dtype=torch.int16)
    for codes in itertools.combinations((-1, 0, 1), len(values)):
        spread = codes[-1] - codes[0]
        scale = (values[-1] - values[0]) / spread if spread else 1.0
        # of several values the one that is nearest to zero tells the shift most exactly
        anchors = [v - c * scale for v, c in zip(values, codes, strict=True)]
        scales, *several = (
            (torch.tensor(n).half().view(torch.int16) + near).view(torch.float16).double()
            for n in (scale, *anchors)
        )
        scales, shifts = scales[scales > 0], torch.cat(several)
        made = [(shifts[:, None] + c * scales).to(dense.dtype).double() for c in codes]
        fits = torch.stack([m == v for m, v in zip(made, values, strict=True)]).all(0)
        if bool(fits.any()):
            return True
    return False


def test_a_scale_of_float32_that_float16_lacks_is_rounded_and_told() -> None:
    found = recover(torch.tensor([[0.1, -0.1, 0.0, 0.1]]), 4, shift=False)
    assert 0 < found.error < 2**-11
    assert found.weight.codes.tolist() == [[1, -1, 0, 1]]


def test_zeros_and_constants() -> None:
    flat = torch.full((2, 8), 0.25)
    found = recover(flat, 4, shift=True).weight
    assert not found.codes.any() and not found.scale.any()
    assert found.shift is not None and found.shift.tolist() == [[0.25, 0.25]] * 2
    assert recover(torch.zeros(2, 8), 4, shift=False).weight.is_canonical()
    assert not recover(torch.tensor([[-0.0, 0.0]]), 2, shift=False).weight.codes.any()


@pytest.mark.parametrize(
    ("values", "shift", "count"),
    [
        ([1.0, 2.0, 0.0, 0.0], False, 3),
        ([1.0, -1.0, 0.5, 0.0], False, 4),
        ([1.0, 2.0, 4.0, 1.0], True, 3),
        ([1.0, 2.0, 3.0, 4.0], True, 4),
    ],
)
def test_what_is_not_ternary_is_named(values: list[float], shift: bool, count: int) -> None:
    dense = torch.zeros(5, 10)
    dense[3, 4:8] = torch.tensor(values)
    with pytest.raises(NotTernaryError) as caught:
        recover(dense, 4, shift=shift)
    assert (caught.value.row, caught.value.columns, caught.value.values) == (3, (4, 8), count)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e6, 1e-9])
@pytest.mark.parametrize("shift", [True, False])
def test_values_beyond_float16_are_refused(value: float, shift: bool) -> None:
    with pytest.raises(ValueError):
        recover(torch.tensor([[value, -value, 0.0, value]]), 4, shift=shift)


@pytest.mark.parametrize("dtype", [torch.float64, torch.int8])
@pytest.mark.parametrize("shift", [True, False])
def test_other_types_are_refused(dtype: torch.dtype, shift: bool) -> None:
    with pytest.raises(ValueError, match="its type is torch"):
        recover(torch.zeros(2, 4, dtype=dtype), 4, shift)
    assert scheme_of([torch.zeros(2, 32, dtype=dtype)]) is None


def per_shard(columns: int, shards: int) -> Tensor:
    """Rows whose scale changes where a tensor-parallel training cut them."""
    torch.manual_seed(0)
    codes = torch.randint(-1, 2, (24, columns)).float()
    scales = torch.arange(1, shards + 1).repeat_interleave(columns // shards) * 0.125
    return codes * scales


@pytest.mark.parametrize(
    ("samples", "expected"),
    [
        ([per_shard(640, 1), per_shard(256, 1)], (640, False)),
        ([per_shard(640, 2), per_shard(256, 1)], (320, False)),
        ([per_shard(1280, 2), per_shard(512, 2)], (128, False)),  # 640 and 256 share 128
        ([per_shard(64, 2) + 0.5], (32, True)),
    ],
)
def test_the_scheme_is_found(samples: list[Tensor], expected: tuple[int, bool]) -> None:
    assert scheme_of(samples) == expected


def test_no_scheme_for_what_is_not_ternary() -> None:
    torch.manual_seed(0)
    assert scheme_of([torch.randn(8, 64)]) is None
    assert scheme_of([per_shard(64, 1)], group_size=16) == (16, False)


def test_recovering_goes_by_parts_of_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    from ternq import recover as module

    dense = made(64, 16, shift=False).dequantized()
    whole = recover(dense, 16, shift=False)
    monkeypatch.setattr(module, "_BLOCK", 64 * 5)
    parts: Any = recover(dense, 16, shift=False)
    assert parts.weight.same(whole.weight)
    dense[11, 3] = 9
    with pytest.raises(NotTernaryError, match="row 11, columns 0 to 15"):
        recover(dense, 16, shift=False)
