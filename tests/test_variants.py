"""The ways to round and to compare features that `bench/ablation.py` puts in the place of ternq's.

An ablation that measured something else than it says would be worse than none.
"""

import sys
from pathlib import Path

import pytest
import torch
from test_pack import student
from torch import Tensor, nn

from ternq import objective, rounding, ternary, train
from ternq.linear import TernaryLinear, prepare
from ternq.losses import off_per_block
from ternq.recipe import Scheme, Training

sys.path.insert(0, str(Path(__file__).parents[1] / "bench"))
import variants  # noqa: E402  # found by the line before

SIZE = 16


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def layer(columns: int = 50, shift: bool = True) -> TernaryLinear:
    dense = nn.Linear(columns, 6, bias=False)
    dense.weight = nn.Parameter(drawn(6, columns))
    return TernaryLinear.from_dense(dense, Scheme(group_size=SIZE, shift=shift))


@pytest.mark.parametrize("columns", [48, 50])
def test_twns_threshold_is_what_ternq_does(columns: int) -> None:
    given = [drawn(6, columns), drawn(6, 4)[:, : -(-columns // SIZE)] + 2]
    given.append(drawn(*given[1].shape, seed=1))
    found = []
    for codes in (None, variants.threshold(0.7)):
        with variants.instead(codes):
            own = [t.clone().requires_grad_() for t in given]
            value = rounding.fake_quantize(*own, SIZE, "identity", torch.float32)
            gradients = torch.autograd.grad(value, own, drawn(6, columns, seed=2))
            found.append([rounding.quantize(own[0], SIZE), value, *gradients])
    for expected, made in zip(*found, strict=True):
        torch.testing.assert_close(made, expected)


def test_the_other_thresholds_group_by_group() -> None:
    w = drawn(6, 50) + 0.3
    for share, centred in ((0.5, False), (0.9, False), (0.7, True)):
        with variants.instead(variants.threshold(share, centred=centred)):
            found = rounding.quantize(w, SIZE)
        for first in range(0, 50, SIZE):
            part = w[:, first : first + SIZE]
            part = part - part.mean(1, keepdim=True) if centred else part
            expected = part.sign() * (part.abs() > share * part.abs().mean(1, keepdim=True))
            assert torch.equal(found[:, first : first + SIZE].float(), expected)


def test_seq_has_three_levels_and_its_gradients() -> None:
    alpha, w = torch.tensor([[2.0]]), torch.tensor([[-1.99, -0.7, -0.6, 0.1, 0.7, 1.9, 2.5]])
    w.requires_grad_()
    scale = (alpha / 1.5).requires_grad_()
    value = variants.seq(w, scale, None, 7, "identity", torch.float32)
    level = 4 / 3
    expected = torch.tensor([[-level, -level, 0, 0, level, level, level]])
    torch.testing.assert_close(value, expected)  # zeros below a third of alpha
    g = torch.arange(1.0, 8.0).unsqueeze(0)
    to_w, to_scale = torch.autograd.grad(value, (w, scale), g)
    assert to_w.tolist() == [[0, 2, 3, 4, 5, 6, 0]]  # nothing beyond 0.99 alpha
    inside = sum(float(g[0, i] * (expected[0, i] - w.detach()[0, i]) / 2) for i in range(1, 6))
    to_alpha = (inside - 1 + 7) / 7**0.5  # the sign outside, over the root of the weights
    assert float(to_scale) == pytest.approx(1.5 * to_alpha, rel=1e-5)  # alpha is 1.5 scales


def test_seq_begins_at_the_largest_weight() -> None:
    with variants.instead(variants.seq_codes, variants.seq, fit=variants.seq_scale):
        own = layer(shift=False)
        w = own.weight.detach()
        for group, first in enumerate(range(0, 50, SIZE)):
            part = w[:, first : first + SIZE]
            largest = part.abs().amax(1)
            torch.testing.assert_close(own.weight_scale[:, group], largest / 1.5)
            nonzero = part.abs() > largest.unsqueeze(1) / 3
            assert torch.equal(own.codes()[:, first : first + SIZE] != 0, nonzero)
            used = variants.seq(w, own.weight_scale, None, SIZE, "", torch.float32)
        torch.testing.assert_close(
            used.detach(), ternary.dequantize(own.codes(), own.weight_scale, None, SIZE).detach()
        )


def test_tequila_adds_the_dead_weights_to_the_output() -> None:
    own, x = layer(), drawn(3, 50, seed=3)
    usual = own(x)
    with variants.instead(forward=variants.tequila_forward):
        found = own(x)
    dead = own.codes() == 0
    bias = 1e-3 * (own.weight * dead).sum(1)
    torch.testing.assert_close(found, usual + bias)
    g = drawn(3, 6, seed=4)
    (expected,) = torch.autograd.grad(usual, own.weight, g, retain_graph=True)
    (made,) = torch.autograd.grad(found, own.weight, g)
    torch.testing.assert_close(made, expected + 1e-3 * dead * g.sum(0).unsqueeze(1))


def test_features_and_first_scales() -> None:
    student, teacher = drawn(2, 3, 5), drawn(2, 3, 5, seed=1)
    with variants.instead(features=variants.squared_features):
        found = objective.off_per_block(list(student), list(teacher))
    squares = [(student - teacher)[i].square().mean() / teacher[i].square().mean() for i in (0, 1)]
    torch.testing.assert_close(found, torch.stack(squares))
    with variants.instead(features=variants.last_feature):
        found = objective.off_per_block(list(student), list(teacher))
    torch.testing.assert_close(found, off_per_block(student[-1:], teacher[-1:]))
    with variants.instead(fit=variants.mean_scale):
        own = layer()
    rest = own.weight.detach()[:, 48:].abs().mean(1)
    torch.testing.assert_close(own.weight_scale[:, 3].detach(), rest)
    assert own.weight_shift is not None and not own.weight_shift.any()


def test_ternqs_own_is_back_afterwards() -> None:
    before = (rounding.quantize, rounding.fake_quantize, ternary.fit, TernaryLinear.forward)
    with variants.instead(variants.seq_codes, fit=variants.seq_scale,
                          forward=variants.tequila_forward):  # fmt: skip
        assert rounding.quantize is not before[0]
        model = nn.Module()
        model.layers = nn.ModuleList([nn.Sequential(nn.Linear(32, 4))])
        prepare(model, Scheme(group_size=SIZE, shift=False))
    after = (rounding.quantize, rounding.fake_quantize, ternary.fit, TernaryLinear.forward)
    assert after == before


@pytest.mark.parametrize("kind", ["llama", "llama-tied"])
def test_embeddings_and_head_learn_at_their_own_rate(kind: str) -> None:
    model = student(kind)
    with variants.embeddings_learn(0.5):
        groups = train.optimizer(model, Training(train="scales", lr=0.1)).param_groups
    own = groups[-1]
    assert own["lr"] == own["peak_lr"] == 0.5 and own["weight_decay"] == 0
    ends = [model.get_input_embeddings().weight, model.get_output_embeddings().weight]
    assert {id(p) for p in own["params"]} == {id(p) for p in ends}
    assert all(p.requires_grad for p in ends)
    before = train.optimizer(model, Training(train="scales", lr=0.1)).param_groups
    assert len(before) == len(groups) - 1 and not any(p.requires_grad for p in ends)
