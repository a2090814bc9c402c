"""Base-3 packing against golden bytes, a brute-force oracle, and every corrupt byte."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ternq.packing import pack_base3, packed_width, unpack_base3

SHAPES = [(1, 1), (1, 4), (1, 5), (3, 6), (7, 11), (2, 128), (5, 576), (4, 1000), (0, 7), (3, 0)]


def random_codes(rows: int, columns: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-1, 2, (rows, columns), generator=generator).to(torch.int8)


def oracle(row: list[int]) -> list[int]:
    """The definition, digit by digit, with Python integers."""
    padded = row + [0] * (-len(row) % 5)
    return [
        sum((code + 1) * 3 ** (4 - k) for k, code in enumerate(padded[i : i + 5]))
        for i in range(0, len(padded), 5)
    ]


@pytest.mark.parametrize(
    ("codes", "golden"),
    [
        ([-1, -1, -1, -1, -1], [0]),
        ([0, 0, 0, 0, 0], [121]),
        ([1, 1, 1, 1, 1], [242]),
        ([1, -1, -1, -1, -1], [162]),  # the first code is worth 81
        ([-1, -1, -1, -1, 1], [2]),  # the last is worth 1
        ([1], [202]),  # 2*81 + 27 + 9 + 3 + 1: the padding is code 0, digit 1
        ([-1], [40]),
        ([0, 0, 0, 0, 0, -1], [121, 40]),
    ],
)
def test_golden_bytes(codes: list[int], golden: list[int]) -> None:
    packed = pack_base3(torch.tensor([codes], dtype=torch.int8))
    assert packed.dtype == torch.uint8
    assert packed.tolist() == [golden]


def test_every_byte_and_every_five_codes() -> None:
    every = torch.tensor(list(itertools.product((-1, 0, 1), repeat=5)), dtype=torch.int8)
    packed = pack_base3(every)
    assert packed.flatten().tolist() == list(range(243))
    assert torch.equal(unpack_base3(packed, 5, check=True), every)


@pytest.mark.parametrize("shape", SHAPES)
def test_round_trip_and_oracle(shape: tuple[int, int]) -> None:
    codes = random_codes(*shape)
    packed = pack_base3(codes)
    assert packed.shape == (shape[0], packed_width(shape[1]))
    assert packed.tolist() == [oracle(row) for row in codes.tolist()]
    assert torch.equal(unpack_base3(packed, shape[1], check=True), codes)


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 6), st.integers(0, 40), st.integers(0, 2**31))
def test_round_trip_of_any_shape(rows: int, columns: int, seed: int) -> None:
    codes = random_codes(rows, columns, seed)
    assert torch.equal(unpack_base3(pack_base3(codes), columns, check=True), codes)


def test_views_that_are_not_contiguous() -> None:
    codes = random_codes(12, 9)
    assert torch.equal(pack_base3(codes.T), pack_base3(codes.T.contiguous()))
    packed = pack_base3(codes)[::2]
    assert torch.equal(unpack_base3(packed, 9), codes[::2])


@pytest.mark.parametrize("byte", range(243, 256))
def test_bytes_over_242_are_refused(byte: int) -> None:
    packed = pack_base3(random_codes(3, 17))
    packed[1, 2] = byte
    with pytest.raises(ValueError, match=f"byte {byte}"):
        unpack_base3(packed, 17, check=True)


@pytest.mark.parametrize("columns", [1, 2, 3, 4, 6, 9])
@pytest.mark.parametrize("digit", [0, 2])
def test_padding_that_is_not_zero_is_refused(columns: int, digit: int) -> None:
    packed = pack_base3(random_codes(2, columns))
    packed[1, -1] += digit - 1  # the last digit of the last byte is always padding here
    with pytest.raises(ValueError, match="padding"):
        unpack_base3(packed, columns, check=True)


def test_wrong_input_is_refused() -> None:
    with pytest.raises(ValueError, match="-1, 0 or"):
        pack_base3(torch.tensor([[2]], dtype=torch.int8))
    with pytest.raises(ValueError, match="-1, 0 or"):
        pack_base3(torch.tensor([[-2]], dtype=torch.int8))
    with pytest.raises(ValueError, match="int8"):
        pack_base3(torch.zeros(2, 2))
    with pytest.raises(ValueError, match="int8"):
        pack_base3(torch.zeros(4, dtype=torch.int8))
    with pytest.raises(ValueError, match="uint8"):
        unpack_base3(torch.zeros(1, 1, dtype=torch.int8), 5)
    with pytest.raises(ValueError, match="take 2 bytes"):
        unpack_base3(torch.zeros(1, 1, dtype=torch.uint8), 6)
    with pytest.raises(ValueError, match="columns"):
        packed_width(-1)


def test_five_codes_a_byte_is_what_the_bound_allows() -> None:
    assert 3**5 <= 256 < 3**6
    assert [packed_width(n) for n in (0, 1, 5, 6, 576)] == [0, 1, 1, 2, 116]
