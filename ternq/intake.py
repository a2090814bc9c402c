"""What is ternary already, taken in without training: any MODEL that ``ternq pack`` understands.

Runs and artefacts of ternq; dense checkpoints whose weights are ``scale * code (+ shift)`` by value
(Spectra's TriLM is released so); BitNet b1.58 as transformers stores it; GGUF files of ternary
types.
"""

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ternq import checkpoint, hf, origin, outlines, structure
from ternq.errors import InputError, RecipeError, VerificationError
from ternq.files import read_json
from ternq.linear import select
from ternq.modeling_ternq import METHOD, TernqConfig, features
from ternq.progress import Event, Progress
from ternq.publish import EXPORT_MANIFEST, MANIFEST, verify_files
from ternq.recipe import Scheme, display_name
from ternq.recover import NotTernaryError, recover, scheme_of
from ternq.source import Source, not_ternary, open_artefact, open_run
from ternq.ternary import TernaryWeight

_SAMPLED_ROWS = 8  # at the beginning, in the middle and at the end of a layer each
_BITNET = "bitnet"
_CODES_PER_BYTE = 4
# buffers that older versions of transformers stored, and newer ones compute
_BUFFERS = re.compile(r"(rotary_emb\.inv_freq|attn\.bias|masked_bias|attention\.bias)$")


@contextmanager
def opened(
    model: str,
    *,
    group_size: int | None,
    skip: tuple[str, ...],
    offline: bool,
    progress: Progress,
    like: TernqConfig | None = None,
) -> Iterator[Source]:
    """The ternary model that ``model`` names.

    ``group_size`` and ``skip`` are for dense checkpoints: the group to look for instead of the
    largest that fits, and layers to leave dense; or ``like`` says both, as of an artefact that was
    made of it.

    Raises:
        InputError: it is missing, damaged, or not ternary; the message names layer and row.
    """
    progress(Event("load", f"Opening {model}"))
    path, offline = origin.place(model, offline)
    if (group_size or skip) and path is not None and _says_its_layers(path):
        raise RecipeError(
            f"'{model}' says itself which layers are ternary, and in what groups.",
            "--group-size and --skip are for dense checkpoints that are ternary by value.",
        )
    if path is not None and path.suffix == ".gguf":
        from ternq.formats.gguf_import import opened as opened_gguf

        if (path.parent / EXPORT_MANIFEST).is_file():
            verify_files(path.parent, EXPORT_MANIFEST)
        with opened_gguf(path) as source:
            yield source
    elif path is not None and (path / origin.RUN_FILE).is_file():
        yield open_run(path)
    elif path is not None and (path / MANIFEST).is_file():
        verify_files(path)
        found = open_artefact(path)
        yield replace(found, layer=lambda name: found.layer(name).canonical())
    else:
        folder = origin.model_folder(model, path, offline)
        yield open_checkpoint(model, folder, group_size, skip, like)


def _says_its_layers(path: Path) -> bool:
    marks = (origin.RUN_FILE, MANIFEST)
    return path.suffix == ".gguf" or any((path / name).is_file() for name in marks)


