"""Error-compensated rounding, against plain rounding and against the formula done naively."""

import pytest
import torch
from torch import Tensor

from ternq import rounding, ternary
from ternq.compensate import DAMPING, Compensated, compensate, inverse_root, output_error

SHAPES = [(6, 32, 8), (5, 30, 8), (4, 24, 24), (3, 20, 64), (7, 17, 1)]  # out, in, group


def random(rows: int, columns: int, seed: int = 0) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


def correlated(columns: int, samples: int = 400, seed: int = 1) -> Tensor:
    """``2 / n * X'X`` of inputs whose channels are correlated and of unlike size."""
    mixed = random(samples, columns, seed) @ random(columns, columns, seed + 1)
    x = mixed * torch.logspace(-1, 1, columns) + random(samples, 1, seed + 2)
    return 2 / samples * x.T @ x


def value(found: Compensated, group_size: int) -> Tensor:
    return ternary.dequantize(found.codes, found.scale, found.shift, group_size)


def plain(weight: Tensor, group_size: int, shift: bool) -> Tensor:
    codes = rounding.quantize(weight, group_size)
    return ternary.dequantize(codes, *ternary.fit(weight, codes, group_size, shift), group_size)


def naive(weight: Tensor, hessian: Tensor, group_size: int, shift: bool) -> tuple[Tensor, Tensor]:
    """OBS as in the formula: after each column all others move, and its row leaves the inverse."""
    weight, mean = weight.double().clone(), float(hessian.diagonal().mean())
    inverse = torch.linalg.inv(hessian.double() + DAMPING * mean * torch.eye(len(hessian)))
    codes, rounded = torch.zeros_like(weight), torch.zeros_like(weight)
    for j in range(weight.shape[1]):
        if j % group_size == 0:
            group = weight[:, j : j + group_size].float()
            limit = 0.7 * group.abs().mean(1)
            scale, offset = ternary.fit(group, rounding.quantize(group, group_size), 10**6, shift)
        codes[:, j] = torch.sign(weight[:, j]) * (weight[:, j].abs() > limit)
        rounded[:, j] = scale[:, 0] * codes[:, j] + (0 if offset is None else offset[:, 0])
        error = (weight[:, j] - rounded[:, j]) / inverse[j, j]
        weight[:, j + 1 :] -= error[:, None] * inverse[j, j + 1 :]
        inverse = inverse - torch.outer(inverse[:, j], inverse[j]) / inverse[j, j]
    return codes, rounded


@pytest.mark.parametrize("shift", [True, False])
@pytest.mark.parametrize(("out", "columns", "group"), SHAPES)
def test_without_correlations_it_is_plain_rounding(
    out: int, columns: int, group: int, shift: bool
) -> None:
    weight = random(out, columns)
    found = compensate(weight, torch.eye(columns), group, shift, rounds=0)
    codes = rounding.quantize(weight, group)
    scale, offset = ternary.fit(weight, codes, group, shift)
    assert torch.equal(found.codes, codes)
    assert torch.allclose(found.scale, scale, atol=1e-6)
    assert (found.shift is None) == (not shift)
    if offset is not None and found.shift is not None:
        assert torch.allclose(found.shift, offset, atol=1e-6)
    if columns % group == 0:
        assert torch.equal(value(found, group), plain(weight, group, shift))


@pytest.mark.parametrize("shift", [True, False])
@pytest.mark.parametrize(("out", "columns", "group"), SHAPES)
def test_it_is_the_naive_formula(out: int, columns: int, group: int, shift: bool) -> None:
    weight, hessian = random(out, columns), correlated(columns)
    found = compensate(weight, hessian, group, shift, rounds=0)
    codes, rounded = naive(weight, hessian, group, shift)
    assert torch.equal(found.codes.double(), codes)
    assert torch.allclose(value(found, group).double(), rounded, atol=1e-3)


def test_the_factor_is_that_of_the_inverse() -> None:
    hessian = correlated(20).double()
    upper, dead, damping = inverse_root(hessian)
    damped = hessian + DAMPING * hessian.diagonal().mean() * torch.eye(20)
    product = damped @ upper.double().T @ upper.double()
    assert torch.allclose(product, torch.eye(20, dtype=torch.float64), atol=1e-3)
    assert torch.equal(upper, upper.triu())
    assert (dead, damping) == (0, DAMPING)


@pytest.mark.parametrize("rounds", [0, 1, 4])
@pytest.mark.parametrize("shift", [True, False])
def test_the_output_is_nearer_than_by_plain_rounding(shift: bool, rounds: int) -> None:
    for seed in range(5):
        weight, x = random(24, 64, seed), random(500, 64, seed + 1) @ random(64, 64, seed + 2)
        found = compensate(weight, 2 / 500 * x.T @ x, 16, shift, rounds=rounds)
        lost = float(((x @ (weight - value(found, 16)).T) ** 2).sum())
        before = float(((x @ (weight - plain(weight, 16, shift)).T) ** 2).sum())
        assert lost < 0.9 * before
        assert found.error == pytest.approx(lost / float(((x @ weight.T) ** 2).sum()), rel=1e-3)


