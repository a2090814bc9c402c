"""Safetensors written tensor by tensor: shards of any size, and never more than one tensor held.

safetensors' own writer wants all tensors of a file at once. Here names, types and shapes are known
first (the layout); from them follow the shards, their headers and every tensor's place, so tensors
may come in any order. A file is what safetensors itself would write of the same tensors, to the
byte (tests compare).
"""

import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ternq import checkpoint, files
from ternq.files import write_json

Layout = Mapping[str, tuple[torch.dtype, tuple[int, ...]]]
"""Name -> type and shape of every tensor that will come."""


class TensorWriter:
    """Writes ``model.safetensors``, or shards with their index, into a folder.

    Use it as a context; leaving it without an error checks that all tensors came. ``digests`` has
    the SHA-256 of every tensor's bytes as they were given.

    Raises:
        ValueError: a tensor that the layout lacks or has otherwise, that comes twice, or not at
            all.
    """

    def __init__(self, folder: Path, layout: Layout, shard_bytes: int | None = None) -> None:
        self.folder = folder
        self.digests: dict[str, bytes] = {}
        self._layout = layout
        self._shards = _shards(layout, shard_bytes or checkpoint.SHARD_BYTES)
        count = len(self._shards)
        names = [f"model-{i:05}-of-{count:05}.safetensors" for i in range(1, count + 1)]
        self._names = [checkpoint.TENSORS] if count == 1 else names
        self._place: dict[str, tuple[Path, int]] = {}

    def __enter__(self) -> "TensorWriter":
        for name, shard in zip(self._names, self._shards, strict=True):
            header, places = _header({n: self._layout[n] for n in shard})
            path = self.folder / name
            path.write_bytes(header)
            self._place |= {n: (path, len(header) + begin) for n, begin in places.items()}
        return self

    def write(self, name: str, tensor: Tensor) -> None:
        """Put one tensor in its place."""
        expected = self._layout.get(name)
        if expected != (tensor.dtype, tuple(tensor.shape)) or name in self.digests:
            raise ValueError(f"{name} {tensor.dtype} {[*tensor.shape]} is not awaited: {expected}")
        data = tensor_bytes(tensor)
        self.digests[name] = hashlib.sha256(data).digest()
        path, offset = self._place[name]
        with path.open("r+b") as file:  # one at a time: there may be more shards than handles
            file.seek(offset)
            file.write(data)

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None:
            return
        for name in self._names:
            files.sync(self.folder / name)
        missing = [name for name in self._layout if name not in self.digests]
        if missing:
            raise ValueError(f"{missing[0]} was never written")
        if len(self._shards) > 1:
            where = {n: f for f, s in zip(self._names, self._shards, strict=True) for n in s}
            total = sum(map(_size, self._layout.values()))
            index = {"metadata": {"total_size": total}, "weight_map": where}
            write_json(self.folder / checkpoint.INDEX, index)


def write_tensors(
    folder: Path, layout: Layout, tensor: Callable[[str], Tensor], shard_bytes: int | None = None
) -> dict[str, bytes]:
    """Write every tensor of a layout, asked for one by one; returns the SHA-256 of each."""
    with TensorWriter(folder, layout, shard_bytes) as writer:
        for name in layout:
            writer.write(name, tensor(name))
    return writer.digests


def tensor_bytes(tensor: Tensor) -> Any:
    """The bytes of a tensor as safetensors stores them: row-major, little-endian."""
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy()


def _shards(layout: Layout, limit: int) -> list[list[str]]:
    """Names by shard, in order; a shard over the limit holds one tensor."""
    shards: list[list[str]] = [[]]
    room = limit
    for name, entry in layout.items():
        if shards[-1] and _size(entry) > room:
            shards.append([])
            room = limit
        shards[-1].append(name)
        room -= _size(entry)
    return shards


def _header(layout: Layout) -> tuple[bytes, dict[str, int]]:
    """The header of one file, and where in its data each tensor begins: wide types first."""
    order = list(checkpoint.DTYPES)
    content: dict[str, object] = {"__metadata__": {"format": "pt"}}
    places, at = {}, 0
    for name in sorted(layout, key=lambda n: (order.index(layout[n][0]), n)):
        dtype, shape = layout[name]
        end = at + _size(layout[name])
        content[name] = {
            "dtype": checkpoint.DTYPES[dtype],
            "shape": [*shape],
            "data_offsets": [at, end],
        }
        places[name], at = at, end
    text = json.dumps(content, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text, places


def _size(entry: tuple[torch.dtype, tuple[int, ...]]) -> int:
    dtype, shape = entry
    return int(torch.Size(shape).numel()) * dtype.itemsize
