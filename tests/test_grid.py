"""Uniform grids, GPTQ, PT2-LLM's fits and BiLLM's parts, against their formulas done naively."""

from itertools import product

import pytest
import torch
from test_compensate import correlated, random
from torch import Tensor

from ternq import rounding, ternary
from ternq.billm import billm, binarise, binarised, break_point, salient_columns
from ternq.compensate import DAMPING, errors_of, inverse_root
from ternq.grid import gptq, grid, rtn, stored_bits
from ternq.pt2 import aga, itf, nearest, pt2

GRIDS = [(bits, symmetric) for bits in (2, 3, 4, 8) for symmetric in (True, False)]
SHAPES = [(6, 32, 8), (5, 30, 8), (3, 20, 64), (7, 17, 1)]  # out, in, group


def damped_inverse(hessian: Tensor) -> Tensor:
    mean = float(hessian.diagonal().mean())
    return torch.linalg.inv(hessian.double() + DAMPING * mean * torch.eye(len(hessian)))


def eliminated(inverse: Tensor, j: int) -> Tensor:
    """The inverse of the Hessian of the columns that are left, after column ``j``."""
    return inverse - torch.outer(inverse[:, j], inverse[j]) / inverse[j, j]


def related(columns: int) -> Tensor:
    """Moments of inputs that a few hidden causes have in common, all channels of one size."""
    x = random(400, 4) @ random(4, columns, 1) + 0.5 * random(400, columns, 2)
    return 2 / 400 * x.T @ x


# --- RTN and GPTQ ---------------------------------------------------------------------------------


@pytest.mark.parametrize(("bits", "symmetric"), GRIDS)
def test_rtn_takes_the_nearest_level(bits: int, symmetric: bool) -> None:
    """By trying all of them; the levels in the words of the published code."""
    weight = random(4, 24) * torch.tensor([[1.0], [50.0], [1e-3], [-2.0]])
    found = rtn(weight, bits, symmetric, 8).values
    for row, group in product(range(4), range(3)):
        part = weight[row, 8 * group : 8 * group + 8]
        low, high = min(float(part.min()), 0), max(float(part.max()), 0)
        if symmetric:
            high = max(-low, high)
            low = -high
        scale = torch.tensor((high - low) / (2**bits - 1)).half().float()
        zero = 2 ** (bits - 1) if symmetric else torch.round(-low / scale)
        levels = scale * (torch.arange(2**bits) - zero)
        nearest = levels[(part[:, None] - levels).abs().argmin(1)]
        assert torch.allclose(found[row, 8 * group : 8 * group + 8], nearest, rtol=1e-5)


def test_the_error_is_half_a_step() -> None:
    weight = random(8, 64)
    for bits in (2, 4, 8):
        levels = grid(weight.t(), bits, symmetric=False)
        error = (rtn(weight, bits, False, 64).values - weight).abs()
        assert (error <= levels.scale[:, None] * 0.75).all()  # the ends, as zero is rounded too
        assert (error > levels.scale[:, None] * 0.4).any()


def test_groups_of_one_value() -> None:
    weight = torch.tensor([[0.0, 0.0, 0.5, 0.5, -3.0, -3.0]])
    for symmetric in (True, False):
        found = rtn(weight, 8, symmetric, 2).values
        assert torch.allclose(found, weight, rtol=4e-3)
        assert torch.equal(found[:, :2], weight[:, :2])


def test_bits_are_counted() -> None:
    assert stored_bits(10, 256, 3, True, 128) / 2560 == 3.125  # Spectra's QuantLM, of one scale
    assert stored_bits(10, 256, 2, False, 64) / 2560 == 2.5
    assert stored_bits(10, 130, 4, False, 128) == 10 * (4 * 130 + 2 * 32)  # a short last group


@pytest.mark.parametrize(("bits", "symmetric"), [(2, False), (3, True), (8, False)])
@pytest.mark.parametrize(("out", "columns", "group"), SHAPES)
def test_gptq_is_the_naive_formula(
    out: int, columns: int, group: int, bits: int, symmetric: bool
) -> None:
    """OBS in float64: after each column all others move, and its row leaves the inverse."""
    weight, hessian = random(out, columns), correlated(columns)
    left, inverse = weight.double().clone(), damped_inverse(hessian)
    expected = torch.zeros_like(left)
    for j in range(columns):
        if j % group == 0:
            levels = grid(left[:, j : j + group].float().t(), bits, symmetric)
        expected[:, j] = levels.values(levels.codes(left[:, j].float()))
        error = (left[:, j] - expected[:, j]) / inverse[j, j]
        left[:, j:] -= error[:, None] * inverse[j, j:]
        inverse = eliminated(inverse, j)
    found = gptq(weight, hessian, bits, symmetric, group)
    near = torch.isclose(found.values.double(), expected, atol=1e-3)
    assert near.float().mean() > 0.99  # a weight on the border of two levels may fall either way
    assert found.dead == 0


