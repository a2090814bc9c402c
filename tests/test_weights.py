"""What is told of every ternary layer, against weights worked out by hand."""

import pytest
import tiny
import torch
from torch import nn

from ternq.linear import TernaryLinear
from ternq.modeling_ternq import PackedLinear
from ternq.packing import pack_base3
from ternq.recipe import Scheme
from ternq.weights import layer_diagnostics

DENSE = torch.tensor([[3.0, 0.0, -4.0, 0.0], [0.0, 0.0, 0.0, 12.0]])
CODES = torch.tensor([[1, 0, -1, 0], [0, 0, 0, 1]], dtype=torch.int8)
SCALE = torch.tensor([[3.0], [12.0]])  # off by 1 in one place: error 1, norm 13
SHIFT = torch.tensor([[0.0], [0.5]])  # and by 0.5 in four


def dense() -> nn.Module:
    layer = nn.Linear(4, 2, bias=False)
    layer.weight = nn.Parameter(DENSE.clone())
    return nn.ModuleDict({"a": layer})


def packed(shift: bool) -> nn.Module:
    layer = PackedLinear(4, 2, bias=False, group_size=4, shift=shift)
    layer.weight.copy_(pack_base3(CODES))
    layer.weight_scale.copy_(SCALE)
    if layer.weight_shift is not None:
        layer.weight_shift.copy_(SHIFT)
    return nn.ModuleDict({"a": layer})


def in_training(shift: bool) -> nn.Module:
    layer = TernaryLinear(4, 2, bias=False, group_size=4, shift=shift)
    layer.weight = nn.Parameter(CODES.float())
    layer.weight_scale = nn.Parameter(SCALE.clone())
    layer.weight_shift = nn.Parameter(SHIFT.clone()) if shift else None
    return nn.ModuleDict({"a": layer})


@pytest.mark.parametrize("kind", [packed, in_training])
@pytest.mark.parametrize(("shift", "error"), [(False, 1 / 13), (True, 2**0.5 / 13)])
def test_error_and_zero_share_are_those_by_hand(kind: type, shift: bool, error: float) -> None:
    [found] = layer_diagnostics(kind(shift), dense())
    assert found == {"name": "a", "zero_share": 5 / 8, "error": pytest.approx(error)}


@pytest.mark.parametrize(
    "other",
    [
        None,
        nn.ModuleDict({"b": nn.Linear(4, 2)}),
        nn.ModuleDict({"a": nn.Embedding(4, 2)}),
        nn.ModuleDict({"a": nn.Linear(3, 2)}),
    ],
)
def test_no_error_is_told_without_a_layer_to_compare(other: nn.Module | None) -> None:
    [found] = layer_diagnostics(packed(False), other)
    assert found["error"] is None
    assert found["zero_share"] == 5 / 8


def test_a_layer_of_zeros_has_no_relative_error() -> None:
    zeros = dense()
    nn.init.zeros_(zeros["a"].weight)  # type: ignore[index]
    assert layer_diagnostics(packed(False), zeros)[0]["error"] is None


def test_every_ternary_layer_of_a_model_is_told_in_order() -> None:
    model, teacher = tiny.model(), tiny.model()
    layers = model.model.layers[0]
    for part in (layers.self_attn, layers.mlp):
        for name, layer in list(part.named_children()):
            if isinstance(layer, nn.Linear):
                setattr(part, name, TernaryLinear.from_dense(layer, Scheme(group_size=8)))
    found = layer_diagnostics(model, teacher)
    names = [n for n, m in model.named_modules() if isinstance(m, TernaryLinear)]
    assert [layer["name"] for layer in found] == names and len(names) == 7
    modules, dense = dict(model.named_modules()), dict(teacher.named_modules())
    for layer in found:
        ternary, wanted = modules[layer["name"]], dense[layer["name"]].weight.detach()
        weight = ternary.numbers().dequantized()
        assert layer["error"] == pytest.approx(float((weight - wanted).norm() / wanted.norm()))
        assert 0.2 < layer["error"] < 0.8  # what 8 numbers of a normal lose to three values
