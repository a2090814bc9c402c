"""Ternary mathematics against brute force, least squares, autograd and closed forms."""

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ternq import rounding, ternary

SHAPES = [(3, 8, 4), (2, 10, 4), (4, 7, 7), (5, 3, 8), (1, 1, 1), (2, 576, 128)]  # rows, columns, g
matrices = st.tuples(
    st.integers(1, 4), st.integers(1, 17), st.integers(1, 20), st.integers(0, 2**31 - 1)
)


def gaussian(rows: int, columns: int, seed: int = 0) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


def groups_of(columns: int, size: int) -> list[slice]:
    return [slice(at, min(at + size, columns)) for at in range(0, columns, size)]


# --- codes ----------------------------------------------------------------------------------------


def codes_by_hand(weight: Tensor, size: int) -> list[list[int]]:
    """The definition, one weight at a time, with Python's floats."""
    rows = []
    for row in weight.double().tolist():
        codes = []
        for part in groups_of(len(row), size):
            own = row[part]
            threshold = 0.7 * sum(map(abs, own)) / len(own)
            codes += [(w > threshold) - (w < -threshold) for w in own]
        rows.append(codes)
    return rows


@pytest.mark.parametrize(("rows", "columns", "size"), SHAPES)
def test_codes_are_those_of_the_definition(rows: int, columns: int, size: int) -> None:
    weight = gaussian(rows, columns)
    codes = rounding.quantize(weight, size)
    assert codes.dtype == torch.int8
    assert codes.tolist() == codes_by_hand(weight, size)


@settings(max_examples=60, deadline=None)
@given(matrices)
def test_codes_do_not_depend_on_a_positive_factor_and_follow_the_sign(
    drawn: tuple[int, int, int, int],
) -> None:
    rows, columns, size, seed = drawn
    weight = gaussian(rows, columns, seed)
    codes = rounding.quantize(weight, size)
    assert torch.equal(rounding.quantize(weight * 4, size), codes)  # a power of two: exact
    assert torch.equal(rounding.quantize(-weight, size), -codes)


def test_every_group_has_its_own_threshold() -> None:
    weight = torch.tensor([[1.0, 0.1, 0.001, 0.0001, 5.0]])
    assert rounding.quantize(weight, 2).tolist() == [[1, 0, 1, 0, 1]]
    assert rounding.quantize(weight, 5).tolist() == [[1, 0, 0, 0, 1]]


def test_a_row_of_zeros_has_codes_scale_and_shift_zero() -> None:
    weight = torch.zeros(2, 5)
    codes = rounding.quantize(weight, 2)
    scale, shift = ternary.fit(weight, codes, 2)
    assert shift is not None
    assert not codes.any() and not scale.any() and not shift.any()


# --- the closed-form start ------------------------------------------------------------------------