def test_rounds_of_least_squares_help_where_errors_weigh_alike() -> None:
    weight, hessian = random(64, 128), torch.eye(128)
    errors = [compensate(weight, hessian, 32, rounds=n).error for n in (0, 1, 4)]
    assert errors[0] > errors[1] > errors[2]


@pytest.mark.parametrize("rounds", [0, 4])
@pytest.mark.parametrize("shift", [True, False])
@pytest.mark.parametrize(("out", "columns", "group"), SHAPES)
def test_the_latent_weight_has_the_codes(
    out: int, columns: int, group: int, shift: bool, rounds: int
) -> None:
    found = compensate(random(out, columns), correlated(columns), group, shift, rounds=rounds)
    assert found.latent.dtype == torch.float32
    assert torch.isfinite(found.latent).all()
    assert torch.equal(rounding.quantize(found.latent, group), found.codes)
    in_use = rounding.fake_quantize(found.latent, found.scale, found.shift, group)
    assert torch.equal(in_use, value(found, group))


@pytest.mark.parametrize("fill", [0.0, 1.0, -2.0])
@pytest.mark.parametrize("shift", [True, False])
def test_groups_of_one_value_keep_it(fill: float, shift: bool) -> None:
    weight = random(4, 24)
    weight[1, 8:16] = fill
    weight[2] = fill
    found = compensate(weight, torch.eye(24), 8, shift)
    assert torch.equal(rounding.quantize(found.latent, 8), found.codes)
    assert torch.allclose(value(found, 8)[2], weight[2], atol=1e-6)
    assert torch.allclose(value(found, 8)[1, 8:16], weight[1, 8:16], atol=1e-6)


def test_the_latent_weight_keeps_the_order_of_what_was_rounded() -> None:
    weight = random(3, 128)
    found = compensate(weight, torch.eye(128), 128, rounds=0)
    assert torch.allclose(found.latent, weight, atol=1e-5)  # nothing was compensated or centred
    nearest = compensate(weight, torch.eye(128), 128, rounds=4)
    shift = nearest.shift
    assert shift is not None
    for row, apart in zip(nearest.latent, weight - shift, strict=True):
        assert torch.equal(row.abs().argsort(), apart.abs().argsort())


@pytest.mark.parametrize("scale", [1e-4, 1.0, 1e4])
def test_dead_channels_are_counted_and_touch_nothing(scale: float) -> None:
    weight, hessian = random(5, 24), scale * correlated(24)
    dead = torch.tensor([0, 9, 23])
    hessian[dead] = 0
    hessian[:, dead] = 0
    found = compensate(weight, hessian, 8, rounds=0)
    assert found.dead == 3
    assert found.damping == DAMPING
    live = [i for i in range(24) if i not in dead]
    upper = inverse_root(hessian)[0]
    assert not upper[dead][:, live].any()
    assert not upper[live][:, dead].any()
    alone = inverse_root(hessian[live][:, live])[0]
    assert torch.allclose(upper[live][:, live], alone, rtol=1e-4, atol=1e-4 * float(alone.max()))


def test_no_input_at_all_is_plain_rounding() -> None:
    weight = random(5, 24)
    found = compensate(weight, torch.zeros(24, 24), 8, rounds=0)
    assert found.dead == 24
    assert found.error == 0.0
    assert torch.equal(value(found, 8), plain(weight, 8, True))


def test_a_singular_hessian_is_damped_until_it_is_definite() -> None:
    x = random(2, 16)
    singular = x.T @ x
    assert inverse_root(singular)[2] == DAMPING
    _, _, damping = inverse_root(singular - 0.05 * singular.diagonal().mean() * torch.eye(16))
    assert damping == pytest.approx(0.1)
    assert inverse_root(singular, 0.0)[2] in (0.0, DAMPING)
    found = compensate(random(4, 16), singular, 8)
    assert torch.isfinite(found.latent).all()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_numbers_that_are_not_finite_are_refused(bad: float) -> None:
    weight, hessian = random(4, 16), correlated(16)
    broken = hessian.clone()
    broken[3, 3] = bad
    with pytest.raises(ValueError, match="not finite"):
        compensate(weight, broken, 8)
    weight[0, 0] = bad
    with pytest.raises(ValueError, match="not finite"):
        compensate(weight, hessian, 8)


def test_the_inputs_stay_as_they_are() -> None:
    weight, hessian = random(4, 16), correlated(16)
    before = weight.clone(), hessian.clone()
    compensate(weight, hessian, 8)
    assert torch.equal(weight, before[0])
    assert torch.equal(hessian, before[1])


def test_output_error_of_nothing_is_nothing() -> None:
    weight = random(4, 8)
    assert output_error(weight, weight, torch.eye(8)) == 0.0
    assert output_error(weight, 0 * weight, torch.eye(8)) == pytest.approx(1.0)
    assert output_error(0 * weight, 0 * weight, torch.eye(8)) == 0.0
