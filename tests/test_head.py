"""The loss through the head in chunks: values, gradients, and that logits are never whole."""

import copy
from typing import Any

import checkpoints
import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM

from ternq import losses
from ternq.head import HeadInput, head_of, why_whole
from ternq.linear import prepare
from ternq.losses import Head, head_loss
from ternq.objective import Objective
from ternq.recipe import Scheme, Training

TOKENS, HIDDEN, VOCABULARY = 11, 6, 13
PARTS = ("hidden", "weight", "bias")


def drawn(bias: bool, dtype: torch.dtype) -> tuple[dict[str, Tensor], dict[str, Tensor], Tensor]:
    """Inputs of both heads, and labels of which three do not count."""
    generator = torch.Generator().manual_seed(0)
    shapes = {"hidden": (TOKENS, HIDDEN), "weight": (VOCABULARY, HIDDEN), "bias": (VOCABULARY,)}
    both = []
    for _ in range(2):
        made = {
            n: torch.randn(s, generator=generator, dtype=torch.float64) for n, s in shapes.items()
        }
        both.append({n: t.to(dtype) for n, t in made.items() if bias or n != "bias"})
    labels = torch.randint(VOCABULARY, (TOKENS,), generator=generator)
    labels[[2, 7, 10]] = -100
    return both[0], both[1], labels


def logits(parts: dict[str, Tensor], scale: float = 1.0, cap: float | None = None) -> Tensor:
    product = scale * F.linear(parts["hidden"], parts["weight"], parts.get("bias"))
    return product if cap is None else cap * torch.tanh(product / cap)


def plain(
    own: dict[str, Tensor],
    other: dict[str, Tensor] | None,
    labels: Tensor,
    kl: float,
    ce: float,
    after: tuple[float, float | None] = (1.0, None),
) -> Tensor:
    """The formula written out, for autograd; ``after`` the head come a scale and a cap."""
    kept, log_q = labels >= 0, logits(own, *after).log_softmax(-1)
    loss = ce * -log_q[kept, labels[kept]].mean()
    if other is not None:
        log_p = logits(other, *after).log_softmax(-1)
        loss = loss + kl * (log_p.exp() * (log_p - log_q))[kept].sum(-1).mean()
    return loss


def chunked(
    own: dict[str, Tensor],
    other: dict[str, Tensor] | None,
    labels: Tensor,
    kl: float,
    ce: float,
    after: tuple[float, float | None] = (1.0, None),
    **options: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    head = None if other is None else Head(other["weight"], other.get("bias"), *after)
    hidden = None if other is None else other["hidden"]
    own_head = Head(own["weight"], own.get("bias"), *after)
    return head_loss(own["hidden"], own_head, hidden, head, labels, kl=kl, ce=ce, **options)


@pytest.fixture
def chunk(monkeypatch: pytest.MonkeyPatch) -> int:
    """Four tokens at a time: the last chunk is shorter."""
    monkeypatch.setattr(losses, "CHUNK_BYTES", 4 * 4 * VOCABULARY)
    return 4


@pytest.mark.parametrize(("kl", "ce"), [(1.0, 0.0), (0.0, 1.0), (0.7, 0.3)])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("taught", [True, False])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_values_and_gradients_are_those_of_autograd(
    chunk: int, kl: float, ce: float, bias: bool, taught: bool, dtype: torch.dtype
) -> None:
    own, other, labels = drawn(bias, dtype)
    leaves = {n: t.requires_grad_() for n, t in own.items()}
    loss, *terms = chunked(leaves, other if taught else None, labels, kl, ce)
    (3 * loss).backward()
    exact = {n: t.detach().double().requires_grad_() for n, t in own.items()}
    teacher = {n: t.double() for n, t in other.items()} if taught else None
    expected = plain(exact, teacher, labels, kl, ce)
    (3 * expected).backward()
    close = 1e-12 if dtype == torch.float64 else 2e-6
    assert loss.item() == pytest.approx(expected.item(), rel=close)
    assert terms[0].item() == pytest.approx(plain(exact, teacher, labels, 1, 0).item(), rel=close)
    assert terms[1].item() == pytest.approx(plain(exact, None, labels, 0, 1).item(), rel=close)
    for name, leaf in leaves.items():
        assert leaf.grad is not None and leaf.grad.dtype == dtype
        torch.testing.assert_close(leaf.grad.double(), exact[name].grad, rtol=close, atol=close)


@pytest.mark.parametrize("after", [(0.3, None), (1.0, 1.5), (2.0, 1.5)])
def test_logits_may_be_scaled_and_bounded(chunk: int, after: tuple[float, float | None]) -> None:
    own, other, labels = drawn(True, torch.float64)
    leaves = [tensor.requires_grad_() for tensor in own.values()]
    loss = chunked(own, other, labels, 0.7, 0.3, after)[0]
    expected = plain(own, other, labels, 0.7, 0.3, after)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-12)
    found = torch.autograd.grad(loss, leaves)
    torch.testing.assert_close(found, torch.autograd.grad(expected, leaves))