def open_checkpoint(
    model: str,
    folder: Path,
    group_size: int | None = None,
    skip: tuple[str, ...] = (),
    like: TernqConfig | None = None,
) -> Source:
    """A folder of safetensors that is ternary by value, or BitNet's.

    ``like`` is the configuration of an artefact: its group size and layers are looked for.

    Raises:
        InputError: it is not; the message names layer, row and how many values stand there.
    """
    tensors = checkpoint.TensorFolder(folder)
    try:
        structure.check_config(folder / "config.json", len(list(tensors)))
    except VerificationError as error:
        raise InputError(error.message, error.hint) from error
    config = read_json(folder / "config.json")
    quantization = config.pop("quantization_config", None) or {}
    method = quantization.get("quant_method") if isinstance(quantization, dict) else "unknown"
    if method == METHOD:
        raise InputError(
            f"'{model}' has no {MANIFEST}: save_pretrained wrote it, not ternq pack.",
            "Pack the artefact that was loaded, or the run.",
        )
    if method not in (None, _BITNET):
        raise InputError(
            f"'{model}' is quantized by '{method}', which ternq pack does not take in.",
            "It takes runs and artefacts of ternq, checkpoints that are ternary by value, BitNet, "
            "and GGUF files of ternary types.",
        )
    skeleton = outlines.skeleton(folder)
    names = _names(model, skeleton, tensors, scales=method == _BITNET)
    chosen = select(skeleton, Scheme(group_size=1, skip=skip)).chosen
    if like is not None:
        group_size = like.group_size
        chosen = {name: chosen[name] for name in like.modules if name in chosen}
        if not chosen:
            raise InputError(f"'{model}' has none of the artefact's ternary layers.")
    rounded: dict[str, float] = {}
    if method == _BITNET:
        layers, notes = _bitnet(model, quantization, chosen, tensors, names, rounded)
        if not layers:
            raise not_ternary(model)
        size, shift, modules = max(features(m)[0] for m in chosen.values()), False, tuple(layers)
        layer: Callable[[str], TernaryWeight] = lambda name: layers[name]()  # noqa: E731
    else:
        size, shift = _scheme(model, chosen, tensors, names, group_size)
        modules, notes = tuple(chosen), [_said(size, shift, chosen)]
        layer = _by_value(model, chosen, tensors, names, size, shift, rounded)
    parts = {f"{m}.{p}" for m in modules for p in ("weight", "weight_scale")}
    others = {n: own for n, own in names.items() if n not in parts}
    return Source(
        name=display_name(model),
        base=folder,
        config={k: v for k, v in config.items() if k != "auto_map"},
        skeleton=skeleton,
        modules=modules,
        others={n: (tensors.dtypes[own], tensors.shapes[own]) for n, own in others.items()},
        group_size=size,
        shift=shift,
        dtype=_dtype(tensors, others),
        layer=layer,
        tensor=lambda name: tensors[names[name]],
        reload=None
        if method
        else lambda: hf.load(str(folder), dtype=torch.float32, offline=True).model,
        rounded=rounded,
        notes=notes,
        about={"base_model": {"name": model, "license": origin.licence(model, folder)}},
    )


# --- names ----------------------------------------------------------------------------------------


def _names(
    model: str, skeleton: Any, tensors: checkpoint.TensorFolder, *, scales: bool
) -> dict[str, str]:
    """Name in the model -> name in the files, for every tensor that the model has."""
    prefix = f"{skeleton.base_model_prefix}."
    state = skeleton.state_dict()
    known: set[str] = set()
    tied = getattr(skeleton, "all_tied_weights_keys", {})
    found = {}
    for name in state:
        own = _stored_name(name, prefix, tensors)
        source = _stored_name(tied.get(name, ""), prefix, tensors)
        if own in tensors and source in tensors:
            if not torch.equal(tensors[own], tensors[source]):
                raise InputError(f"'{model}' ties {own} to {source}, but they differ.")
            known.add(own)
        elif own in tensors:
            found[name] = own
            packed = scales and f"{own}_scale" in tensors
            if not packed and tensors.shapes[own] != tuple(state[name].shape):
                raise InputError(
                    f"'{model}' holds {own} as {_times(tensors.shapes[own])}; its configuration "
                    f"asks for {_times(state[name].shape)}.",
                    "Weights that another program has packed are not taken in.",
                )
        elif name not in tied:
            raise InputError(
                f"'{model}' lacks weights that its configuration asks for, such as {name}."
            )
        if scales and f"{own}_scale" in tensors:
            found[f"{name}_scale"] = f"{own}_scale"
    unknown = [n for n in tensors if n not in known | {*found.values()} and not _BUFFERS.search(n)]
    if unknown:
        raise InputError(f"'{model}' holds {unknown[0]}, which its model has no place for.")
    return found


def _stored_name(name: str, prefix: str, tensors: checkpoint.TensorFolder) -> str:
    """A checkpoint of the inner model alone leaves the prefix out."""
    return name if name in tensors else name.removeprefix(prefix)


