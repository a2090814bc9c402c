"""Softened rounding against the plain formula, its limits, and autograd."""

import math
from dataclasses import replace

import checkpoints
import pytest
import torch
from torch import Tensor

from ternq import blocks, reconstruct, rounding, softened
from ternq.errors import RecipeError
from ternq.linear import ternary_layers
from ternq.precision import products
from ternq.recipe import Scheme, Training
from ternq.student import student_of
from ternq.ternary import dequantize, grouped, ungrouped

SETTINGS = Training(reconstruction_softened=0.5)


def drawn(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def plain(w: Tensor, scale: Tensor, shift: Tensor, size: int, s: float) -> Tensor:
    """The formula as it is quoted, a group at a time."""
    columns = []
    for group, first in enumerate(range(0, w.shape[1], size)):
        part = w[:, first : first + size]
        u = part / (1.4 * part.detach().abs().mean(1, keepdim=True))
        f = (torch.tanh(s * (u - 0.5)) + torch.tanh(s * (u + 0.5))) / (2 * math.tanh(s))
        columns.append(f * scale[:, group, None] + shift[:, group, None])
    return torch.cat(columns, 1)


@pytest.mark.parametrize("hardness", [0.5, 8.0, 30.0])
@pytest.mark.parametrize("columns", [64, 50])
def test_value_and_gradients_are_those_of_the_formula(hardness: float, columns: int) -> None:
    groups = -(-columns // 16)
    given = [drawn(6, columns), drawn(6, groups) + 2, drawn(6, groups)]
    found = []
    for function in (plain, softened.soften):
        own = [t.clone().requires_grad_() for t in given]
        value = function(*own, 16, hardness)
        found.append([value, *torch.autograd.grad(value, own, drawn(6, columns))])
    for expected, made in zip(*found, strict=True):
        torch.testing.assert_close(made, expected, rtol=1e-4, atol=1e-5)


def test_a_small_hardness_leaves_weights_and_a_large_one_gives_codes() -> None:
    w, scale, shift = drawn(8, 64), drawn(8, 4) + 2, drawn(8, 4)
    soft = softened.soften(w, scale, shift, 16, 1e-2)
    unit = 1.4 * grouped(w, 16).abs().mean(2, keepdim=True)
    linear = ungrouped(grouped(w, 16) / unit * scale[:, :, None] + shift[:, :, None], 64)
    torch.testing.assert_close(soft, linear, rtol=1e-3, atol=1e-3)
    hard = dequantize(rounding.quantize(w, 16), scale, shift, 16)
    torch.testing.assert_close(softened.soften(w, scale, shift, 16, 1e4), hard)


def test_the_derivative_is_that_of_the_closed_form() -> None:
    """tanh(x) + tanh(y) = sinh(x + y) / (cosh x cosh y), in double precision."""
    u = drawn(100).double().requires_grad_()
    s = 8.0
    f = torch.sinh(2 * s * u) / (torch.cosh(s * (u - 0.5)) * torch.cosh(s * (u + 0.5)))
    f = f / (2 * math.tanh(s))
    value, slope = softened.codes(u.detach(), s)
    torch.testing.assert_close(value, f.detach(), rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(slope, torch.autograd.grad(f.sum(), u)[0], rtol=1e-5, atol=1e-9)


def test_a_group_of_zeros_stays_what_it_is() -> None:
    value = softened.soften(torch.zeros(1, 8), torch.ones(1, 1), torch.full((1, 1), 3.0), 8, 8.0)
    assert value.tolist() == [[3.0] * 8]


def test_hardness_grows_and_then_codes_are_the_weights_own() -> None:
    found = [softened.hardness(step, 10, SETTINGS) for step in range(10)]
    assert found[:5] == pytest.approx([8.0, 12.4, 16.8, 21.2, 25.6])
    assert found[5:] == [None] * 5
    assert softened.hardness(0, 10, Training()) is None
    with pytest.raises(RecipeError, match="share, 0 to 1"):
        Training(reconstruction_softened=1.5)


def test_a_block_is_trained_softened_and_left_hard(monkeypatch: pytest.MonkeyPatch) -> None:
    dense = checkpoints.model("llama").eval().requires_grad_(False)
    student = student_of(dense, Scheme(group_size=16), SETTINGS)[0].eval()
    own = blocks.decoder_blocks(student)[1]
    ids = torch.arange(64).view(4, 16)
    passing = blocks.Passing(own, own[0].forward)
    calls = blocks.calls_of(student, own, passing, torch.split(ids, 1))[0]
    autocast = products(replace(SETTINGS, dtype="float32"), "cpu")
    targets = [torch.randn_like(call.hidden) for call in calls]
    seen: list[float] = []
    real = softened.soften

    def soften(*args: object) -> Tensor:
        seen.append(args[4])  # type: ignore[arg-type]
        return real(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(softened, "soften", soften)
    settings = replace(SETTINGS, reconstruction_epochs=2)
    before, after, _ = reconstruct.reconstruct(
        own[0], calls, targets, settings, seed=0, autocast=autocast
    )
    layers = ternary_layers(own[0]).values()
    assert after < before
    assert sorted(set(seen)) == pytest.approx([8.0, 13.5, 19.0, 24.5])
    assert len(seen) == 4 * len(layers)
    assert all(layer.hardness is None for layer in layers)
