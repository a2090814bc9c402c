"""Rounding by pieces, in another type, compiled; and one rounding for several passes."""

import gc
import weakref
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from test_train import batch, close, gradients, trainer
from torch import Tensor, nn

from ternq import rounding, ternary
from ternq.linear import TernaryLinear, rounded_once, ternary_layers
from ternq.recipe import Scheme

SHAPES = [(3, 8, 4), (7, 10, 4), (4, 7, 7), (5, 3, 8), (1, 1, 1), (9, 576, 128)]


def drawn(rows: int, columns: int, size: int, shift: bool = True) -> list[Tensor | None]:
    generator = torch.Generator().manual_seed(0)
    groups = (rows, ternary.n_groups(columns, size))
    made = [torch.randn(s, generator=generator) for s in ((rows, columns), groups, groups)]
    return [*made[:2], made[2] if shift else None]


@pytest.mark.parametrize("held", [1, 20, 10**6])  # weights in a piece: a row, some, all
@pytest.mark.parametrize("shift", [True, False])
@pytest.mark.parametrize(("rows", "columns", "size"), SHAPES)
def test_pieces_change_nothing(
    monkeypatch: pytest.MonkeyPatch, held: int, shift: bool, rows: int, columns: int, size: int
) -> None:
    weight, scale, offset = drawn(rows, columns, size, shift)
    assert weight is not None and scale is not None
    gradient = torch.randn(rows, columns, generator=torch.Generator().manual_seed(1))
    codes = rounding.quantize(weight, size)
    expected = rounding.straight_through(gradient, codes, scale, size, "ttq")
    monkeypatch.setattr(rounding, "_CACHED", held)
    assert torch.equal(rounding.quantize(weight, size), codes)
    value, own = rounding.rounded(weight, scale, offset, size)
    assert torch.equal(own, codes)
    assert torch.equal(value, ternary.dequantize(codes, scale, offset, size))
    found = rounding.straight_through(gradient, codes, scale, size, "ttq")
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True) if a is not None)


def test_it_is_rounded_to_another_type_once() -> None:
    weight, scale, shift = drawn(9, 576, 128)
    assert weight is not None and scale is not None and shift is not None
    leaves = [t.clone().requires_grad_() for t in (weight, scale, shift)]
    value = rounding.fake_quantize(*leaves, 128, dtype=torch.bfloat16)
    exact = ternary.dequantize(rounding.quantize(weight, 128), scale, shift, 128)
    assert torch.equal(value, exact.bfloat16())
    outer = torch.randn(9, 576, generator=torch.Generator().manual_seed(2)).bfloat16()
    value.backward(outer)
    again = [t.clone().requires_grad_() for t in (weight, scale, shift)]
    rounding.fake_quantize(*again, 128).backward(outer.float())
    for a, b in zip(leaves, again, strict=True):  # sums are made in float32
        assert a.grad is not None and b.grad is not None and torch.equal(a.grad, b.grad)


def test_a_latent_weight_of_bf16_is_worked_in_float32() -> None:
    weight, scale, shift = drawn(9, 576, 128)
    assert weight is not None and scale is not None
    rough = weight.bfloat16().requires_grad_()
    value = rounding.fake_quantize(rough, scale, shift, 128)
    assert torch.equal(value, rounding.fake_quantize(rough.float(), scale, shift, 128))
    value.sum().backward()
    assert rough.grad is not None and rough.grad.dtype == torch.bfloat16


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_weight_that_is_not_finite_is_seen(bad: float) -> None:
    weight, scale, shift = drawn(2, 8, 4)
    assert weight is not None and scale is not None
    weight[0, 1] = bad
    value = rounding.fake_quantize(weight, scale, shift, 4)
    assert torch.isnan(value[0, :4]).all() and torch.isfinite(value[0, 4:]).all()
    assert torch.isfinite(value[1]).all()


@pytest.mark.parametrize("ste", ["identity", "ttq"])
def test_the_compiler_can_trace_it(ste: str) -> None:
    """With the one backend that needs no C++ compiler; what a GPU's makes of it is not seen."""
    weight, scale, shift = drawn(9, 576, 128)
    assert weight is not None and scale is not None
    compiled: Any = torch.compile(rounding._rounded, backend="aot_eager", fullgraph=True)
    value, codes = compiled(weight, scale, shift, 128, torch.bfloat16)
    expected = rounding.rounded(weight, scale, shift, 128, torch.bfloat16)
    assert torch.equal(value, expected[0]) and torch.equal(codes, expected[1])
    compiled = torch.compile(rounding._gradients, backend="aot_eager", fullgraph=True)
    wanted = (True, True, True)
    found = compiled(value, codes, scale, 128, ste, torch.float32, wanted)
    same = rounding.straight_through(value, codes, scale, 128, ste)
    for a, b in zip(found, same, strict=True):
        assert a is not None and b is not None and torch.equal(a, b)


