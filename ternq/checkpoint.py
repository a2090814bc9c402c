"""Tensors of a model on disk: safetensors, one file or shards, read lazily and without trust.

This is the one door to safetensors. No other format is read, so no file can run code. Folders are
published by `ternq.publish`, single files written by `ternq.files`.
"""

import contextlib
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TypeGuard

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ternq.errors import InputError, ResourceError
from ternq.files import REFUSALS, parse_json, plain_name, read_json, renamed

TENSORS = "model.safetensors"
INDEX = "model.safetensors.index.json"
SHARD_BYTES = 5 * 10**9
_MAX_HEADER = 100_000_000  # safetensors' own limit


def save_tensors(tensors: Mapping[str, Tensor], path: Path) -> None:
    """Write one safetensors file, atomically. Tensors may be views; each is stored whole."""
    plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    try:
        with renamed(path) as temporary:
            save_file(_separate(plain), temporary, {"format": "pt"})
            temporary.chmod(0o666 & ~_umask())  # safetensors makes its files private
    except SafetensorError as error:
        raise _write_error(path, error) from error


def load_tensors(path: Path) -> dict[str, Tensor]:
    """All tensors of one safetensors file; `InputError` naming it if missing or damaged."""
    with _opened(path, check=True) as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


class TensorFolder:
    """The tensors of a model folder, sharded or not, read one at a time; headers are checked.

    ``file`` names one file of the folder instead. Raises `InputError` if the folder has no
    safetensors, or a file is damaged.
    """

    def __init__(self, folder: Path, file: str | None = None) -> None:
        self.folder = folder
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.dtypes: dict[str, torch.dtype] = {}
        self._files: dict[str, Path] = {}
        for path in [folder / file] if file else _tensor_files(folder):
            with _opened(path, check=True) as opened:
                for name in opened.keys():  # noqa: SIM118
                    if name in self._files:
                        raise InputError(f"{path} and {self._files[name]} both hold {name}.")
                    self._files[name] = path
                    piece = opened.get_slice(name)
                    self.shapes[name] = tuple(piece.get_shape())
                    self.dtypes[name] = _dtype(path, piece.get_dtype())

    def __contains__(self, name: str) -> bool:
        return name in self._files

    def __iter__(self) -> Iterator[str]:
        return iter(self._files)

    @property
    def files(self) -> set[Path]:
        """The files that hold tensors."""
        return set(self._files.values())

    def path(self, name: str) -> Path:
        """The file that holds a tensor; `InputError` if none does."""
        if name not in self._files:
            raise InputError(f"{self.folder} holds no tensor {name}.")
        return self._files[name]

    def rows(self, name: str, first: int, last: int) -> Tensor:
        """Rows ``first`` to ``last - 1`` of a tensor; the others are not read."""
        with _opened(self.path(name)) as file:
            part: Tensor = file.get_slice(name)[first:last]
            return part

    def __getitem__(self, name: str) -> Tensor:
        with _opened(self.path(name)) as file:
            tensor: Tensor = file.get_tensor(name)
            return tensor


DTYPES = {  # as safetensors names them, in the order in which it stores them
    torch.int64: "I64",
    torch.float64: "F64",
    torch.float32: "F32",
    torch.int32: "I32",
    torch.uint32: "U32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


def _dtype(path: Path, name: str) -> torch.dtype:
    found = next((dtype for dtype, own in DTYPES.items() if own == name), None)
    if found is None:
        raise InputError(f"{path} holds tensors of type {name}, which ternq does not read.")
    return found


def dtype_name(dtype: torch.dtype) -> str:
    """``bfloat16`` for ``torch.bfloat16``: the name that config.json uses."""
    return str(dtype).removeprefix("torch.")


def _tensor_files(folder: Path) -> list[Path]:
    if (folder / TENSORS).is_file():
        return [folder / TENSORS]
    if not (folder / INDEX).is_file():
        raise InputError(f"{folder} holds neither {TENSORS} nor {INDEX}.")
    where = read_json(folder / INDEX).get("weight_map")
    names = sorted(set(where.values())) if _is_names(where) else []
    if not names or not all(plain_name(name) for name in names):
        raise InputError(f"{folder / INDEX} is damaged: it does not name files of its folder.")
    return [folder / name for name in names]


def _is_names(where: Any) -> TypeGuard[dict[str, str]]:
    return isinstance(where, dict) and all(isinstance(v, str) for v in where.values())


@contextlib.contextmanager
def _opened(path: Path, *, check: bool = False) -> Iterator[Any]:
    """A safetensors file; ``check`` reads its header a second time, with our eyes."""
    try:
        if not path.is_file():
            raise InputError(f"{path} does not exist.")
        if check:
            _check_header(path)
        with safe_open(path, framework="pt") as file:
            yield file
    except SafetensorError as error:
        raise InputError(f"{path} is damaged: {_first_lower(error)}.") from error
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror or error}.") from error


def _check_header(path: Path) -> None:
    """Refuse a header that names a tensor twice: safetensors itself takes the last of them."""
    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        if not 2 <= size <= min(_MAX_HEADER, path.stat().st_size - 8):
            raise InputError(f"{path} is damaged: its header has an impossible length.")
        parse_json(file.read(size), path)


def _separate(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same tensors with no two sharing memory, which safetensors refuses."""
    seen: set[int] = set()
    for name, tensor in tensors.items():
        pointer = tensor.untyped_storage().data_ptr()
        whole = tensor.untyped_storage().nbytes() == tensor.nbytes
        tensors[name] = tensor.clone() if pointer in seen or not whole else tensor
        seen.add(pointer)
    return tensors


def _write_error(path: Path, error: SafetensorError) -> ResourceError:
    found = re.search(r"os error (\d+)", str(error))
    reason = REFUSALS.get(int(found[1])) if found else None
    return ResourceError(f"{path} cannot be written: {reason or _first_lower(error)}.")


def _first_lower(error: Exception) -> str:
    text = str(error).rstrip(".")
    return text[:1].lower() + text[1:]


def _umask() -> int:
    mask = os.umask(0o022)
    os.umask(mask)
    return mask