def test_a_frozen_head_gets_no_gradient(chunk: int) -> None:
    own, other, labels = drawn(True, torch.float32)
    own["hidden"].requires_grad_()
    chunked(own, other, labels, 1.0, 0.0)[0].backward()
    assert own["hidden"].grad is not None and own["weight"].grad is None


def test_no_token_that_counts_is_no_loss(chunk: int) -> None:
    own, other, labels = drawn(True, torch.float32)
    own["hidden"].requires_grad_()
    loss = chunked(own, other, torch.full_like(labels, -100), 1.0, 1.0)[0]
    loss.backward()
    assert own["hidden"].grad is not None and not own["hidden"].grad.any() and loss.item() == 0


def test_a_second_backward_pass_is_refused(chunk: int) -> None:
    own, other, labels = drawn(False, torch.float32)
    own["hidden"].requires_grad_()
    loss = chunked(own, other, labels, 1.0, 0.0)[0]
    (2 * loss).backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_bf16_products_are_near_those_of_float32(chunk: int) -> None:
    own, other, labels = drawn(True, torch.float32)
    found = []
    for dtype in (torch.bfloat16, torch.float32):
        leaves = {n: t.clone().requires_grad_() for n, t in own.items()}
        with torch.autocast("cpu", torch.bfloat16):
            loss = chunked(leaves, other, labels, 0.5, 0.5, dtype=dtype)[0]
        loss.backward()
        found.append([loss.detach(), *(leaf.grad for leaf in leaves.values())])
    for rough, exact in zip(*found, strict=True):
        assert rough.dtype == torch.float32
        torch.testing.assert_close(rough, exact, rtol=0.05, atol=0.02)
        assert not torch.equal(rough, exact)


