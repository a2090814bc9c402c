"""The streaming writer writes what safetensors itself writes, whatever the order of tensors."""

import resource
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from ternq import checkpoint
from ternq.files import read_json
from ternq.writer import TensorWriter, write_tensors

TENSORS = {
    "b": torch.arange(6, dtype=torch.float32).view(2, 3),
    "a": torch.arange(3, dtype=torch.int64),
    "codes": torch.tensor([[1, 2, 3]], dtype=torch.uint8),
    "scale": torch.tensor([[0.5]], dtype=torch.float16),
    "c": torch.tensor(3.0, dtype=torch.bfloat16),
    "int8": torch.tensor([-3, 4], dtype=torch.int8),
    "empty": torch.zeros(0, 4),
    "flag": torch.tensor([True, False, True]),
    "wide": torch.zeros(2, dtype=torch.float64),
}
LAYOUT = {name: (t.dtype, tuple(t.shape)) for name, t in TENSORS.items()}


@pytest.mark.parametrize("order", [list(TENSORS), list(reversed(TENSORS))])
def test_a_file_is_that_of_safetensors_to_the_byte(tmp_path: Path, order: list[str]) -> None:
    save_file(TENSORS, tmp_path / "theirs.safetensors", {"format": "pt"})
    with TensorWriter(tmp_path, LAYOUT) as writer:
        for name in order:
            writer.write(name, TENSORS[name])
    ours = (tmp_path / checkpoint.TENSORS).read_bytes()
    assert ours == (tmp_path / "theirs.safetensors").read_bytes()


def test_shards_and_their_index(tmp_path: Path) -> None:
    write_tensors(tmp_path, LAYOUT, TENSORS.__getitem__, shard_bytes=24)
    folder = checkpoint.TensorFolder(tmp_path)
    assert set(folder) == set(TENSORS)
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    for name, tensor in TENSORS.items():
        assert torch.equal(folder[name], tensor) and folder[name].dtype == tensor.dtype
    index = read_json(tmp_path / checkpoint.INDEX)
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in TENSORS.values())
    for file in set(index["weight_map"].values()):
        here = {n for n, where in index["weight_map"].items() if where == file}
        assert set(load_file(tmp_path / file)) == here


def test_more_shards_than_open_files(tmp_path: Path) -> None:
    layout = {f"t{i}": (torch.uint8, (1,)) for i in range(40)}
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (30, limits[1]))
    try:
        write_tensors(tmp_path, layout, lambda _: torch.ones(1, dtype=torch.uint8), shard_bytes=1)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    assert len(list(tmp_path.glob("*.safetensors"))) == 40


def test_views_are_written_whole(tmp_path: Path) -> None:
    whole = torch.arange(12, dtype=torch.int32).view(3, 4)
    with TensorWriter(tmp_path, {"x": (torch.int32, (4, 3))}) as writer:
        writer.write("x", whole.t())
    assert torch.equal(checkpoint.load_tensors(tmp_path / checkpoint.TENSORS)["x"], whole.t())


def test_only_what_is_awaited_is_taken_and_all_of_it(tmp_path: Path) -> None:
    layout = {"x": (torch.float32, (2,)), "y": (torch.float32, (1,))}
    with (
        pytest.raises(ValueError, match="y was never written"),
        TensorWriter(tmp_path, layout) as writer,
    ):
        writer.write("x", torch.zeros(2))
        for name, tensor in (
            ("x", torch.zeros(2)),
            ("y", torch.zeros(2)),
            ("y", torch.zeros(1, dtype=torch.float16)),
            ("z", torch.zeros(1)),
        ):
            with pytest.raises(ValueError, match="not awaited"):
                writer.write(name, tensor)