def _times(shape: Sequence[int]) -> str:
    return "x".join(map(str, shape))


def _dtype(tensors: checkpoint.TensorFolder, others: dict[str, str]) -> torch.dtype:
    floats = [tensors.dtypes[own] for own in others.values()]
    return next((dtype for dtype in floats if dtype.is_floating_point), torch.float32)


# --- ternary by value -----------------------------------------------------------------------------


def _scheme(
    model: str,
    chosen: dict[str, nn.Module],
    tensors: checkpoint.TensorFolder,
    names: dict[str, str],
    group_size: int | None,
) -> tuple[int, bool]:
    """Group size and shift, from some rows of every layer."""
    samples = {n: _sample(layer, tensors, names[f"{n}.weight"]) for n, layer in chosen.items()}
    found = scheme_of([rows for _, rows in samples.values()], group_size)
    if found is not None:
        return found
    for name, (places, rows) in samples.items():
        if scheme_of([rows], group_size) is not None:
            continue
        size = min(group_size or 128, rows.shape[1])
        try:
            recover(rows, size, shift=True)
        except NotTernaryError as error:
            raise _refusal(model, name, error, places[error.row]) from error
        except ValueError as error:
            raise InputError(f"'{model}' cannot be packed: {name}: {error}.") from error
    raise InputError(
        f"The layers of '{model}' are ternary by value, but no group size from 16 up fits them "
        "all.",
        "Leave some of them dense with --skip.",
    )


