"""The C kernels for latent weights: against plain formulas, torch's way, and one another."""

import pytest
import torch
from conftest import ISAS
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ternq import kernels, rounding, ternary
from ternq.kernels import native

TYPES = [torch.float32, torch.bfloat16, torch.float16]
SHAPES = [(1, 1, 1), (3, 8, 4), (5, 3, 8), (7, 100, 17), (9, 576, 128), (2, 70000, 70000)]
BOTH = (True, True, True)


def drawn(rows: int, columns: int, size: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    groups = rows, ternary.n_groups(columns, size)
    weight = torch.randn(rows, columns, generator=generator)
    return weight, *(torch.randn(groups, generator=generator) for _ in range(2))


def expected_codes(weight: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Codes by the definition in float64, and which weights lie clear of their threshold."""
    codes, clear = torch.zeros(weight.shape, dtype=torch.int8), torch.ones_like(weight).bool()
    for row, values in enumerate(weight.double()):
        for first in range(0, len(values), size):
            part = slice(first, first + size)
            threshold = 0.7 * values[part].abs().mean()
            codes[row, part] = values[part].sign() * (values[part].abs() > threshold)
            clear[row, part] = (values[part].abs() - threshold).abs() > 1e-5 * threshold
    return codes, clear


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize(("rows", "columns", "size"), SHAPES)
def test_codes_and_values_are_those_of_the_definition(
    lib: native.Native, isa: str, rows: int, columns: int, size: int, dtype: torch.dtype
) -> None:
    weight, scale, shift = drawn(rows, columns, size)
    weight = weight.to(dtype)
    wanted, clear = expected_codes(weight, size)
    assert clear.float().mean() > 0.99
    assert torch.equal(lib.quantize(weight, size)[clear], wanted[clear])
    for offset in (shift, None):
        for of in TYPES:
            value, codes = lib.rounded(weight, scale, offset, size, of)
            assert torch.equal(codes, lib.quantize(weight, size))
            assert torch.equal(value, ternary.dequantize(codes, scale, offset, size).to(of))


@pytest.mark.parametrize("ttq", [False, True])
@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize(("rows", "columns", "size"), SHAPES)
def test_gradients_are_those_of_autograd(
    lib: native.Native,
    isa: str,
    rows: int,
    columns: int,
    size: int,
    dtype: torch.dtype,
    ttq: bool,
) -> None:
    """Of ``scale * code + shift`` for scale and shift; of the weight, of its surrogate."""
    weight, scale, shift = drawn(rows, columns, size)
    outer = drawn(rows, columns, size, seed=1)[0].to(dtype)
    codes = rounding.quantize(weight, size)
    leaves = [scale.double().requires_grad_(), shift.double().requires_grad_()]
    per_weight = [t.repeat_interleave(size, 1)[:, :columns] for t in leaves]
    (per_weight[0] * codes + per_weight[1]).backward(outer.double())
    own = outer.double() * (torch.where(codes != 0, per_weight[0], 1.0) if ttq else 1.0)
    for of in TYPES:
        found = lib.descend(outer, codes, scale, size, ttq, of, BOTH)
        assert found[0] is not None and found[0].dtype == of
        torch.testing.assert_close(found[0], own.detach().float().to(of), rtol=1e-6, atol=1e-6)
        for sums, leaf in zip(found[1:], leaves, strict=True):
            assert sums is not None and leaf.grad is not None
            torch.testing.assert_close(sums.double(), leaf.grad, rtol=1e-4, atol=1e-4 * size**0.5)


def test_only_what_is_wanted_is_made(lib: native.Native) -> None:
    weight, scale, _ = drawn(9, 576, 128)
    codes = rounding.quantize(weight, 128)
    whole = lib.descend(weight, codes, scale, 128, True, torch.bfloat16, BOTH)
    for wanted in [(a, b, c) for a in (0, 1) for b in (0, 1) for c in (0, 1)]:
        asked = tuple(map(bool, wanted))
        found = lib.descend(weight, codes, scale, 128, True, torch.bfloat16, asked)  # type: ignore[arg-type]
        for one, of, is_asked in zip(found, whole, asked, strict=True):
            assert (one is not None) == is_asked
            assert one is None or (of is not None and torch.equal(one, of))
    same = lib.descend(weight, codes, scale, 128, False, torch.float32, BOTH)[0]
    assert same is not None and same.data_ptr() == weight.data_ptr()  # nothing is copied


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 40), st.integers(1, 300), st.integers(1, 400), st.integers(0, 10**6))
def test_every_instruction_set_and_number_of_threads_gives_the_same_bits(
    lib: native.Native, rows: int, columns: int, size: int, seed: int
) -> None:
    weight, scale, shift = drawn(rows, columns, size, seed)
    outer = drawn(rows, columns, size, seed + 1)[0]
    threads, found = torch.get_num_threads(), []
    try:
        for name in ISAS:
            if not lib.use_isa(name):
                continue
            for count in (1, 2):
                torch.set_num_threads(count)
                made = lib.rounded(weight, scale, shift, size, torch.bfloat16)
                gradients = lib.descend(outer, made[1], scale, size, True, torch.float32, BOTH)
                found.append((*made, *gradients))
    finally:
        torch.set_num_threads(threads)
        lib.use_isa(None)
    for one in found[1:]:
        for a, b in zip(found[0], one, strict=True):
            assert a is not None and b is not None and torch.equal(a, b)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf"), 3e38])
def test_a_group_that_is_not_finite_has_no_codes(lib: native.Native, isa: str, bad: float) -> None:
    weight, scale, shift = drawn(2, 8, 4)
    weight[0, 1] = weight[0, 2] = bad  # two of the largest floats are no float together
    value, codes = lib.rounded(weight, scale, shift, 4, torch.float32)
    assert torch.isnan(value[0, :4]).all() and not codes[0, :4].any()
    assert torch.isfinite(value[0, 4:]).all() and torch.isfinite(value[1]).all()


def test_odd_tensors(lib: native.Native) -> None:
    """Views that are not contiguous, or begin at an odd byte; none, and scales of another type."""
    weight, scale, shift = drawn(6, 40, 8)
    expected = lib.rounded(weight, scale, shift, 8, torch.float32)
    across = lib.rounded(weight.t().contiguous().t(), scale.t().contiguous().t(), shift, 8,
                         torch.float32)  # fmt: skip
    raw = torch.empty(4 * weight.numel() + 1, dtype=torch.uint8)
    raw[1:] = weight.view(torch.uint8).flatten()
    odd = torch.frombuffer(raw.numpy(), dtype=torch.float32, offset=1, count=weight.numel())
    shifted = lib.rounded(odd.view(6, 40), scale, shift, 8, torch.float32)
    for found in (across, shifted):
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert lib.quantize(torch.empty(0, 8), 4).shape == (0, 8)
    sums = lib.descend(weight, expected[1], scale.double(), 8, False, torch.float32, BOTH)
    assert sums[1] is not None and sums[1].dtype == torch.float64


def test_sizes_out_of_bounds_are_refused(lib: native.Native) -> None:
    with pytest.raises(ValueError, match="sizes"):
        lib.quantize(torch.zeros(2, 8), 0)


def test_torch_does_it_where_it_is_asked_to(monkeypatch: pytest.MonkeyPatch) -> None:
    """And comes to the same: sums of other order move a threshold by a last bit."""
    weight, scale, shift = drawn(64, 576, 128)
    found = rounding.rounded(weight, scale, shift, 128)
    monkeypatch.setattr(native.Native, "rounded", None)
    monkeypatch.setattr(native.Native, "descend", None)
    with kernels.using("torch"):
        plain = rounding.rounded(weight, scale, shift, 128)
        gradients = rounding.straight_through(weight, plain[1], scale, 128, "ttq")
    assert (found[1] != plain[1]).sum() <= 1
    assert all(g is not None for g in gradients)
    same = found[1] == plain[1]
    assert torch.equal(found[0][same], plain[0][same])
