"""Formats of other programs: one file each, which writes it and has its consumer read it back.

A format is a function ``export(source, folder, options, progress)`` that writes into an empty
staging folder what the other program loads, has that program's own reader (or, where it is not
installed, ours, which is said) give back every tensor, and compares. It raises `RecipeError` for a
model that the format cannot hold, naming the nearest format that can, and `VerificationError` if
what it reads back is not what it wrote. ``check(source, options)`` raises the first for whatever
can be known from shapes and the first layer, for a plan.
"""

import importlib
from dataclasses import dataclass, field
from typing import Any

MODULES = {
    "dense": "ternq.formats.dense",
    "compressed-tensors": "ternq.formats.compressed",
    "gguf": "ternq.formats.gguf",
    "mlx": "ternq.formats.mlx",
}
"""Name of a format on the command line -> the module that writes it."""


def module(format: str) -> Any:
    """The module of a format, with its ``export`` and ``check``."""
    return importlib.import_module(MODULES[format])


@dataclass(frozen=True)
class Options:
    """How an export may be made.

    ``exact`` refuses any rounding; ``lossy`` allows a format that loses more than one rounding.
    ``encoding`` is a GGUF type, elsewhere the type of what is stored; None: the one that fits.
    """

    exact: bool = False
    lossy: bool = False
    encoding: str | None = None


@dataclass(frozen=True)
class Exported:
    """What was written, and how it was proved.

    ``bits`` counts what the file spends on the ternary layers. ``rounded`` has the largest error of
    each layer in units of its group's scale, of layers that are not exact; ``lost`` the relative
    error (Frobenius norm) of layers where more than one rounding was lost.
    """

    encoding: str
    bits: int
    checked: int
    reader: str
    rounded: dict[str, float] = field(default_factory=dict)
    lost: dict[str, float] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
