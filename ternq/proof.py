"""What is in the file is what was trained: proof of a new artefact, check of any artefact.

Both read the folder tensor by tensor, so that a model of any size passes. A small one is also
loaded, as a user would load it, and its logits compared: with a dense model of the same values
(other code computes the same), and with the model it was made from (what rounding for the file
costs).
"""

import hashlib
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ternq import artefact, checkpoint, hf, int8, kernels, outlines, packing, states
from ternq.artefact import Written
from ternq.errors import InputError, TernqError, VerificationError
from ternq.linear import packed_layers
from ternq.modeling_ternq import DenseHead
from ternq.progress import Event, Progress, ignore
from ternq.publish import verify_files
from ternq.source import Source, open_artefact
from ternq.ternary import TernaryWeight
from ternq.weights import Tally, embeddings, with_file
from ternq.writer import tensor_bytes

ROUNDED_TOLERANCE = 1e-4  # of the largest logit: the file against its own rounding, other kernels
TRAINED_TOLERANCE = 0.02  # of the logits' standard deviation, root mean square: what rounding costs
INT8_TOLERANCE = 0.1  # the same, where embeddings and output head have become int8
LARGEST_LOADED = 200_000_000  # parameters; a larger model is compared tensor by tensor alone
# keys of config.json that packing writes anew
_OWN_KEYS = {"architectures", "dtype", "torch_dtype", "transformers_version"}
_PROBE = (2, 64)  # rows and tokens of the text that logits are compared on


def prove(source: Source, folder: Path, written: Written, progress: Progress) -> dict[str, Any]:
    """Read what was written and compare it with what was given: the contract's ``verify``.

    Raises:
        VerificationError: something differs.
    """
    progress(Event("verify", "Reading what was written"))
    _check_structure(folder)
    tensors = checkpoint.TensorFolder(folder)
    if set(tensors) != set(written.digests):
        raise VerificationError("The artefact has other tensors than were written.")
    for name, digest in written.digests.items():
        if hashlib.sha256(tensor_bytes(tensors[name])).digest() != digest:
            raise VerificationError(f"{name} is not in the file what was stored.")
    return {
        "checked": len(source.modules),
        "max_abs_logit_diff": _compare_logits(source, folder, written),
        "ok": True,
        "constant_rows": written.constant_rows,
    }


def verify(
    folder: Path, against: Source | None = None, *, progress: Progress = ignore
) -> dict[str, Any]:
    """Check an artefact: manifest, hashes, and that every packed tensor is one that `pack` writes.

    With ``against``, also that every row of it is that of the model it was made from. Returns the
    contract's ``format``, ``weights``, ``files`` and ``verify``.

    Raises:
        InputError: ``folder`` is no ternq artefact, or of a later format.
        VerificationError: it is damaged; the message names the file or the layer.
    """
    manifest = verify_files(folder)
    try:
        source = open_artefact(folder)
        tally = _check_values(source, folder, against, progress)
        if source.parameters <= LARGEST_LOADED:
            hf.load(str(folder), dtype=torch.float32, offline=True)
    except InputError as error:
        raise VerificationError(error.message, error.hint) from error
    return {
        "format": "ternq",
        "weights": with_file(tally.summary(), folder),
        "files": manifest["files"],
        "verify": {"checked": len(source.modules), "max_abs_logit_diff": None, "ok": True},
        "notes": _verified_notes(folder, source, against),
    }


def _verified_notes(folder: Path, source: Source, against: Source | None) -> list[str]:
    notes = []
    if against is not None:
        notes.append(f"Every row is that of {against.name}.")
    for path in sorted(folder.rglob("*.py")):
        if path.name != artefact.CODE or path.read_bytes() != artefact.code(source).encode():
            notes.append(
                f"{path.name} is not the code of this ternq: read it before you let "
                "trust_remote_code=True run it."
            )
    if source.parameters > LARGEST_LOADED:
        notes.append("The model is large: its tensors were checked, it was not run.")
    return notes


def _check_values(
    source: Source, folder: Path, against: Source | None, progress: Progress
) -> Tally:
    """Codes in range, values in the one stored form, everything finite; and equal to the source."""
    if against is not None:
        _check_same_layers(source, against)
    tally, tensors = Tally(), checkpoint.TensorFolder(folder)
    for done, (name, weight) in enumerate(source.layers(), 1):
        try:
            canonical = weight.is_canonical()
        except ValueError as error:
            raise VerificationError(f"Layer {name}: {error}.") from error
        if not canonical:
            raise VerificationError(f"Layer {name} is not in the stored form (docs/format.md).")
        if against is not None and not (other := against.layer(name)).same(weight):
            rows = _different_rows(weight.dequantized(), other.dequantized())
            raise VerificationError(f"Layer {name} is not that of {against.name}: {rows}.")
        tally.add_layer(weight.codes, weight.group_size, weight.shift is not None)
        progress(Event("verify", done=done, total=len(source.modules)))
    tables = {f"{name}.weight" for name in embeddings(source.skeleton)}
    for name, (dtype, shape) in source.others.items():
        stored = _check_dense(name, tensors)
        if against is not None:
            _check_same_tensor(name, tensors, against)
        if dtype.is_floating_point:
            count = torch.Size(shape).numel()
            tally.add_dense(count, 8 * stored, embedding=name in tables)
    return tally


def _check_dense(name: str, tensors: checkpoint.TensorFolder) -> int:
    """A tensor that is not ternary: finite, and int8 rows in their range; returns its bytes."""
    tensor = tensors[name]
    stored = tensor.nbytes
    if tensor.dtype == torch.int8:
        scale = tensors[f"{name}_scale"]
        stored += scale.nbytes
        zero = (scale == 0).unsqueeze(1) & (tensor != 0)
        if bool(((tensor == -128) | zero).any()) or not bool((scale >= 0).all()):
            raise VerificationError(f"{name} is not in the stored form (docs/format.md).")
        tensor = scale
    if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
        raise VerificationError(f"{name} has values that are NaN or infinite.")
    return stored


