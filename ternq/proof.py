"""What is in the file is what was trained: proof of a new artefact, check of any artefact.

A new one is loaded again and compared to the student: codes, scales, shifts and all other tensors
to the bit; then logits, against a dense model of the stored values (other code computes the same)
and against the student (what rounding for the file costs).
"""

import copy
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ternq import checkpoint, hf, packing, ternary
from ternq.errors import InputError, TernqError, VerificationError
from ternq.hf import Loaded
from ternq.linear import PackedLinear, TernaryLinear, packed_layers, ternary_layers
from ternq.progress import Event, Progress, ignore
from ternq.weights import weights_summary

ROUNDED_TOLERANCE = 1e-4  # of the largest logit: the file against its own rounding, other kernels
TRAINED_TOLERANCE = 0.02  # of the logits' standard deviation, root mean square: what rounding costs
_SIZE = re.compile("size|^num_|^n_|dim|positions")
_LAYERS = re.compile("(num|n)_(hidden_|decoder_)?layers?")
_LARGEST_SIZE = 2**31  # of any dimension that a configuration names
_PROBE = (2, 64)  # rows and tokens of the text that logits are compared on


def prove(
    student: nn.Module, folder: Path, tensors: dict[str, Tensor], progress: Progress
) -> dict[str, Any]:
    """Load what was written and compare it to the student; VerificationError if it differs."""
    progress(Event("verify", "loading what was written"))
    again = _reload(folder).model.to(next(student.parameters()).device)
    constant = _compare_layers(student, again, progress)
    _compare_others(again, tensors)
    difference = _compare_logits(student, again, tensors)
    return {
        "checked": len(packed_layers(again)),
        "max_abs_logit_diff": difference,
        "ok": True,
        "constant_rows": constant,
    }


def verify(folder: Path, *, progress: Progress = ignore) -> dict[str, Any]:
    """Check an artefact: manifest, hashes, and that every packed tensor is one that `pack` writes.

    Returns the contract's ``format``, ``weights``, ``files`` and ``verify``.

    Raises:
        InputError: ``folder`` is no ternq artefact, or of a later format.
        VerificationError: it is damaged; the message names the file or the layer.
    """
    manifest = checkpoint.verify_files(folder)
    names = set(checkpoint.TensorFolder(folder))
    _check_config(folder, len(names))
    loaded = _reload(folder)
    layers = packed_layers(loaded.model)
    unused = names - set(loaded.model.state_dict())
    if unused or not layers:
        what = f"holds a tensor that its model lacks: {min(unused)}" if unused else "packs no layer"
        raise VerificationError(f"{folder} {what}.")
    for done, (name, layer) in enumerate(layers.items(), 1):
        _check_layer(name, layer)
        progress(Event("verify", done=done, total=len(layers)))
    return {
        "format": "ternq",
        "weights": weights_summary(loaded.model, loaded.dtype),
        "files": manifest["files"],
        "verify": {"checked": len(layers), "max_abs_logit_diff": None, "ok": True},
    }


def stored_names(layers: Mapping[str, nn.Module]) -> set[str]:
    """The names in the file of codes, scales and shifts of the given layers."""
    return {f"{n}.{part}" for n in layers for part in ("weight", "weight_scale", "weight_shift")}


def exported(name: str, layer: TernaryLinear) -> tuple[Tensor, Tensor, Tensor | None]:
    """What `TernaryLinear.exported` gives; values beyond float16 are a `VerificationError`."""
    try:
        codes, scale, shift = layer.exported()
    except ValueError as error:
        raise VerificationError(f"Layer {name} cannot be stored: {error}.") from error
    if shift is not None and not bool(shift.isfinite().all()):
        raise VerificationError(f"Layer {name} cannot be stored: a shift is beyond float16.")
    return codes, scale, shift


def _reload(folder: Path) -> Loaded:
    """Load an artefact of ours in float32; what is wrong with it is a `VerificationError`."""
    try:
        return hf.load(str(folder), dtype=torch.float32, offline=True)
    except TernqError as error:
        raise VerificationError(f"The artefact cannot be loaded: {error.message}") from error


def _compare_layers(student: nn.Module, again: nn.Module, progress: Progress) -> int:
    """Codes, scales and shifts to the bit, for every layer; returns the count of constant rows."""
    layers, packed = ternary_layers(student), packed_layers(again)
    if list(layers) != list(packed):
        raise VerificationError("The artefact has other ternary layers than the trained model.")
    constant = 0
    for done, (name, layer) in enumerate(layers.items(), 1):
        if not all(map(_same, exported(name, layer), packed[name].unpacked())):
            raise VerificationError(f"Layer {name} is not in the file what it was in training.")
        constant += _constant_rows(name, layer, packed[name])
        progress(Event("verify", done=done, total=len(layers)))
    return constant


def _same(a: Tensor | None, b: Tensor | None) -> bool:
    if a is None or b is None:
        return a is b
    return a.dtype == b.dtype and torch.equal(a, b)


def _constant_rows(name: str, layer: TernaryLinear, packed: PackedLinear) -> int:
    """Rows of equal weights in the file; one that varied in training is a VerificationError."""
    trained = ternary.dequantize(
        layer.codes(), layer.weight_scale, layer.weight_shift, layer.group_size
    )
    dead, was_dead = _flat_rows(packed.dequantized()), _flat_rows(trained)
    lost = int((dead & ~was_dead).sum())
    if lost:
        raise VerificationError(
            f"Layer {name}: float16 makes {lost} rows constant that vary in the trained model."
        )
    return int(dead.sum())