def test_gptq_without_correlations_is_rtn() -> None:
    weight = random(5, 40)
    for bits, symmetric in GRIDS:
        found = gptq(weight, torch.eye(40), bits, symmetric, 16)
        assert torch.equal(found.values, rtn(weight, bits, symmetric, 16).values)


def test_gptq_loses_less_of_the_output() -> None:
    weight, hessian = random(16, 64), related(64)
    for bits in (2, 3, 4):
        lost = weight - rtn(weight, bits, False, 32).values
        plain = ((lost @ hessian) * lost).sum() / ((weight @ hessian) * weight).sum()
        error = gptq(weight, hessian, bits, False, 32).error
        assert error is not None
        assert error < 0.6 * plain


@pytest.mark.parametrize("symmetric", [True, False])
def test_a_shrunk_grid_is_the_best_of_those_that_are_tried(symmetric: bool) -> None:
    rows = random(40, 6) * torch.tensor([1.0, 50.0, 1e-2, 3.0, 1.0, 1.0])
    rows[0, 4] = 9.0  # an outlier
    found = grid(rows, 3, symmetric, "mse")
    for row in range(6):
        low, high = rows[:, row].min().clamp(max=0), rows[:, row].max().clamp(min=0)
        if symmetric:
            high = torch.maximum(-low, high)
            low = -high
        errors = []
        for percent in range(80):
            share = 1 - percent / 100
            scale = (share * (high - low) / 7).half().float()
            zero = 4 if symmetric else torch.round(-share * low / scale)
            levels = scale * (torch.arange(8) - zero)
            apart = (rows[:, row, None] - levels).abs().amin(1)
            errors.append(float(apart.pow(2.4).sum()))
        own = found.scale[row] * (torch.arange(8) - found.zero[row])
        error = float((rows[:, row, None] - own).abs().amin(1).pow(2.4).sum())
        assert error == pytest.approx(min(errors), rel=1e-3)