def _check_same_layers(source: Source, against: Source) -> None:
    if source.modules != against.modules or source.group_size != against.group_size:
        raise VerificationError(f"The artefact has other ternary layers than {against.name}.")
    for key in sorted((set(source.config) | set(against.config)) - _OWN_KEYS):
        here, there = source.config.get(key), against.config.get(key)
        if here != there:
            raise VerificationError(
                f"config.json: {key} is {here!r} here and {there!r} in {against.name}."
            )


def _check_same_tensor(name: str, tensors: checkpoint.TensorFolder, against: Source) -> None:
    """Refuse a tensor that is not ternary and not what `pack` makes of the model's own."""
    if name not in against.others:
        raise VerificationError(f"{against.name} has no tensor {name}.")
    stored, other = tensors[name], against.tensor(name)
    if stored.dtype == torch.int8:
        scale = tensors[f"{name}_scale"]
        codes, own = int8.quantize_rows(other)
        same = torch.equal(stored, codes) and torch.equal(scale, own)
        stored = int8.dequantize_rows(stored, scale)  # what an artefact in 8 bits gives
    else:
        same, other = False, other.to(stored.dtype)
    if not same and not torch.equal(stored, other):
        rows = _different_rows(stored.reshape(len(stored), -1), other.reshape(len(other), -1))
        raise VerificationError(f"{name} is not that of {against.name}: {rows}.")


def _different_rows(a: Tensor, b: Tensor) -> str:
    if a.shape != b.shape:
        return f"{[*a.shape]} here, {[*b.shape]} there"
    rows = (a != b).any(1).nonzero().flatten().tolist()
    if not rows:
        return "the values agree, their codes, scales or shifts do not"
    return f"{len(rows)} of its {len(a)} rows differ, the first is row {rows[0]}"


def _check_structure(folder: Path) -> None:
    """Refuse tensors that are not those of the configuration, before any is read."""
    try:
        outlines.check_structure(folder)
    except InputError as error:
        raise VerificationError(error.message, error.hint) from error


# --- logits ---------------------------------------------------------------------------------------


def _compare_logits(source: Source, folder: Path, written: Written) -> float | None:
    """Logits of the artefact against a dense model of the same values, and against the source.

    One model at a time is in memory. Returns the largest absolute difference to the source, None
    where that cannot be run here.
    """
    if source.parameters > LARGEST_LOADED:
        source.notes.append("The model is large: its tensors were compared, its logits were not.")
        return None
    try:
        again = hf.load(str(folder), dtype=torch.float32, offline=True).model
    except TernqError as error:
        raise VerificationError(f"The artefact cannot be loaded: {error.message}") from error
    ids = _probe(again)
    with kernels.using("torch"):  # what is proved is the file; kernels have tests of their own
        packed, rounded = _logits(again, ids), _logits(dense(again), ids)
    del again
    if not _max_abs(packed - rounded) <= ROUNDED_TOLERANCE * _max_abs(rounded):
        raise VerificationError(
            f"The artefact's logits differ by {_max_abs(packed - rounded):.3g} from those of a "
            "dense model with the same weights."
        )
    if source.reload is None:
        return None
    trained = _logits(source.reload(), ids)
    moved, spread = float((packed - trained).square().mean().sqrt()), float(trained.std())
    allowed = INT8_TOLERANCE if written.int8_errors else TRAINED_TOLERANCE
    if not moved <= allowed * spread + ROUNDED_TOLERANCE * _max_abs(trained):
        hint = "Pass --keep-dtype if the model is float32."
        if written.int8_errors:
            hint = "Leave --embeddings int8 out."
        raise VerificationError(
            f"Rounding for the file moves the logits by {moved:.3g} (root mean square; their "
            f"standard deviation is {spread:.3g}).",
            hint,
        )
    return _max_abs(packed - trained)


def _probe(model: nn.Module) -> Tensor:
    """Token ids [rows, tokens], the same for every model of one vocabulary."""
    vocabulary = model.get_input_embeddings().num_embeddings  # type: ignore[operator]
    shape = (_PROBE[0], min(_PROBE[1], outlines.max_length(model)))
    return torch.randint(vocabulary, shape, generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def _logits(model: nn.Module, ids: Tensor) -> Tensor:
    """Float32 logits on the CPU; no dropout, and the model's mode is as before afterwards."""
    training = model.training
    model.eval()
    device = next(model.parameters()).device
    logits: Tensor = model(input_ids=ids.to(device), use_cache=False).logits
    model.train(training)
    return logits.float().cpu()


def _max_abs(values: Tensor) -> float:
    return float(values.abs().max())


def dense(model: nn.Module) -> nn.Module:
    """The same model with torch's own layers in the place of the packed ones."""
    states.undo_int8(model)
    for name, layer in packed_layers(model).items():
        codes = packing.unpack_base3(layer.weight, layer.in_features)
        weight = TernaryWeight(codes, layer.weight_scale, layer.weight_shift, layer.group_size)
        with torch.device("meta"):
            plain: Any = nn.Linear(layer.in_features, layer.out_features, layer.bias is not None)
        plain.weight, plain.bias = nn.Parameter(weight.dequantized()), layer.bias
        model.set_submodule(name, plain)
    for module in model.modules():
        if isinstance(module, DenseHead):
            module.__class__ = nn.Linear  # type: ignore[assignment]
    return model
