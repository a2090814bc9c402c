"""The weights of a model as named tensors: their identity, and how they go out and come back."""

import hashlib
from typing import Any

import torch
from torch import Tensor, nn

from ternq import processes
from ternq.errors import InputError
from ternq.linear import layer_class
from ternq.modeling_ternq import Int8, Int8Linear, features, is_linear
from ternq.recipe import Recipe


def fingerprint(model: nn.Module) -> str:
    """SHA-256 over names, shapes and values of all parameters, 16 hexadecimal digits."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode())
        raw = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        digest.update(memoryview(raw.numpy()))
    return digest.hexdigest()[:16]


def undo_int8(model: nn.Module) -> None:
    """Put plain layers in the place of 8-bit embeddings and output heads; ties stay ties."""
    shared: dict[int, nn.Parameter] = {}
    for name, layer in list(model.named_modules()):
        if not isinstance(layer, Int8):
            continue
        if id(layer.weight) not in shared:
            shared[id(layer.weight)] = nn.Parameter(layer.dequantized())
        weight = shared[id(layer.weight)]
        rows, columns = weight.shape
        plain: Any
        with torch.device("meta"):
            if isinstance(layer, Int8Linear):
                plain = nn.Linear(columns, rows, bias=layer.bias is not None)
                plain.bias = layer.bias
            else:
                plain = nn.Embedding(rows, columns)
        plain.weight = weight
        model.set_submodule(name, plain)


def unique_state(model: nn.Module) -> dict[str, Tensor]:
    """The state dict with each tensor once, under its first name: tied weights are not repeated."""
    seen: set[tuple[int, Any]] = set()
    state = {}
    for name, tensor in model.state_dict().items():
        here = processes.local(tensor)
        key = (here.data_ptr(), tuple(tensor.shape))
        if here.numel() == 0 or key not in seen:
            state[name] = tensor.detach()
        seen.add(key)
    return state


def load_state(model: nn.Module, state: dict[str, Tensor], where: str) -> None:
    """Put a `unique_state` back; names that only tied weights explain may be missing.

    Raises:
        InputError: tensors are missing, unknown or of another shape.
    """
    expected = unique_state(model)
    wrong = [n for n in expected if n not in state or state[n].shape != expected[n].shape]
    wrong += [n for n in state if n not in expected]
    if wrong:
        raise InputError(f"{where} does not fit its configuration: '{wrong[0]}' is wrong.")
    state = {name: processes.placed(tensor, expected[name]) for name, tensor in state.items()}
    model.load_state_dict(state, strict=False)


def put_ternary(model: nn.Module, names: list[str], recipe: Recipe) -> None:
    """Swap empty ternary layers in under the given names, for a state to be loaded."""
    modules = dict(model.named_modules())
    for name in names:
        layer = modules.get(name)
        if layer is None or not is_linear(layer):
            raise InputError(f"'{name}' is no linear layer of {type(model).__name__}.")
        in_features, out_features = features(layer)
        new = layer_class(recipe.scheme)(
            in_features,
            out_features,
            bias=getattr(layer, "bias", None) is not None,
            group_size=recipe.scheme.group_size,
            shift=recipe.scheme.shift,
            ste=recipe.training.ste,
        )
        model.set_submodule(name, new)