@pytest.mark.parametrize("symmetric", [True, False])
def test_a_fitted_grid_ends_at_least_squares(
    symmetric: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After enough rounds, of its own codes, as torch's solver has it; and nearer than before."""
    monkeypatch.setattr("ternq.grid.ROUNDS", 50)
    rows, cost = random(64, 30), torch.rand(64, generator=torch.Generator().manual_seed(1)) + 0.1
    start, found = (grid(rows, 2, symmetric, how, cost) for how in ("mse", "fit"))
    lost = [
        (cost[:, None] * (g.values(g.codes(rows)) - rows).square()).sum(0) for g in (start, found)
    ]
    assert (lost[1] <= lost[0] * 1.001).all()
    assert lost[1].sum() < (0.99 if symmetric else 0.9) * lost[0].sum()
    codes, root = found.codes(rows), cost.sqrt()[:, None]
    for row in range(30):
        one = torch.ones(64) if not symmetric else torch.zeros(64)
        base = torch.stack([codes[:, row] - (2.0 if symmetric else 0.0), one], 1)
        solved = torch.linalg.lstsq(root * base, root * rows[:, row : row + 1], driver="gelsd")
        best = base @ solved.solution[:, 0] - rows[:, row]
        assert lost[1][row] <= (cost * best.square()).sum() * 1.005


@pytest.mark.parametrize("how", ["mse", "fit"])
def test_other_grids_of_groups_of_one_value(how: str) -> None:
    weight = torch.tensor([[0.0, 0.0, 0.5, 0.5, -3.0, -3.0]])
    for symmetric in (True, False):
        found = rtn(weight, 4, symmetric, 2, how).values
        assert torch.allclose(found, weight, atol=0.05)
    assert torch.isfinite(gptq(random(4, 20), torch.eye(20), 2, False, 1, how).values).all()


def test_four_fitted_levels_lose_less_than_those_of_the_ends() -> None:
    weight, hessian = random(16, 128), related(128)
    errors = [gptq(weight, hessian, 2, False, 64, how).error for how in ("minmax", "mse", "fit")]
    assert errors[0] is not None
    assert errors[1] is not None
    assert errors[2] is not None
    assert errors[2] < errors[1] < errors[0]


def test_what_cannot_be_rounded_is_refused() -> None:
    weight = random(2, 8)
    weight[0, 0] = float("nan")
    for bad in (rtn, lambda w, *rest: gptq(w, torch.eye(8), *rest)):
        with pytest.raises(ValueError, match="not finite"):
            bad(weight, 2, False, 8)
    with pytest.raises(ValueError, match="too large for float16"):
        rtn(random(2, 8) * 1e9, 2, False, 8)


# --- a group that is rounded as a whole -----------------------------------------------------------


def test_errors_of_a_group_leave_the_minimum_to_the_columns_after_it() -> None:
    """Against least squares: the columns after it, chosen to minimise the error of the output."""
    weight, hessian = random(5, 20).double(), correlated(20).double()
    upper, _, _ = inverse_root(hessian, 0.0)
    upper = upper.double()
    rounded = weight[:, :8].round()
    errors = errors_of((weight[:, :8] - rounded).t(), upper[:8, :8])
    moved = weight[:, 8:] - errors.t() @ upper[:8, 8:]
    own, cross = hessian[8:, 8:], hessian[:8, 8:]
    best = weight[:, 8:] + (weight[:, :8] - rounded) @ cross @ torch.linalg.inv(own)
    assert torch.allclose(moved, best, rtol=1e-3, atol=1e-3)


# --- PT2-LLM --------------------------------------------------------------------------------------


def test_itf_ends_where_nothing_gets_better() -> None:
    rows = random(20, 32) * torch.rand(20, 1) + torch.rand(20, 1)
    codes = itf(rows)
    scale, shift = ternary.fit(rows, codes, 32)
    assert shift is not None
    assert torch.equal(nearest(rows, scale, shift), codes)
    levels = torch.stack([shift - scale, shift, shift + scale], 2)
    best = (rows[:, :, None] - levels).abs().amin(2)
    assert torch.allclose(best, (rows - scale * codes - shift).abs(), atol=1e-6)
    start = rows - rows.mean(1, keepdim=True)
    plain = torch.sign(start) * (start.abs() > 0.75 * start.abs().mean(1, keepdim=True))
    before, after = (error(rows, c) for c in (plain, codes))
    assert (after <= before + 1e-5).all()
    assert after.sum() < before.sum()


def error(rows: Tensor, codes: Tensor) -> Tensor:
    scale, shift = ternary.fit(rows, codes, rows.shape[1])
    assert shift is not None
    return (rows - scale * codes - shift).square().sum(1)


def test_itf_is_near_the_best_of_all_codes() -> None:
    """By trying the 3^6 that a group of 6 has; local optima are few."""
    rows = random(30, 6)
    everything = torch.tensor(list(product((-1.0, 0.0, 1.0), repeat=6)))
    best = torch.stack([error(rows, c.expand(30, 6)) for c in everything]).amin(0)
    found = error(rows, itf(rows))
    assert (found >= best - 1e-5).all()
    assert (found <= best + 1e-4).float().mean() > 0.3


def test_aga_is_the_least_squares_of_the_outputs() -> None:
    x, rows = random(200, 12) @ random(12, 12, 5), random(7, 12)
    codes = itf(rows)
    scale, shift = aga(rows, codes, x.T @ x)
    for row in range(7):
        basis = torch.stack([x @ codes[row], x.sum(1)], 1).double()
        best = torch.linalg.lstsq(basis, (x @ rows[row]).double()[:, None]).solution[:, 0]
        assert torch.allclose(torch.stack([scale[row], shift[row]]).double(), best, rtol=2e-3)


def test_aga_of_equal_inputs_is_the_fit_of_the_weights() -> None:
    rows = random(7, 12)
    codes = itf(rows)
    codes[0], codes[1] = 0, 1  # of these rows scale and shift are not determined
    plain = ternary.fit(rows, codes, 12)
    assert plain[1] is not None
    scale, shift = aga(rows, codes, torch.eye(12))
    assert torch.allclose(scale, plain[0][:, 0], atol=1e-5)
    assert torch.allclose(shift, plain[1][:, 0], atol=1e-5)


def test_pt2_is_the_naive_formula() -> None:
    weight, hessian = random(6, 30), correlated(30)
    left, inverse = weight.double().clone(), damped_inverse(hessian)
    expected = torch.zeros_like(left)
    for first in range(0, 30, 8):
        group = slice(first, min(first + 8, 30))
        part = left[:, group].float()
        codes = itf(part)
        scale, shift = aga(part, codes, hessian[group, group])
        expected[:, group] = scale[:, None] * codes + shift[:, None]
        for j in range(group.start, group.stop):
            moved = (left[:, j] - expected[:, j]) / inverse[j, j]
            left[:, j:] -= moved[:, None] * inverse[j, j:]
            inverse = eliminated(inverse, j)
    found = pt2(weight, hessian, 8)
    values = ternary.dequantize(found.codes, found.scale, found.shift, 8)
    assert torch.isclose(values.double(), expected, atol=1e-2).float().mean() > 0.95
    assert torch.equal(rounding.quantize(found.latent, 8), found.codes)


def test_pt2_of_zeros_and_of_one_value() -> None:
    weight = torch.zeros(3, 16)
    weight[1] = 0.5
    found = pt2(weight, torch.eye(16), 8)
    values = ternary.dequantize(found.codes, found.scale, found.shift, 8)
    assert torch.allclose(values, weight, atol=1e-6)


# --- BiLLM ----------------------------------------------------------------------------------------


def test_binarised_is_the_best_pair_of_levels_around_the_mean() -> None:
    """Of ``mean + s sign(w - mean)``, the mean magnitude is the least squares for ``s``."""
    rows, part = random(5, 20), random(5, 20, 3) > 0
    found = binarised(rows, part)
    for row in range(5):
        own = rows[row][part[row]]
        mean = own.mean()
        tried = torch.linspace(0, 3, 3001)[:, None]
        errors = (own - mean - tried * torch.sign(own - mean)).square().sum(1)
        kept = (own - found[row][part[row]]).square().sum()
        assert kept <= errors.min() + 1e-4
    assert not found[~part].any()
    twice = binarised(rows, part, 2)
    left = torch.where(part, rows - found, torch.zeros_like(rows))
    assert torch.allclose(twice, found + binarised(left, part), atol=1e-6)


def test_salient_columns_are_the_largest_and_the_best_number() -> None:
    weight = random(9, 12).square()
    weight[:, 4], weight[:, 7] = weight[:, 4] * 40, weight[:, 7] * 30
    found = salient_columns(weight)
    order = weight.sum(0).argsort(descending=True)
    errors = []
    for count in range(1, 12):
        inside = torch.zeros(12, dtype=torch.bool)
        inside[order[:count]] = True
        inside = inside.expand(9, 12)
        rounded = binarised(weight, inside, 2) + binarised(weight, ~inside, 2)
        errors.append(float((weight - rounded).square().sum()))
    count = errors.index(min(errors)) + 1
    assert found.nonzero().flatten().tolist() == sorted(order[:count].tolist())


def test_the_split_is_the_best_of_the_quantiles() -> None:
    values = random(9, 30).square()
    salient = torch.zeros(9, 30, dtype=torch.bool)
    salient[:, 3] = True
    found = break_point(values, salient)
    flat = torch.where(salient, torch.zeros_like(values), values).flatten()
    points = torch.quantile(flat, torch.linspace(0.1, 0.9, 81))

    def lost(point: Tensor) -> float:
        low, high = ~salient & (values < point), ~salient & (values >= point)
        rounded = binarised(values, low) + binarised(values, high)
        return float((values - rounded)[~salient].square().sum())

    assert lost(found) == pytest.approx(min(map(lost, points)), rel=1e-4)


def test_a_block_of_billm_has_its_levels() -> None:
    """Four of a row's salient weights, two on each side of the split; float16 holds the parts."""
    block = random(6, 64)
    block[:, 9] *= 20
    found, salient = binarise(block, block.square())
    assert salient[9]
    for row in range(6):
        assert len(found[row][salient].unique()) <= 4
        assert len(found[row][~salient].unique()) <= 4
    assert (block - found).square().sum() < 0.4 * block.square().sum()


def test_billm_compensates() -> None:
    weight, hessian = random(16, 48), related(48)
    found = billm(weight, hessian, 16)
    plain = billm(weight, torch.diag(hessian.diagonal()), 16)
    lost = [((weight - f.values) @ hessian * (weight - f.values)).sum() for f in (found, plain)]
    assert lost[0] < 0.8 * lost[1]
    assert 1 < found.code_bits / weight.numel() < 2
    with pytest.raises(ValueError, match="not finite"):
        billm(weight * float("nan"), hessian, 16)
    with pytest.raises(ValueError, match="too large for float16"):
        billm(weight * 1e9, hessian, 16)