def _flat_rows(weight: Tensor) -> Tensor:
    return weight.amax(1) == weight.amin(1)


def _compare_others(again: nn.Module, tensors: dict[str, Tensor]) -> None:
    """All tensors that are not ternary, against what was meant to be stored."""
    state, packed = again.state_dict(), stored_names(packed_layers(again))
    for name, tensor in tensors.items():
        if name not in packed and not torch.equal(state[name], tensor.to(state[name].dtype)):
            raise VerificationError(f"{name} is not in the file what was stored.")


def _compare_logits(student: nn.Module, again: nn.Module, tensors: dict[str, Tensor]) -> float:
    """Logits of the artefact against a dense model of the same values, and against the student.

    Returns the largest absolute difference to the student.
    """
    ids = _probe(student)
    packed, trained = _logits(again, ids), _logits(student, ids)
    rounded = _logits(_rounded(student, tensors), ids)
    if not _max_abs(packed - rounded) <= ROUNDED_TOLERANCE * _max_abs(rounded):
        raise VerificationError(
            f"The artefact's logits differ by {_max_abs(packed - rounded):.3g} from those of a "
            "dense model with the same weights."
        )
    error, spread = float((packed - trained).square().mean().sqrt()), float(trained.std())
    if not error <= TRAINED_TOLERANCE * spread + ROUNDED_TOLERANCE * _max_abs(trained):
        raise VerificationError(
            f"Rounding for the file moves the logits by {error:.3g} (root mean square; their "
            f"standard deviation is {spread:.3g}).",
            "Pass --keep-dtype if the model is float32.",
        )
    return _max_abs(packed - trained)


def _probe(model: nn.Module) -> Tensor:
    """Token ids [rows, tokens], the same for every model of one vocabulary."""
    embedding = model.get_input_embeddings()  # type: ignore[operator]
    rows, tokens = _PROBE
    shape = (rows, min(tokens, hf.max_length(model)))
    ids = torch.randint(embedding.num_embeddings, shape, generator=torch.Generator().manual_seed(0))
    return ids.to(embedding.weight.device)


def _logits(model: nn.Module, ids: Tensor) -> Tensor:
    with torch.no_grad():
        logits: Tensor = model(input_ids=ids, use_cache=False).logits
    return logits.float()


def _max_abs(values: Tensor) -> float:
    return float(values.abs().max())


def _rounded(student: nn.Module, tensors: dict[str, Tensor]) -> nn.Module:
    """A copy of the student with plain linear layers and the values that the file holds."""
    memo: dict[int, Any] = {id(m): _plain(m) for m in ternary_layers(student).values()}
    model = copy.deepcopy(student, memo)  # the plain layers take the place of the ternary ones
    for parameter in model.parameters():
        parameter.data = parameter.data.float()
    state, packed = model.state_dict(), stored_names(ternary_layers(student))
    for name, tensor in tensors.items():
        if name not in packed:
            state[name].copy_(tensor)
    return model.eval()


def _plain(layer: TernaryLinear) -> nn.Linear:
    with torch.device("meta"):
        plain = nn.Linear(layer.in_features, layer.out_features, bias=layer.bias is not None)
    plain.weight = nn.Parameter(ternary.dequantize(*layer.exported(), layer.group_size))
    if layer.bias is not None:
        plain.bias = nn.Parameter(layer.bias.detach().clone())
    return plain


def _check_config(folder: Path, tensors: int) -> None:
    """Refuse sizes that no file of this many tensors has, before a model is built from them."""
    try:
        config = checkpoint.read_json(folder / "config.json")
    except InputError as error:
        raise VerificationError(error.message) from error
    quantization = config.get("quantization_config")
    if not isinstance(quantization, dict) or quantization.get("quant_method") != "ternq":
        raise VerificationError(f"{folder / 'config.json'} has no quantization_config of ternq.")
    for name, value in _sizes(config):
        if not 0 <= value <= (tensors if _LAYERS.fullmatch(name) else _LARGEST_SIZE):
            raise VerificationError(
                f"{folder / 'config.json'}: {name} is {value}; the file has {tensors} tensors."
            )


def _sizes(config: Mapping[str, Any]) -> Iterator[tuple[str, int]]:
    """Whole numbers that say how large or how many; nested configurations included."""
    for name, value in config.items():
        if isinstance(value, dict):
            yield from _sizes(value)
        elif type(value) is int and _SIZE.search(name):
            yield name, value


def _check_layer(name: str, layer: PackedLinear) -> None:
    """Bytes that decode, and values in the one stored form; VerificationError otherwise."""
    scale, shift = layer.weight_scale, layer.weight_shift
    try:
        codes = packing.unpack_base3(layer.weight, layer.in_features, check=True)
        form = ternary.canonical(codes, scale, shift, layer.group_size)
    except ValueError as error:
        raise VerificationError(f"Layer {name}: {error}.") from error
    if not all(map(_same, form, (codes, scale, shift))):
        raise VerificationError(f"Layer {name} is not in the stored form (docs/format.md).")
