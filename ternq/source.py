"""A ternary model on disk, read layer by layer: what can be packed, exported or verified.

Nothing here holds more than one tensor, so that a model of any size passes through. A source knows
which layers are ternary and gives each as numbers (`TernaryWeight`); every other tensor is given as
stored. Where the numbers come from (a run, an artefact, a dense checkpoint that is ternary by
value) only its opener knows.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ternq import checkpoint, hf, packing
from ternq.linear import features
from ternq.proof import stored_names
from ternq.ternary import TernaryWeight


@dataclass(frozen=True)
class Source:
    """A ternary model, layer by layer.

    ``config`` is the model's ``config.json`` without ``quantization_config``; ``base`` the folder
    that holds tokenizer and generation settings. ``modules`` are the names of the ternary linear
    layers, ``others`` the names of all other tensors, in the model's order; ``transposed`` the
    layers that the model holds as ``[in, out]`` (GPT-2's ``Conv1D``). ``dtype`` is that of the
    dense tensors. Tied tensors stand under one name only.
    """

    name: str
    base: Path
    config: Mapping[str, Any]
    modules: tuple[str, ...]
    others: tuple[str, ...]
    group_size: int
    shift: bool
    dtype: torch.dtype
    layer: Callable[[str], TernaryWeight]
    tensor: Callable[[str], Tensor]
    transposed: frozenset[str] = field(default_factory=frozenset)

    def layers(self) -> Iterator[tuple[str, TernaryWeight]]:
        """Name and weight of every ternary layer."""
        return ((name, self.layer(name)) for name in self.modules)


def open_artefact(folder: Path) -> Source:
    """An artefact of ``ternq pack``.

    Raises:
        InputError, VerificationError: it is none, or damaged.
    """
    tensors = checkpoint.TensorFolder(folder)
    config = checkpoint.read_json(folder / "config.json")
    scheme = config.pop("quantization_config")
    model = hf.skeleton(folder)
    linears = {name: model.get_submodule(name) for name in scheme["modules"]}
    parts = stored_names(linears)

    def layer(name: str) -> TernaryWeight:
        scale = tensors[f"{name}.weight_scale"]
        shift = tensors[f"{name}.weight_shift"] if scheme["shift"] else None
        codes = packing.unpack_base3(tensors[f"{name}.weight"], features(linears[name])[0])
        return TernaryWeight(codes, scale, shift, scheme["group_size"])

    return Source(
        name=folder.name,
        base=folder,
        config=config,
        modules=tuple(linears),
        others=tuple(name for name in tensors if name not in parts),
        group_size=scheme["group_size"],
        shift=scheme["shift"],
        dtype=getattr(torch, config.get("dtype", "bfloat16")),
        layer=layer,
        tensor=tensors.__getitem__,
        transposed=frozenset(n for n, m in linears.items() if not isinstance(m, nn.Linear)),
    )
