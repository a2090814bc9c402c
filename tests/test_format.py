"""docs/format.md is true: its hex dump is what ternq writes, and its reader reads it."""

import re
from pathlib import Path
from typing import Any

import golden
import numpy as np
import pytest
import torch
from torch import Tensor

from ternq import checkpoint, rounding, ternary
from ternq.files import read_json
from ternq.pack import verify
from ternq.packing import pack_base3, unpack_base3
from ternq.source import open_artefact

PAGE = Path(__file__).parents[1].joinpath("docs", "format.md").read_text(encoding="utf-8")
CODES = torch.tensor([[1, 0, -1, 0, 0, 1, 1], [-1, -1, 0, 1, 0, 0, -1]], dtype=torch.int8)
SCALE = torch.tensor([[0.5, 0.25], [1, 0.125]], dtype=torch.float16)
SHIFT = torch.tensor([[0, -0.25], [0.0625, 0]], dtype=torch.float16)
WEIGHT = [[0.5, 0, -0.5, 0, -0.25, 0, 0], [-0.9375, -0.9375, 0.0625, 1.0625, 0, 0, -0.125]]


def block(language: str) -> str:
    found = re.search(rf"```{language}\n(.*?)```", PAGE, re.DOTALL)
    assert found
    return found[1]


def layer(codes: Tensor, scale: Tensor, shift: Tensor | None) -> dict[str, Tensor]:
    tensors = {"q.weight": pack_base3(codes), "q.weight_scale": scale}
    return tensors if shift is None else {**tensors, "q.weight_shift": shift}


def reader() -> Any:
    names: dict[str, Any] = {}
    exec(block("python"), names)
    return names["read"]


def test_the_example_is_in_the_stored_form() -> None:
    form = ternary.canonical(CODES, SCALE, SHIFT, 4)
    assert all(
        a is not None and torch.equal(a, b)
        for a, b in zip(form, (CODES, SCALE, SHIFT), strict=True)
    )


def test_hex_dump_is_what_ternq_writes(tmp_path: Path) -> None:
    lines = [line.split(":", 1)[1][:49] for line in block("hexdump").splitlines()]
    dump = bytes.fromhex("".join(lines))
    checkpoint.save_tensors(layer(CODES, SCALE, SHIFT), tmp_path / "x.safetensors")
    assert (tmp_path / "x.safetensors").read_bytes() == dump
    (tmp_path / "y.safetensors").write_bytes(dump)
    stored = checkpoint.load_tensors(tmp_path / "y.safetensors")
    codes = unpack_base3(stored["q.weight"], 7, check=True)
    weight = ternary.dequantize(codes, stored["q.weight_scale"], stored["q.weight_shift"], 4)
    assert weight.tolist() == WEIGHT
    assert reader()(tmp_path / "y.safetensors", "q", 7, 4).tolist() == WEIGHT


@pytest.mark.parametrize("with_shift", [True, False])
@pytest.mark.parametrize(("columns", "group_size"), [(5, 5), (576, 128), (33, 16), (7, 100)])
def test_the_reader_of_the_page(
    tmp_path: Path, columns: int, group_size: int, with_shift: bool
) -> None:
    torch.manual_seed(0)
    dense = torch.randn(6, columns)
    codes = rounding.quantize(dense, group_size)
    fitted = ternary.fit(dense, codes, group_size, with_shift)
    stored = ternary.canonical(codes, *fitted, group_size)
    checkpoint.save_tensors(layer(*stored), tmp_path / "x.safetensors")
    weight = reader()(tmp_path / "x.safetensors", "q", columns, group_size)
    assert np.allclose(weight, ternary.dequantize(*stored, group_size), rtol=1e-6, atol=1e-7)


# --- golden files ---------------------------------------------------------------------------------


def test_the_golden_artefact_is_read_for_ever() -> None:
    checked = verify(golden.FOLDER)
    assert checked["verify"]["checked"] == 7
    source = open_artefact(golden.FOLDER)
    read = reader()
    for number, (name, weight) in enumerate(source.layers()):
        columns, rows = source.size(name)
        codes, scale, shift = golden.numbers(rows, columns, number)
        assert weight.same(ternary.TernaryWeight(codes, scale, shift, golden.GROUP_SIZE))
        plain = read(golden.FOLDER / checkpoint.TENSORS, name, columns, golden.GROUP_SIZE)
        assert np.array_equal(plain, weight.dequantized().numpy())


def test_the_golden_artefact_is_written_again_to_the_byte(tmp_path: Path) -> None:
    golden.make(tmp_path / "again")
    folders = (golden.FOLDER, tmp_path / "again")
    ours, theirs = ((folder / checkpoint.TENSORS).read_bytes() for folder in folders)
    assert ours == theirs
    ours, theirs = (read_json(folder / "config.json") for folder in folders)
    for key in ("quantization_config", "auto_map", "dtype"):  # others are transformers' own
        assert ours[key] == theirs[key]
