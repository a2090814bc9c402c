"""TriLM's rule: the formula written out in float64, its gradient, and the layer that uses it."""

import math
from typing import Any

import pytest
import torch
from torch import nn

from ternq import absmean
from ternq.errors import RecipeError
from ternq.linear import AbsmeanLinear, TernaryLinear, prepare, settled, ternary_layers
from ternq.recipe import Scheme


def matrix(rows: int, columns: int, seed: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    spread = 10.0 ** torch.randint(-4, 3, (rows, 1), generator=generator)
    return (torch.randn(rows, columns, generator=generator, dtype=torch.float64) * spread).to(dtype)


def brute(weight: torch.Tensor) -> tuple[float, list[list[int]]]:
    """gamma = 1e-5 + mean |W|; codes round(min(max(W / gamma, -1), 1)): Spectra's words."""
    values = [[float(x) for x in row] for row in weight.double()]
    flat = [x for row in values for x in row]
    gamma = 1e-5 + math.fsum(map(abs, flat)) / len(flat)
    return gamma, [[round(min(max(x / gamma, -1), 1)) for x in row] for row in values]


@pytest.mark.parametrize("shape", [(1, 1), (3, 5), (16, 128), (40, 7)])
@pytest.mark.parametrize("seed", range(5))
def test_codes_and_scale_are_the_formula(shape: tuple[int, int], seed: int) -> None:
    weight = matrix(*shape, seed, torch.float64)
    gamma, codes = brute(weight)
    assert float(absmean.scale(weight)) == pytest.approx(gamma, rel=1e-12)
    assert absmean.quantize(weight).int().tolist() == codes
    expected = gamma * torch.tensor(codes, dtype=torch.float64)
    assert torch.allclose(absmean.fake_quantize(weight), expected, rtol=1e-12)


def test_codes_in_float32_differ_only_at_the_threshold() -> None:
    weight = matrix(64, 256, 0)
    gamma, codes = brute(weight)
    away = (weight.double().abs() / gamma - 0.5).abs() > 1e-5
    assert bool(away.float().mean() > 0.99)
    assert torch.equal(absmean.quantize(weight)[away], torch.tensor(codes)[away].float())


def test_the_threshold_is_half_the_scale() -> None:
    weight = torch.tensor([[4.0, 0.0, 0.0, 1.0, 1.1, -1.3, -0.9, 0.7]])  # mean 1.125
    assert absmean.quantize(weight).tolist() == [[1, 0, 0, 1, 1, -1, -1, 1]]
    weight[0, 7] = 0.5
    assert absmean.quantize(weight).tolist() == [[1, 0, 0, 1, 1, -1, -1, 0]]


def test_weights_that_are_all_zero_are_not_divided_by_zero() -> None:
    weight = torch.zeros(2, 3)
    assert float(absmean.scale(weight)) == pytest.approx(1e-5)
    assert not absmean.fake_quantize(weight).any()


def test_the_gradient_goes_straight_through() -> None:
    weight = matrix(6, 10, 1).requires_grad_(True)
    given = torch.randn(6, 10, generator=torch.Generator().manual_seed(2))
    absmean.fake_quantize(weight).backward(given)
    assert weight.grad is not None
    assert torch.equal(weight.grad, given)  # no mask, also where the weight is beyond the scale


def layer(in_features: int = 10, out_features: int = 6, bias: bool = True) -> AbsmeanLinear:
    torch.manual_seed(0)
    dense = nn.Linear(in_features, out_features, bias=bias)
    scheme = Scheme(group_size=16, shift=False, method="absmean")
    return AbsmeanLinear.from_dense(dense, scheme)


def test_the_layer_is_the_product_with_the_ternary_weight() -> None:
    made = layer()
    x = torch.randn(3, 10, requires_grad=True)
    y = made(x)
    assert made.bias is not None
    numbers = made.numbers()
    assert torch.allclose(y, x @ numbers.dequantized().t() + made.bias, atol=1e-6)
    y.sum().backward()
    assert made.weight.grad is not None
    ones = torch.ones(3, 6)
    assert torch.allclose(made.weight.grad, ones.t() @ x.detach())  # (dL/dY)^T X
    assert x.grad is not None
    assert torch.allclose(x.grad, ones @ numbers.dequantized(), atol=1e-6)  # dL/dY W~


def test_only_weight_and_bias_are_parameters_and_the_scale_follows_the_weight() -> None:
    made = layer()
    assert set(dict(made.named_parameters())) == {"weight", "bias"} == set(made.state_dict())
    with torch.no_grad():
        made.weight.mul_(3)
    numbers = made.numbers()
    gamma = float(1e-5 + made.weight.detach().abs().mean())
    assert numbers.shift is None
    assert numbers.scale.shape == (6, 1)
    assert torch.allclose(numbers.scale, torch.full((6, 1), gamma))


def model(*widths: int) -> Any:
    """A model with a linear layer of each width in its one block."""
    made = nn.Module()
    made.blocks = nn.ModuleList([nn.ModuleList([nn.Linear(w, 4) for w in widths])])
    return made


def test_a_group_is_the_widest_row_and_there_is_no_shift() -> None:
    made = model(10, 24)
    scheme = settled(made, Scheme(method="absmean"))
    assert (scheme.group_size, scheme.shift) == (24, False)
    assert settled(made, scheme) == scheme
    prepare(made, scheme)
    layers = ternary_layers(made)
    assert {type(m) for m in layers.values()} == {AbsmeanLinear}
    assert all(m.numbers().scale.shape == (4, 1) for m in layers.values())


def test_other_methods_are_settled_as_they_are() -> None:
    assert settled(model(10), Scheme(group_size=3)) == Scheme(group_size=3)
    made = model(10)
    prepare(made, Scheme(group_size=3))
    assert [type(m) for m in ternary_layers(made).values()] == [TernaryLinear]
    assert not prepare(model(10), Scheme(method="float")).chosen


def test_a_group_size_beside_absmean_is_refused() -> None:
    with pytest.raises(RecipeError, match="one scale a matrix; --group-size 5"):
        settled(model(10, 24), Scheme(method="absmean", group_size=5))
