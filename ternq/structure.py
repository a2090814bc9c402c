"""What an artefact may hold: checked before a model is built from it or a tensor is read.

A configuration is a program's input: it says how many layers are built, how large they are, and
which other files and code transformers takes. Here it is compared with the files that are there,
so that no small file can ask for much time or memory, or bring weights that were not checked.
"""

import contextlib
import json
import math
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.modules.module import register_module_module_registration_hook

from ternq import checkpoint
from ternq.errors import VerificationError
from ternq.files import read_json
from ternq.linear import packed_layers
from ternq.publish import refuse_later_config

_LAYERS = re.compile("(num|n)_(hidden_|decoder_)?layers?")
_COUNT = re.compile("^num_(?!.*(embed|token|vocab))|layers?$|blocks|depth|heads|experts|stages")
_SIZE = re.compile("size|^num_|^n_|dim|positions")
_LARGEST_COUNT = 2**14  # of anything that a configuration counts, labels among them
_LARGEST_SIZE = 2**31  # of any dimension that it names
_MODULES = 16  # for each tensor of the file, at most so many modules
_DTYPES = ("float64", "float32", "bfloat16", "float16")
# keys by which transformers loads other weights, or code from the hub ("owner/kernel")
_WEIGHTS_KEYS = ("transformers_weights",)
_CODE_KEYS = tuple(
    f"{start}{kind}_implementation{end}"
    for kind in ("attn", "experts")
    for start, end in (("", ""), ("_", ""), ("_", "_internal"))
)
_ADAPTER = "adapter_config.json"
_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt", ".h5", ".msgpack")


def check(folder: Path, build: Callable[[], nn.Module]) -> None:
    """Refuse an artefact whose configuration, files and tensors do not belong together.

    ``build`` makes its model without memory; it is called once the configuration has been read.

    Raises:
        InputError, VerificationError: it is damaged; the message names the file.
    """
    refuse_later_config(folder)
    tensors = checkpoint.TensorFolder(folder)
    _check_files(folder, tensors)
    count = len(list(tensors))
    check_config(folder / "config.json", count)
    with _bounded(folder, count):
        model = build()
    _check_tensors(folder, tensors, model)


def _check_files(folder: Path, tensors: checkpoint.TensorFolder) -> None:
    """Refuse weights that are not those of the model, and an index that does not tell the truth."""
    if (folder / _ADAPTER).exists():
        raise VerificationError(f"{folder / _ADAPTER} would change the weights when they load.")
    for path in sorted(folder.rglob("[!.]*")):
        if path.suffix.lower() in _WEIGHTS and path not in tensors.files:
            raise VerificationError(f"{path} is none of the model's own weights.")
    if (folder / checkpoint.TENSORS) in tensors.files:
        return
    where = read_json(folder / checkpoint.INDEX)["weight_map"]
    if where != {name: tensors.path(name).relative_to(folder).as_posix() for name in tensors}:
        raise VerificationError(f"{folder / checkpoint.INDEX} does not say where tensors are.")


def check_config(path: Path, tensors: int) -> None:
    """Refuse sizes that no file of this many tensors has, and other sources of weights and code.

    Raises:
        VerificationError: it names what no such model has, or what was not checked.
    """
    config = read_json(path)
    for name, value in _entries(config):
        if name in _WEIGHTS_KEYS or (name in _CODE_KEYS and "/" in json.dumps(value)):
            raise VerificationError(f"{path}: {name} names what was not checked.")
        if isinstance(value, float) and math.isnan(value):
            raise VerificationError(f"{path}: {name} is not a number.")
        if type(value) is int and not _allowed(name, value, tensors):
            raise VerificationError(f"{path}: {name} is {value}; the file has {tensors} tensors.")
    if config.get("dtype", "bfloat16") not in _DTYPES:
        raise VerificationError(f"{path}: dtype is none of {', '.join(_DTYPES)}.")


def _allowed(name: str, value: int, tensors: int) -> bool:
    if _LAYERS.fullmatch(name):
        return 0 <= value <= tensors
    if _COUNT.search(name):
        return 0 <= value <= _LARGEST_COUNT
    if _SIZE.search(name):
        return 0 <= value <= _LARGEST_SIZE
    return abs(value) < 2**63


def _entries(config: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Names and values, those of nested configurations too; an item of a list by its list's."""
    level: list[tuple[str, Any]] = list(config.items())
    while level:
        name, value = level.pop()
        if isinstance(value, dict):
            level += value.items()
        elif isinstance(value, list):
            level += [(name, item) for item in value]
        yield name, value


@contextlib.contextmanager
def _bounded(folder: Path, tensors: int) -> Iterator[None]:
    """Stop the building of a model that has many more modules than the file has tensors.

    Whatever the configuration calls its number of layers: a family that is not known here cannot
    be made to build for hours either.
    """
    left = 1000 + _MODULES * tensors

    def count(*_: Any) -> None:
        nonlocal left
        left -= 1
        if left < 0:
            raise VerificationError(
                f"{folder / 'config.json'} asks for many more layers than the file has tensors."
            )

    handle = register_module_module_registration_hook(count)
    try:
        yield
    finally:
        handle.remove()


def _check_tensors(folder: Path, tensors: checkpoint.TensorFolder, model: nn.Module) -> None:
    """Refuse tensors that are not those of ``model``: names, types and shapes."""
    if not packed_layers(model):
        raise VerificationError(f"{folder} packs no layer.")
    state = model.state_dict()
    parameters = {n for n, p in model.named_parameters() if p.is_floating_point()}
    for name in tensors:
        if name not in state:
            raise VerificationError(f"{folder} holds a tensor that its model lacks: {name}.")
        expected = (state[name].dtype, tuple(state[name].shape))
        found = (tensors.dtypes[name], tensors.shapes[name])
        same_type = found[0] == expected[0] or (name in parameters and found[0].is_floating_point)
        if found[1] != expected[1] or not same_type:
            raise VerificationError(
                f"{tensors.path(name)}: {name} is {_said(*found)}; its configuration asks for "
                f"{_said(*expected)}."
            )
    tied = getattr(model, "all_tied_weights_keys", {})
    for name, source in tied.items():
        if name in tensors and source in tensors:
            raise VerificationError(f"{folder} stores {name} twice: it is tied to {source}.")
    pairs = {**tied, **{source: target for target, source in tied.items()}}
    for name in state:
        if name not in tensors and pairs.get(name, "") not in tensors:
            raise VerificationError(f"{folder} lacks the tensor {name}.")


def _said(dtype: torch.dtype, shape: tuple[int, ...]) -> str:
    return f"{checkpoint.dtype_name(dtype)} {'x'.join(map(str, shape))}"