# --- one rounding for several passes --------------------------------------------------------------


@pytest.fixture
def roundings(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """A list that grows with every rounding of a weight."""
    made: list[int] = []
    rounded = rounding.rounded
    monkeypatch.setattr(rounding, "rounded", lambda *a, **k: (made.append(1), rounded(*a, **k))[1])
    return made


def test_a_weight_is_rounded_once_in_a_step(tmp_path: Path, roundings: list[int]) -> None:
    made = trainer(tmp_path, micro_batch_size=1)
    layers = len(ternary_layers(made.student))
    roundings.clear()  # those of the look at the head
    made.accumulate(batch())
    assert len(roundings) == layers
    made.accumulate(batch())
    assert len(roundings) == 2 * layers  # anew in every step
    checkpointed = trainer(tmp_path, micro_batch_size=2, gradient_checkpointing=True)
    roundings.clear()
    checkpointed.accumulate(batch())
    assert len(roundings) == 2 * 2 * layers  # forward and recomputed, for both micro batches


@pytest.mark.parametrize("ste", ["identity", "ttq"])
@pytest.mark.parametrize("shift", [True, False])
def test_gradients_are_those_of_a_rounding_in_every_pass(
    tmp_path: Path, ste: str, shift: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    scheme, settings = Scheme(group_size=16, shift=shift), {"micro_batch_size": 1, "ste": ste}
    once = gradients(trainer(tmp_path, scheme=scheme, **settings), batch())
    monkeypatch.setattr("ternq.train.rounded_once", lambda _: nullcontext())
    close(once, gradients(trainer(tmp_path, scheme=scheme, **settings), batch()), 1e-6)


def test_bf16_gradients_are_summed_in_float32() -> None:
    torch.manual_seed(0)
    layer = TernaryLinear(64, 8, bias=False, group_size=16, shift=True)
    inputs = torch.randn(50, 3, 64)
    with torch.autocast("cpu", torch.bfloat16):
        with rounded_once(layer):
            for x in inputs:
                layer(x).square().sum().backward()
        once = [p.grad.clone() for p in layer.parameters() if p.grad is not None]
        layer.zero_grad()
        for x in inputs:
            layer(x).square().sum().backward()
    each = [p.grad for p in layer.parameters() if p.grad is not None]
    assert len(once) == 3
    for a, b in zip(once, each, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-4)


def test_what_does_not_learn_gets_no_gradient() -> None:
    layer = TernaryLinear(32, 4, bias=True, group_size=16, shift=True)
    layer.weight.requires_grad_(False)
    other = TernaryLinear(32, 4, bias=True, group_size=16, shift=True)
    other.requires_grad_(False)
    with rounded_once(nn.ModuleList([layer, other])):
        (layer(torch.ones(2, 32)) + other(torch.ones(2, 32))).sum().backward()
    assert layer.weight.grad is None and layer.weight_scale.grad is not None
    assert all(p.grad is None for p in other.parameters())


def test_a_failure_leaves_the_layers_as_they_were() -> None:
    layer = TernaryLinear(32, 4, bias=False, group_size=16, shift=False)
    with pytest.raises(RuntimeError, match="on the way"), rounded_once(layer):
        layer(torch.ones(1, 32)).sum().backward()
        raise RuntimeError("on the way")
    assert layer.once is None and layer.weight.grad is None


@pytest.mark.parametrize("graded", [True, False])
def test_nothing_of_it_stays_behind(graded: bool) -> None:
    """A rounded weight goes with the layer, though garbage is not looked for."""
    layer = TernaryLinear(32, 4, bias=False, group_size=16, shift=True)
    gone = weakref.ref(layer)
    gc.disable()
    try:
        with torch.set_grad_enabled(graded), rounded_once(layer):
            output = layer(torch.ones(1, 32)).sum()
            if graded:
                output.backward()
        del output, layer
        assert gone() is None
    finally:
        gc.enable()
