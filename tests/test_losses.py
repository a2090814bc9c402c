"""Losses against their formulas, torch's own functions, and numbers worked by hand."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from ternq import losses
from ternq.losses import logit_loss, off, off_per_block


def gaussian(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# --- OFF ------------------------------------------------------------------------------------------


def distance(a: list[float], b: list[float]) -> float:
    """1 - cos, in Python."""
    dot = sum(x * y for x, y in zip(a, b, strict=True))
    return 1 - dot / math.sqrt(sum(x * x for x in a) * sum(y * y for y in b))


def test_off_is_the_mean_distance_of_the_tokens() -> None:
    student, teacher = gaussian(2, 3, 5), gaussian(2, 3, 5, seed=1)
    pairs = zip(student.reshape(6, 5).tolist(), teacher.reshape(6, 5).tolist(), strict=True)
    expected = [distance(a, b) for a, b in pairs]
    assert float(off(student, teacher)) == pytest.approx(sum(expected) / 6, abs=1e-6)


def test_off_by_hand() -> None:
    student = torch.tensor([[1.0, 0.0], [1.0, 0.0], [1.0, 1.0]])
    teacher = torch.tensor([[2.0, 0.0], [0.0, 3.0], [-1.0, -1.0]])
    assert float(off(student, teacher)) == pytest.approx((0 + 1 + 2) / 3)


def test_off_sees_directions_only() -> None:
    student, teacher = gaussian(4, 6, 8), gaussian(4, 6, 8, seed=1)
    sizes = torch.rand(4, 6, 1, generator=torch.Generator().manual_seed(2)) + 0.01
    torch.testing.assert_close(off(student * sizes * 1000, teacher), off(student, teacher))
    assert float(off(student, student * 3)) == pytest.approx(0, abs=1e-6)


def test_off_is_computed_in_float32() -> None:
    student, teacher = gaussian(3, 500) * 100, gaussian(3, 500, seed=1) * 100
    value = off(student.half(), teacher.half())
    assert value.dtype == torch.float32
    assert float(value) == pytest.approx(float(off(student, teacher)), abs=1e-3)


def test_off_of_every_block() -> None:
    student = [gaussian(2, 3, 5, seed=s) for s in range(3)]
    teacher = [gaussian(2, 3, 5, seed=s + 9) for s in range(3)]
    values = off_per_block(student, teacher)
    assert values.tolist() == [float(off(s, t)) for s, t in zip(student, teacher, strict=True)]
    with pytest.raises(ValueError, match="shorter"):
        off_per_block(student, teacher[:2])


# --- logits ---------------------------------------------------------------------------------------


def by_torch(
    student: Tensor, teacher: Tensor | None, labels: Tensor, kl: float, ce: float
) -> tuple[Tensor, Tensor, Tensor]:
    """The same three values from torch's own losses and autograd."""
    kept = labels >= 0
    divergence = torch.zeros(())
    if teacher is not None:
        log_q, log_p = student[kept].log_softmax(-1), teacher[kept].log_softmax(-1)
        divergence = F.kl_div(log_q, log_p, reduction="batchmean", log_target=True)
    cross_entropy = F.cross_entropy(student, labels, ignore_index=-100)
    return kl * divergence + ce * cross_entropy, divergence, cross_entropy


@pytest.mark.parametrize(("kl", "ce"), [(1.0, 0.0), (0.0, 1.0), (0.7, 0.3), (2.0, 5.0)])
@pytest.mark.parametrize("chunk", [1, 4, 5, 11, 1000])  # 11 tokens: chunks end inside and outside
@pytest.mark.parametrize("with_teacher", [True, False])
def test_value_and_gradient_are_those_of_torch(
    monkeypatch: pytest.MonkeyPatch, kl: float, ce: float, chunk: int, with_teacher: bool
) -> None:
    monkeypatch.setattr(losses, "CHUNK", chunk)
    labels = torch.randint(13, (11,), generator=torch.Generator().manual_seed(3))
    labels[[2, 7, 10]] = -100
    teacher = gaussian(11, 13, seed=4) * 2 if with_teacher else None
    found = []
    for function in (
        lambda s: logit_loss(s, teacher, labels, kl=kl, ce=ce),
        lambda s: by_torch(s, teacher, labels, kl, ce),
    ):
        student = (gaussian(11, 13, seed=5) * 2).requires_grad_()
        values = function(student)
        (3 * values[0]).backward()
        found.append((*(v.detach() for v in values), student.grad))
    torch.testing.assert_close(found[0], found[1])


def test_equal_logits_diverge_by_nothing() -> None:
    student = gaussian(5, 7).requires_grad_()
    labels = torch.zeros(5, dtype=torch.int64)
    loss, divergence, _ = logit_loss(student, student.detach(), labels)
    loss.backward()
    assert student.grad is not None
    assert float(divergence) == float(loss.detach()) == pytest.approx(0, abs=1e-6)
    assert float(student.grad.abs().max()) < 1e-7


def test_two_tokens_by_hand() -> None:
    student = torch.tensor([[0.0, 0.0], [math.log(3.0), 0.0]])  # q: (1/2, 1/2), (3/4, 1/4)
    teacher = torch.tensor([[math.log(3.0), 0.0], [0.0, 0.0]])  # p: (3/4, 1/4), (1/2, 1/2)
    _, divergence, cross_entropy = logit_loss(student, teacher, torch.tensor([0, 1]))
    first = 0.75 * math.log(1.5) + 0.25 * math.log(0.5)
    second = 0.5 * math.log(2 / 3) + 0.5 * math.log(2.0)
    assert float(divergence) == pytest.approx((first + second) / 2, rel=1e-5)
    assert float(cross_entropy) == pytest.approx((math.log(2) + math.log(4)) / 2, rel=1e-5)


def test_no_token_that_counts_is_no_loss() -> None:
    student = gaussian(3, 4).requires_grad_()
    loss, *_ = logit_loss(student, gaussian(3, 4, seed=1), torch.full((3,), -100), ce=1.0)
    loss.backward()
    assert student.grad is not None
    assert float(loss.detach()) == 0 and not student.grad.any()


def test_half_precision_logits_are_worked_in_float32() -> None:
    student, teacher = gaussian(6, 50) * 5, gaussian(6, 50, seed=1) * 5
    labels = torch.arange(6)
    half = student.bfloat16().requires_grad_()
    loss, *_ = logit_loss(half, teacher.bfloat16(), labels, ce=1.0)
    loss.backward()
    exact = logit_loss(student.bfloat16().float(), teacher.bfloat16().float(), labels, ce=1.0)[0]
    assert half.grad is not None and half.grad.dtype == torch.bfloat16
    assert float(loss.detach()) == pytest.approx(float(exact), rel=1e-6)