def _sample(
    layer: nn.Module, tensors: checkpoint.TensorFolder, name: str
) -> tuple[list[int], Tensor]:
    """Some rows ``[n, in]`` of a layer, and which they are."""
    if not isinstance(layer, nn.Linear):
        whole = tensors[name].t().contiguous()
        return [*range(len(whole))], whole
    count = tensors.shapes[name][0]
    starts = {0, max(0, count // 2 - _SAMPLED_ROWS // 2), max(0, count - _SAMPLED_ROWS)}
    places = sorted({row for s in starts for row in range(s, min(count, s + _SAMPLED_ROWS))})
    parts = [tensors.rows(name, s, min(count, s + _SAMPLED_ROWS)) for s in sorted(starts)]
    rows = torch.cat(parts) if len(places) == sum(map(len, parts)) else tensors.rows(name, 0, count)
    return places, rows


def _by_value(
    model: str,
    chosen: dict[str, nn.Module],
    tensors: checkpoint.TensorFolder,
    names: dict[str, str],
    group_size: int,
    shift: bool,
    rounded: dict[str, float],
) -> Callable[[str], TernaryWeight]:
    def layer(name: str) -> TernaryWeight:
        weight = tensors[names[f"{name}.weight"]]
        weight = weight if isinstance(chosen[name], nn.Linear) else weight.t().contiguous()
        try:
            found = recover(weight, group_size, shift)
        except NotTernaryError as error:
            raise _refusal(model, name, error, error.row) from error
        except ValueError as error:
            raise InputError(f"'{model}' cannot be packed: {name}: {error}.") from error
        if found.error:
            rounded[name] = found.error
        return found.weight

    return layer


def _refusal(model: str, name: str, error: NotTernaryError, row: int) -> InputError:
    first, last = error.columns
    return InputError(
        f"'{model}' is not ternary: {name}, row {row}, columns {first} to {last - 1} hold "
        f"{error.values} distinct values; scale * code + shift has at most three, evenly spaced.",
        f"Make it ternary first: ternq ternarize {model}; or leave the layer dense with --skip, or "
        "look for smaller groups with --group-size.",
    )


def _said(size: int, shift: bool, chosen: dict[str, nn.Module]) -> str:
    rows = all(features(layer)[0] <= size for layer in chosen.values())
    groups = "one scale for each row" if rows else f"groups of {size}"
    return f"Found ternary by value: {groups}, {'with' if shift else 'without'} shifts."


# --- BitNet ---------------------------------------------------------------------------------------


def _bitnet(
    model: str,
    quantization: dict[str, Any],
    chosen: dict[str, nn.Module],
    tensors: checkpoint.TensorFolder,
    names: dict[str, str],
    rounded: dict[str, float],
) -> tuple[dict[str, Callable[[], TernaryWeight]], list[str]]:
    """The layers of BitNet b1.58 in the forms of transformers 5.23 (integrations/bitnet.py, read).

    Packed codes are divided by ``weight_scale`` where the linear class is ``bitlinear``, and
    multiplied by it where it is ``autobitlinear``; in the mode ``online`` the weights are dense and
    rounded by absmean when they are used.
    """
    kind = quantization.get("linear_class", "bitlinear")
    online = kind == "autobitlinear" and quantization.get("quantization_mode") != "offline"
    if quantization.get("use_rms_norm"):
        raise InputError(f"'{model}' normalises inside its linear layers, which ternq cannot hold.")
    if kind not in ("bitlinear", "autobitlinear"):
        raise InputError(f"'{model}' has an unknown linear_class of BitNet: {kind!r}.")
    kept = quantization.get("modules_to_not_convert") or []
    layers: dict[str, Callable[[], TernaryWeight]] = {}
    for name, layer in chosen.items():
        if any(re.fullmatch(rf"(.*\.)?{re.escape(str(k))}(\..*)?", name) for k in kept):
            continue
        if not online and f"{name}.weight_scale" not in names:
            raise InputError(f"'{model}' lacks {name}.weight_scale.")
        layers[name] = _bitnet_layer(name, layer, tensors, names, kind, online, rounded)
    note = "BitNet rounds activations to 8 bits when it runs; the artefact keeps them as they are."
    return layers, [note]


def _bitnet_layer(
    name: str,
    layer: nn.Module,
    tensors: checkpoint.TensorFolder,
    names: dict[str, str],
    kind: str,
    online: bool,
    rounded: dict[str, float],
) -> Callable[[], TernaryWeight]:
    def read() -> TernaryWeight:
        weight = tensors[names[f"{name}.weight"]]
        if online:
            _refuse_shape(name, weight, features(layer)[::-1])
            inverse = 1.0 / weight.float().abs().mean().clamp(min=1e-5)
            codes, value = (weight.float() * inverse).round().clamp(-1, 1), 1.0 / inverse
        else:
            codes = _unpacked(name, weight, layer)
            stored = tensors[names[f"{name}.weight_scale"]].double().flatten()
            if len(stored) != 1 or not float(stored) > 0:
                raise InputError(f"{name}.weight_scale is not one positive number.")
            value = 1 / stored if kind == "bitlinear" else stored
        scale = value.half()
        if not 0 < float(scale) < float("inf"):
            raise InputError(f"The scale of {name} is {float(value):.3g}, beyond float16.")
        if error := abs(float(scale) / float(value) - 1):
            rounded[name] = error
        rows, columns = codes.shape
        whole = scale.reshape(1, 1).expand(rows, 1).contiguous()
        return TernaryWeight(codes.to(torch.int8), whole, None, columns).canonical()

    return read


def _refuse_shape(name: str, weight: Tensor, shape: tuple[int, ...]) -> None:
    if tuple(weight.shape) != shape:
        raise InputError(f"{name}.weight is {_times(weight.shape)}, not {_times(shape)}.")


def _unpacked(name: str, packed: Tensor, layer: nn.Module) -> Tensor:
    """Codes ``[out, in]`` of BitNet's bytes ``[out / 4, in]``: two bits each, a quarter of rows."""
    columns, rows = features(layer)
    _refuse_shape(name, packed, (-(-rows // _CODES_PER_BYTE), columns))
    if packed.dtype != torch.uint8:
        raise InputError(f"{name}.weight is not packed as BitNet's weights are.")
    quarters = [(packed >> (2 * i)) & 3 for i in range(_CODES_PER_BYTE)]
    digits = torch.cat(quarters)[:rows]
    if bool((digits == 3).any()):
        row = int((digits == 3).any(1).nonzero()[0])
        raise InputError(f"{name}.weight, row {row}: a code is none of -1, 0 and +1.")
    return digits.to(torch.int8) - 1