@pytest.mark.parametrize(("rows", "columns", "size"), SHAPES)
def test_fit_is_the_least_squares_of_numpy(rows: int, columns: int, size: int) -> None:
    weight = gaussian(rows, columns, seed=1) + 0.3
    codes = rounding.quantize(weight, size)
    scale, shift = ternary.fit(weight, codes, size)
    assert shift is not None
    fitted = ternary.dequantize(codes, scale, shift, size).double()
    for row in range(rows):
        for part in groups_of(columns, size):
            w = weight[row, part].double().numpy()
            t = codes[row, part].double().numpy()
            design = np.stack([t, np.ones_like(t)], 1)
            best, *_ = np.linalg.lstsq(design, w, rcond=None)
            least = np.square(design @ best - w).sum()
            ours = np.square(fitted[row, part].numpy() - w).sum()
            assert ours == pytest.approx(least, rel=1e-4, abs=1e-6)
            if len(set(t)) > 1:  # then scale and shift are determined
                here = (row, part.start // size)
                assert [float(scale[here]), float(shift[here])] == pytest.approx(best, rel=1e-4)


@pytest.mark.parametrize(("rows", "columns", "size"), SHAPES)
def test_without_shift_the_scale_is_that_of_twn(rows: int, columns: int, size: int) -> None:
    weight = gaussian(rows, columns, seed=2)
    codes = rounding.quantize(weight, size)
    scale, shift = ternary.fit(weight, codes, size, shift=False)
    assert shift is None
    for row in range(rows):
        for at, part in enumerate(groups_of(columns, size)):
            kept = weight[row, part][codes[row, part] != 0].abs()
            assert float(scale[row, at]) == pytest.approx(float(kept.mean()), rel=1e-5)


def test_where_all_codes_are_alike_the_scale_stays_learnable() -> None:
    weight = torch.tensor([[1.0, 1.1, 0.9], [-2.0, -2.0, -2.0]])
    codes = rounding.quantize(weight, 3)
    scale, shift = ternary.fit(weight, codes, 3)
    assert torch.allclose(scale, torch.tensor([[1.0], [2.0]])) and shift is not None
    assert not shift.any()
    codes = torch.zeros(2, 3, dtype=torch.int8)
    scale, shift = ternary.fit(weight, codes, 3)
    assert not scale.any() and shift is not None
    assert torch.allclose(shift, torch.tensor([[1.0], [-2.0]]))


@pytest.mark.parametrize("shift", [True, False])
@pytest.mark.parametrize("size", [64, 128, 576])
def test_the_start_of_a_gaussian_matrix(size: int, shift: bool) -> None:
    weight = gaussian(256, 576, seed=3) * 0.02
    codes = rounding.quantize(weight, size)
    zeros = (codes == 0).float().mean()
    error = ternary.dequantize(codes, *ternary.fit(weight, codes, size, shift), size) - weight
    assert 0.3 < zeros < 0.6
    assert error.square().sum() / weight.square().sum() < 0.25


def test_a_shift_never_fits_worse() -> None:
    weight = gaussian(20, 50, seed=4) + 0.2
    codes = rounding.quantize(weight, 16)
    errors = [
        (ternary.dequantize(codes, *ternary.fit(weight, codes, 16, s), 16) - weight).square().sum()
        for s in (True, False)
    ]
    assert errors[0] < errors[1]


# --- the straight-through estimator ---------------------------------------------------------------


def plain(weight: Tensor, scale: Tensor, shift: Tensor | None, size: int, ste: str) -> Tensor:
    """The same value and gradient from operations whose gradients autograd knows.

    ``v + (x - x.detach())`` has the value v and hands v's and x's gradients on.
    """
    columns = weight.shape[1]
    wide = [t.repeat_interleave(size, 1)[:, :columns] for t in (scale, shift) if t is not None]
    codes = rounding.quantize(weight, size).to(weight.dtype)
    slope = torch.where(codes != 0, wide[0], 1.0).detach() if ste == "ttq" else 1.0
    value = wide[0] * codes + (wide[1] if shift is not None else 0)
    return value + slope * (weight - weight.detach())


@pytest.mark.parametrize("ste", ["identity", "ttq"])
@pytest.mark.parametrize("with_shift", [True, False])
@pytest.mark.parametrize(("rows", "columns", "size"), SHAPES)
def test_value_and_gradients_are_those_of_autograd(
    rows: int, columns: int, size: int, with_shift: bool, ste: Any
) -> None:
    groups = ternary.n_groups(columns, size)
    start = [gaussian(rows, columns, 5), gaussian(rows, groups, 6)]
    start += [gaussian(rows, groups, 7)] if with_shift else []
    outer = gaussian(rows, columns, 8)
    gradients, values = [], []
    for function in (rounding.fake_quantize, plain):
        inputs = [t.clone().requires_grad_() for t in start]
        shift = inputs[2] if with_shift else None
        value = function(inputs[0], inputs[1], shift, size, ste)
        value.backward(outer)
        values.append(value.detach())
        gradients.append([t.grad for t in inputs])
    assert torch.equal(values[0], values[1])
    for ours, theirs in zip(*gradients, strict=True):
        assert ours is not None and theirs is not None
        torch.testing.assert_close(ours, theirs)


def test_only_wanted_gradients_are_computed() -> None:
    weight = gaussian(2, 6)
    scale, shift = torch.ones(2, 2, requires_grad=True), torch.zeros(2, 2, requires_grad=True)
    rounding.fake_quantize(weight, scale, shift, 3).sum().backward()
    assert weight.grad is None and scale.grad is not None and shift.grad is not None
    assert torch.equal(shift.grad, torch.full((2, 2), 3.0))


def test_its_value_is_the_dequantized_weight() -> None:
    weight, scale, shift = gaussian(3, 10), gaussian(3, 3, 1), gaussian(3, 3, 2)
    value = rounding.fake_quantize(weight, scale, shift, 4)
    expected = ternary.dequantize(rounding.quantize(weight, 4), scale, shift, 4)
    assert torch.equal(value, expected)


# --- the stored form ------------------------------------------------------------------------------


@settings(max_examples=150, deadline=None)
@given(matrices, st.booleans())
def test_the_stored_form_keeps_the_value(
    drawn: tuple[int, int, int, int], with_shift: bool
) -> None:
    rows, columns, size, seed = drawn
    generator = torch.Generator().manual_seed(seed)
    groups = ternary.n_groups(columns, size)
    codes = torch.randint(-1, 2, (rows, columns), generator=generator).to(torch.int8)
    scale = torch.randn(rows, groups, generator=generator)
    scale[torch.rand(rows, groups, generator=generator) < 0.2] = 0
    shift = torch.randn(rows, groups, generator=generator) if with_shift else None
    half = None if shift is None else shift.half()

    stored = ternary.canonical(codes, scale, shift, size)
    value, before = (ternary.dequantize(*s, size) for s in (stored, (codes, scale.half(), half)))
    # a group of one value is stored as that value, rounded once to float16
    torch.testing.assert_close(value, before, rtol=2**-11, atol=2**-24)

    new_codes, new_scale, new_shift = stored
    assert new_codes.dtype == torch.int8 and new_scale.dtype == torch.float16
    assert (new_scale >= 0).all() and not torch.signbit(new_scale).any()
    again = ternary.canonical(*stored, size)
    assert all(
        a is b if a is None or b is None else torch.equal(a, b)
        for a, b in zip(again, stored, strict=True)
    )
    for at, part in enumerate(groups_of(columns, size)):
        for row in range(rows):
            own = new_codes[row, part]
            if float(new_scale[row, at]) == 0:
                assert not own.any()
            elif new_shift is not None:  # a group of one value has no scale
                assert len(own.unique()) > 1


def test_a_negative_scale_is_turned_and_a_single_value_becomes_the_shift() -> None:
    codes = torch.tensor([[1, 0, -1], [1, 1, 1]], dtype=torch.int8)
    scale, shift = torch.tensor([[-2.0], [-2.0]]), torch.tensor([[0.5], [0.5]])
    new_codes, new_scale, new_shift = ternary.canonical(codes, scale, shift, 3)
    assert new_shift is not None
    assert new_codes.tolist() == [[-1, 0, 1], [0, 0, 0]]
    assert new_scale.tolist() == [[2.0], [0.0]] and new_shift.tolist() == [[0.5], [-1.5]]


def test_without_shifts_a_single_value_keeps_its_codes() -> None:
    codes = torch.tensor([[1, 1, 1], [0, 0, 0]], dtype=torch.int8)
    new_codes, new_scale, _ = ternary.canonical(codes, torch.tensor([[-2.0], [3.0]]), None, 3)
    assert new_codes.tolist() == [[-1, -1, -1], [0, 0, 0]]
    assert new_scale.tolist() == [[2.0], [0.0]]


@pytest.mark.parametrize("bad", [7e4, float("nan"), float("inf")])
@pytest.mark.parametrize("where", ["scale", "shift"])
def test_what_float16_cannot_hold_is_refused(where: str, bad: float) -> None:
    good, wrong = torch.ones(1, 1), torch.full((1, 1), bad)
    pair = (wrong, good) if where == "scale" else (good, wrong)
    with pytest.raises(ValueError, match=where):
        ternary.canonical(torch.tensor([[1, 0]], dtype=torch.int8), *pair, 2)


def test_a_single_value_too_large_for_the_shift_is_refused() -> None:
    large = torch.full((1, 1), 6e4)
    with pytest.raises(ValueError, match="shift"):
        ternary.canonical(torch.tensor([[1, 1]], dtype=torch.int8), large, large, 2)


def test_grouping_is_undone() -> None:
    weight = gaussian(3, 10)
    groups = ternary.grouped(weight, 4)
    assert groups.shape == (3, 3, 4) and not groups[:, 2, 2:].any()
    assert torch.equal(ternary.ungrouped(groups, 10), weight)
    assert ternary.group_lengths(10, 4).tolist() == [4, 4, 2]
