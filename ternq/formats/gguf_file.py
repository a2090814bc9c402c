"""The header of a GGUF file, read without gguf-py: that one stops at a type it does not know.

A file is ``GGUF``, version, counts; keys with values; names, shapes, types and offsets of tensors;
and from a multiple of the alignment on, their data. Everything is little-endian. Shapes stand with
the columns first. Source: ``docs/gguf.md`` of ggml and ``gguf_reader.py`` of gguf-py 0.19.
"""

import math
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from ternq.errors import InputError

MAGIC = b"GGUF"
_SCALARS = dict(zip((0, 1, 2, 3, 4, 5, 6, 7, 10, 11, 12), "BbHhIif?Qqd", strict=True))
_STRING, _ARRAY = 8, 9
_I8 = 24
Q2_0 = 42  # the type's id, which gguf-py 0.19 does not know
_SINGLE_DIGITS = ("smollm", "starcoder", "refact", "codeshell", "command-r")
_DEPTH = 4  # of arrays in arrays
_MOST = 2**26  # items of an array, letters of a string
_LARGEST_ALIGNMENT = 2**16
_DENSEST = 8  # weights in a byte, at most: the smallest types take 1.5 bits for one


@dataclass(frozen=True)
class Entry:
    """A tensor of the file: its type's id, shape as torch has it, and where its data begins."""

    type: int
    shape: tuple[int, ...]
    offset: int


class Header:
    """Keys and tensors of a GGUF file.

    Raises:
        InputError: it is none, of another version or byte order, or damaged.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.fields: dict[str, Any] = {}
        self.tensors: dict[str, Entry] = {}
        try:
            self._size = path.stat().st_size
            with path.open("rb") as file:
                self._read(file)
        except (struct.error, UnicodeDecodeError, EOFError) as error:
            raise InputError(f"{path} is damaged: its header cannot be read.") from error
        except OSError as error:
            raise InputError(f"{path} cannot be read: {error.strerror}.") from error

    def data(self, name: str, size: int) -> Tensor:
        """So many bytes of a tensor: uint8 ``[rows, bytes]``, rows as the shape has them."""
        entry = self.tensors[name]
        rows = math.prod(entry.shape[:-1])
        if entry.offset + size > self._size:
            raise InputError(f"{self.path} is damaged: it ends inside of {name}.")
        raw = bytearray(size)
        with self.path.open("rb") as file:
            file.seek(entry.offset)
            file.readinto(raw)
        if not raw:
            return torch.zeros(rows, 0, dtype=torch.uint8)
        return torch.frombuffer(raw, dtype=torch.uint8).reshape(rows, -1)

    @property
    def cuts_digits(self) -> bool:
        """Whether its tokenizer cuts numbers into digits before it does anything else."""
        return self.fields.get("tokenizer.ggml.pre") in _SINGLE_DIGITS

    def without_data(self, path: Path) -> None:
        """Write a file with the same keys whose tensors, by the same names, are one byte each.

        Programs that read the keys alone take it for the file itself.
        """
        with self.path.open("rb") as file:
            file.seek(self._keys[0])
            keys = file.read(self._keys[1] - self._keys[0])
        infos = b"".join(
            _packed_string(name) + struct.pack("<IQIQ", 1, 1, _I8, 0) for name in self.tensors
        )
        counts = struct.pack("<IQQ", self._version, len(self.tensors), len(self.fields))
        text = MAGIC + counts + keys + infos
        path.write_bytes(text + bytes(-len(text) % self._alignment + self._alignment))

    def _read(self, file: BinaryIO) -> None:
        if file.read(4) != MAGIC:
            raise InputError(f"{self.path} is not a GGUF file: it does not begin with 'GGUF'.")
        self._version = _number(file, "I")
        if self._version not in (2, 3):
            raise InputError(
                f"{self.path} is of a version or byte order of GGUF that is not read here."
            )
        tensors, keys = _number(file, "Q"), _number(file, "Q")
        begin = file.tell()
        for _ in range(self._counted(keys)):
            name = self._string(file)
            self.fields[name] = self._value(file, _number(file, "I"), 0)
        if len(self.fields) != keys:
            raise InputError(f"{self.path} is damaged: it has a key twice.")
        self._keys = (begin, file.tell())
        found = dict(self._infos(file, self._counted(tensors)))
        if len(found) != tensors:
            raise InputError(f"{self.path} is damaged: it has a tensor twice.")
        self._alignment = self._checked_alignment()
        start = file.tell() + -file.tell() % self._alignment
        for name, entry in found.items():
            self.tensors[name] = Entry(entry.type, entry.shape, start + entry.offset)

    def _checked_alignment(self) -> int:
        found = self.fields.get("general.alignment", 32)
        if type(found) is not int or not 0 < found <= _LARGEST_ALIGNMENT or found & (found - 1):
            raise InputError(f"{self.path} is damaged: its alignment is no small power of two.")
        return found

    def _infos(self, file: BinaryIO, count: int) -> Iterator[tuple[str, Entry]]:
        for _ in range(count):
            name = self._string(file)
            sizes = [_number(file, "Q") for _ in range(self._counted(_number(file, "I")))]
            if not 0 < len(sizes) <= 4 or not 0 < math.prod(sizes) <= _DENSEST * self._size:
                raise InputError(f"{self.path} is damaged: {name} has an impossible shape.")
            kind, offset = _number(file, "I"), _number(file, "Q")
            yield name, Entry(kind, tuple(reversed(sizes)), offset)

    def _value(self, file: BinaryIO, kind: int, depth: int) -> Any:
        if kind in _SCALARS:
            return _number(file, _SCALARS[kind])
        if kind == _STRING:
            return self._string(file)
        if kind != _ARRAY or depth == _DEPTH:
            raise InputError(f"{self.path} is damaged: it has a value of unknown type {kind}.")
        inner, count = _number(file, "I"), self._counted(_number(file, "Q"))
        if inner in _SCALARS:
            form = f"<{count}{_SCALARS[inner]}"
            self._counted(struct.calcsize(form))
            return list(struct.unpack(form, file.read(struct.calcsize(form))))
        return [self._value(file, inner, depth + 1) for _ in range(count)]

    def _string(self, file: BinaryIO) -> str:
        length = self._counted(_number(file, "Q"))
        text = file.read(length)
        if len(text) != length:
            raise EOFError
        return text.decode("utf-8")

    def _counted(self, count: int) -> int:
        """A count, which no file has more of than bytes, and no header very many."""
        if count > min(self._size, _MOST):
            raise InputError(f"{self.path} is damaged: it counts {count} where it has fewer.")
        return count


def _number(file: BinaryIO, form: str) -> Any:
    return struct.unpack(f"<{form}", file.read(struct.calcsize(f"<{form}")))[0]


def _packed_string(text: str) -> bytes:
    raw = text.encode("utf-8")
    return struct.pack("<Q", len(raw)) + raw