class Largest(TorchDispatchMode):
    """Counts the elements of the largest tensor that any operation makes."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        made = result if isinstance(result, tuple | list) else [result]
        sizes = [t.numel() for t in made if isinstance(t, Tensor)]
        self.elements = max(self.elements, *sizes, 0)
        return result


def test_logits_are_never_whole(chunk: int) -> None:
    own, other, labels = (drawn(True, torch.float32)[i] for i in range(3))
    for tensor in own.values():
        tensor.requires_grad_()
    with Largest() as seen:
        chunked(own, other, labels, 1.0, 1.0)[0].backward()
    assert seen.elements == max(VOCABULARY * HIDDEN, chunk * VOCABULARY) < TOKENS * VOCABULARY
    with Largest() as seen:
        plain(own, other, labels, 1.0, 1.0).backward()
    assert seen.elements == TOKENS * VOCABULARY  # what the count would have told


# --- models ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["llama", "llama-tied-bias", "opt", "gpt2", "gpt-neox", "phi"])
def test_the_input_of_the_head_gives_the_logits(kind: str) -> None:
    model, ids = checkpoints.model(kind), torch.arange(10).view(2, 5)
    assert why_whole(model) is None
    with torch.no_grad():
        expected = model(input_ids=ids).logits
        with HeadInput(model) as head:
            model(input_ids=ids)
        assert torch.equal(head_of(model).logits(head.hidden), expected)
        assert torch.equal(model(input_ids=ids).logits, expected)  # it leaves no trace
    assert "forward" not in vars(model.get_output_embeddings())


CHANGING = {
    "Gemma2Config": {"final_logit_softcapping": 0.05, "head_dim": 12},  # of logits around 0.1
    "GraniteConfig": {"logits_scaling": 3.0},
    "CohereConfig": {"logit_scale": 0.3},
}


def changing(name: str) -> Any:
    """A model that scales or bounds its logits after its head."""
    torch.manual_seed(0)
    config = getattr(transformers, name)(**checkpoints.LLAMA | CHANGING[name])
    return AutoModelForCausalLM.from_config(config).eval()


@pytest.mark.parametrize("name", CHANGING)
def test_what_a_model_does_to_its_logits_is_known(name: str) -> None:
    model, ids = changing(name), torch.arange(10).view(2, 5)
    assert why_whole(model) is None
    expected = model(input_ids=ids).logits
    with HeadInput(model) as head:
        model(input_ids=ids)
    torch.testing.assert_close(head_of(model).logits(head.hidden), expected)
    assert not torch.allclose(F.linear(head.hidden, head_of(model).weight), expected, rtol=0.01)


def test_logits_that_are_changed_otherwise_are_found_out() -> None:
    model = changing("GraniteConfig")
    model.config.logits_scaling = 2.0
    assert why_whole(model) is None  # the model reads it there, too
    forward = model.forward

    def shifted(*args: Any, **kwargs: Any) -> Any:
        output = forward(*args, **kwargs)
        output.logits = output.logits + 1
        return output

    model.forward = shifted
    assert why_whole(model) == "the model changes logits after the head"


def objective(model: Any, head_learns: bool = False, **settings: Any) -> Objective:
    student = copy.deepcopy(model)
    prepare(student, Scheme(group_size=16))
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.mul_(1.1)
    if not head_learns:
        student.get_output_embeddings().requires_grad_(False)
    training = Training(**{"off": 1.0, "kl": 0.5, "ce": 0.25} | settings)
    made = Objective(
        student, model.requires_grad_(False), training, torch.autocast("cpu", enabled=False)
    )
    return made.train()


def loss_and_gradients(made: Objective) -> dict[str, Tensor]:
    ids = torch.arange(20).view(2, 10) * 7 % checkpoints.VOCABULARY
    loss, terms = made(ids)
    loss.backward()
    named = made.student.named_parameters()
    return {n: p.grad for n, p in named if p.grad is not None} | terms


@pytest.mark.parametrize("head_learns", [True, False])
@pytest.mark.parametrize("kind", ["llama", "llama-tied-bias", "phi", "gpt2", *CHANGING])
def test_a_step_is_that_of_whole_logits(kind: str, head_learns: bool) -> None:
    found = []
    for whole in (None, "asked for"):
        model = changing(kind) if kind in CHANGING else checkpoints.model(kind)
        made = objective(model, head_learns)
        assert made.whole is None
        made.whole = whole
        found.append(loss_and_gradients(made))
    assert found[0].keys() == found[1].keys()
    for name, value in found[0].items():
        torch.testing.assert_close(value, found[1][name], rtol=1e-4, atol=1e-6, msg=name)


def test_with_recomputed_activations_it_is_the_same() -> None:
    found = []
    for recompute in (False, True):
        made = objective(checkpoints.model("llama"), head_learns=True)
        if recompute:
            made.student.gradient_checkpointing_enable({"use_reentrant": False})
        found.append(loss_and_gradients(made))
    for name, value in found[0].items():
        torch.testing.assert_close(value, found[1][name])


def test_a_model_that_changes_its_logits_learns_from_them() -> None:
    made = objective(changing("Gemma2Config"), off=0.0, kl=1.0, ce=0.0)
    ids = torch.arange(10).view(2, 5)
    expected = made.student(input_ids=ids).logits[:, :-1].log_softmax(-1)
    (teacher,) = made._teacher
    log_p = teacher(input_ids=ids).logits[:, :-1].log_softmax(-1)
    divergence = (log_p.exp() * (log_p - expected)).sum(-1).mean()
    assert made(ids)[0].item() == pytest.approx(divergence.item(), rel=1e-5)


def test_no_logits_are_whole_in_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a vocabulary that outgrows every other tensor of the step."""
    config = transformers.LlamaConfig(**checkpoints.LLAMA | {"vocab_size": 3000})
    torch.manual_seed(0)
    made = objective(AutoModelForCausalLM.from_config(config))
    ids = torch.arange(200).view(2, 100)
    monkeypatch.setattr(losses, "CHUNK_BYTES", 4 * 3000 * 16)
    sizes = []
    for made.whole in (None, "asked for"):
        with Largest() as seen:
            made(ids)[0].backward()
        sizes.append(seen.elements)
    assert sizes == [3000 * 36, 2 * 100 * 3000]  # the head's weight; all logits
