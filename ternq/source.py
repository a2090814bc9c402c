"""A ternary model on disk, read layer by layer: what can be packed, exported or verified.

Nothing here holds more than one tensor, so that a model of any size passes through. A source knows
which layers are ternary and gives each as numbers (`TernaryWeight`); every other tensor is given as
stored. Where the numbers come from only its opener knows: a model in memory, a run and an artefact
here, what others made in `ternq.intake`.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ternq import absmean, checkpoint, hf, origin, outlines, packing, rounding, states, ternary
from ternq.errors import InputError, RecipeError, VerificationError
from ternq.files import read_json
from ternq.hf import Loaded
from ternq.int8 import dequantize_rows
from ternq.linear import rounded_layers, ternary_layers
from ternq.modeling_ternq import features
from ternq.publish import read_manifest
from ternq.recipe import Recipe, Scheme, display_name
from ternq.ternary import TernaryWeight

Shape = tuple[torch.dtype, tuple[int, ...]]
_KEPT = ("recipe", "base_model", "data", "data_sha256", "text_sha256")


@dataclass(frozen=True)
class Source:
    """A ternary model, layer by layer.

    ``config`` is the model's ``config.json`` without ``quantization_config``; ``base`` the folder
    with it, the tokenizer and the generation settings; ``skeleton`` the dense model of that
    configuration, without memory. ``modules`` are the names of the ternary linear layers;
    ``others`` has type and shape of all other tensors, tied ones under one name only. ``dtype`` is
    that of the checkpoint's dense tensors.

    While layers are read, ``rounded`` collects those whose values float16 could not hold, with the
    largest error in units of the scale. ``reload`` gives the model itself for a comparison of
    logits; None where it cannot be run. ``about`` goes into the manifest, ``notes`` are for the
    user.
    """

    name: str
    base: Path
    config: Mapping[str, Any]
    skeleton: Any
    modules: tuple[str, ...]
    others: Mapping[str, Shape]
    group_size: int
    shift: bool
    dtype: torch.dtype
    layer: Callable[[str], TernaryWeight]
    tensor: Callable[[str], Tensor]
    reload: Callable[[], Any] | None = None
    rounded: dict[str, float] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    about: Mapping[str, Any] = field(default_factory=dict)

    def layers(self) -> Iterator[tuple[str, TernaryWeight]]:
        """Name and weight of every ternary layer."""
        return ((name, self.layer(name)) for name in self.modules)

    def size(self, name: str) -> tuple[int, int]:
        """``(in, out)`` of a ternary layer."""
        return features(self.skeleton.get_submodule(name))

    @property
    def transposed(self) -> frozenset[str]:
        """Layers that the model holds as ``[in, out]`` (GPT-2's ``Conv1D``)."""
        layers = {name: self.skeleton.get_submodule(name) for name in self.modules}
        return frozenset(n for n, layer in layers.items() if not isinstance(layer, nn.Linear))

    @property
    def parameters(self) -> int:
        """Parameters of the dense model; tied ones count once."""
        ternary = sum(in_ * out for in_, out in map(self.size, self.modules))
        return ternary + sum(torch.Size(shape).numel() for _, shape in self.others.values())


def of_model(loaded: Loaded, base: Path) -> Source:
    """A model in memory whose layers are in training; ``base`` has its configuration and tokenizer.

    Raises:
        InputError: it has no ternary layer.
    """
    layers = ternary_layers(loaded.model)
    if not layers:
        raise not_ternary(loaded.source)
    parts, state = stored_names(layers), states.unique_state(loaded.model)
    others = {name: tensor for name, tensor in state.items() if name not in parts}
    first = next(iter(layers.values()))
    return Source(
        name=loaded.name,
        base=base,
        config=_model_config(base),
        skeleton=outlines.skeleton(base),
        modules=tuple(layers),
        others={name: (t.dtype, tuple(t.shape)) for name, t in others.items()},
        group_size=first.group_size,
        shift=first.weight_shift is not None,
        dtype=loaded.dtype,
        layer=lambda name: _stored(name, layers[name].numbers()),
        tensor=lambda name: others[name].cpu(),
        reload=lambda: loaded.model,
        about=_recipe(loaded.path) if loaded.kind == "run" else {},
    )


def of_rounded(loaded: Loaded, base: Path) -> Source:
    """A model in memory whose rounded layers are not ternary: a dense one, tensor by tensor."""
    skeleton, state = outlines.skeleton(base), states.unique_state(loaded.model)
    held = {f"{n}.weight": skeleton.get_submodule(n) for n in rounded_layers(loaded.model)}
    turned = {name for name, module in held.items() if not isinstance(module, nn.Linear)}

    def tensor(name: str) -> Tensor:  # a Conv1D is [in, out] in the file
        return state[name].t().contiguous().cpu() if name in turned else state[name].cpu()

    return Source(
        name=loaded.name,
        base=base,
        config=_model_config(base),
        skeleton=skeleton,
        modules=(),
        others={
            n: (t.dtype, tuple(t.shape[:: -1 if n in turned else 1])) for n, t in state.items()
        },
        group_size=1,
        shift=False,
        dtype=loaded.dtype,
        layer=_no_layer,
        tensor=tensor,
        about=_recipe(loaded.path),
    )


def _no_layer(name: str) -> TernaryWeight:
    raise KeyError(name)


def of_stored(
    loaded: Loaded,
    base: Path,
    run: Path,
    modules: tuple[str, ...],
    others: Mapping[str, Shape],
    scheme: Scheme,
    *,
    layer: Callable[[str], TernaryWeight],
    tensor: Callable[[str], Tensor],
) -> Source:
    """A run made block by block of the checkpoint in ``base``, read where its parts lie."""
    return Source(
        name=loaded.name,
        base=base,
        config=_model_config(base),
        skeleton=loaded.model,
        modules=modules,
        others=others,
        group_size=scheme.group_size,
        shift=scheme.shift,
        dtype=loaded.dtype,
        layer=lambda name: _stored(name, layer(name)),
        tensor=tensor,
        about=_recipe(run),
    )


def open_run(folder: Path) -> Source:
    """A finished run of ``ternq distill``.

    Raises:
        InputError: it is not finished, or damaged.
    """
    origin.refuse_unfinished(folder)
    run = origin.read_run(folder)
    scheme = Recipe.from_json(run["recipe"]).scheme
    tensors = checkpoint.TensorFolder(folder, origin.STUDENT_FILE)
    parts = stored_names(run["modules"])

    def layer(name: str) -> TernaryWeight:
        if scheme.method == "absmean":
            return _stored(name, absmean.numbers(tensors[f"{name}.weight"], scheme.group_size))
        codes = rounding.quantize(tensors[f"{name}.weight"], scheme.group_size)
        shift = tensors[f"{name}.weight_shift"] if scheme.shift else None
        scale = tensors[f"{name}.weight_scale"]
        return _stored(name, TernaryWeight(codes, scale, shift, scheme.group_size))

    return Source(
        name=display_name(run["recipe"]["model"]),
        base=folder / origin.BASE_FOLDER,
        config=_model_config(folder / origin.BASE_FOLDER),
        skeleton=outlines.skeleton(folder / origin.BASE_FOLDER),
        modules=tuple(run["modules"]),
        others=_shapes(tensors, parts),
        group_size=scheme.group_size,
        shift=scheme.shift,
        dtype=getattr(torch, run["dtype"]),
        layer=layer,
        tensor=tensors.__getitem__,
        reload=lambda: hf.load(str(folder), offline=True).model,
        about=_recipe(folder) | _measured(folder),
    )


def open_artefact(folder: Path) -> Source:
    """An artefact of ``ternq pack``; embeddings that are int8 there are given as float32.

    Raises:
        InputError, VerificationError: it is none, or damaged.
    """
    manifest = read_manifest(folder)
    outlines.check_structure(folder)
    config = outlines.packed_config(folder)
    skeleton = outlines.skeleton(folder)
    tensors = checkpoint.TensorFolder(folder)
    parts = stored_names(config.modules)
    int8 = {f"{name}.weight" for name in config.int8_modules}
    scales = {f"{name}_scale" for name in int8}

    def layer(name: str) -> TernaryWeight:
        columns = features(skeleton.get_submodule(name))[0]
        shift = tensors[f"{name}.weight_shift"] if config.shift else None
        try:
            codes = packing.unpack_base3(tensors[f"{name}.weight"], columns, check=True)
        except ValueError as error:
            raise VerificationError(f"Layer {name}: {error}.") from error
        return TernaryWeight(codes, tensors[f"{name}.weight_scale"], shift, config.group_size)

    def tensor(name: str) -> Tensor:
        if name in int8:
            return dequantize_rows(tensors[name], tensors[f"{name}_scale"])
        return tensors[name]

    others = _shapes(tensors, parts | scales)
    others |= {n: (torch.float32, others[n][1]) for n in int8 & set(others)}
    plain = _model_config(folder)
    return Source(
        name=folder.resolve().name,
        base=folder,
        config=plain,
        skeleton=skeleton,
        modules=tuple(config.modules),
        others=others,
        group_size=config.group_size,
        shift=config.shift,
        dtype=getattr(torch, str(plain.get("dtype", "bfloat16")).removeprefix("torch.")),
        layer=layer,
        tensor=tensor,
        reload=lambda: hf.load(str(folder), dtype=torch.float32, offline=True).model,
        about=_about(manifest),
    )


def stored_names(modules: Any) -> set[str]:
    """The names in a file of codes, scales and shifts of the given layers."""
    return {f"{n}.{part}" for n in modules for part in ("weight", "weight_scale", "weight_shift")}


def not_ternary(model: str) -> InputError:
    """What is said of a model that has no ternary layer."""
    return InputError(
        f"'{model}' is not ternary, so there is nothing to pack.",
        f"Make it ternary first: ternq ternarize {model}",
    )


def _stored(name: str, trained: TernaryWeight) -> TernaryWeight:
    """The stored form of a trained layer.

    Raises:
        VerificationError: a value is beyond float16, or a row of varying weights becomes constant.
    """
    try:
        weight = trained.canonical()
    except ValueError as error:
        raise VerificationError(f"Layer {name} cannot be stored: {error}.") from error
    flat = constant_rows(weight)
    some = partial(torch.index_select, dim=0, index=flat.nonzero().flatten())
    shift = None if trained.shift is None else some(trained.shift)
    rows = ternary.dequantize(some(trained.codes), some(trained.scale), shift, trained.group_size)
    lost = int((rows.amax(1) != rows.amin(1)).sum()) if len(rows) else 0
    if lost:
        raise VerificationError(
            f"Layer {name}: float16 makes {lost} rows constant that vary in the trained model."
        )
    return weight


def constant_rows(weight: TernaryWeight) -> Tensor:
    """Which rows of a weight in the stored form hold one value only: bool ``[out]``."""
    flat = (weight.scale == 0).all(1)
    if weight.shift is not None:
        flat &= (weight.shift == weight.shift[:, :1]).all(1)
    return flat


def _shapes(tensors: checkpoint.TensorFolder, parts: set[str]) -> dict[str, Shape]:
    return {n: (tensors.dtypes[n], tensors.shapes[n]) for n in tensors if n not in parts}


def _model_config(folder: Path) -> dict[str, Any]:
    """``config.json`` as of the dense model."""
    config = read_json(folder / "config.json")
    return {k: v for k, v in config.items() if k not in ("quantization_config", "auto_map")}


def _measured(run: Path) -> dict[str, Any]:
    """What `ternq distill` measured of teacher and student, for the card."""
    if not (run / origin.REPORT).is_file():
        return {}
    report = read_json(run / origin.REPORT)
    names = {"teacher": str(report.get("model")), "student": "the trained run, before packing"}
    found = {name: report[who] for who, name in names.items() if report.get(who)}
    keys = {"token_perplexity": "perplexity", "word_perplexity": "word_perplexity"}
    results = {
        name: {"held-out": {ours: own[key] for ours, key in keys.items() if own.get(key)}}
        for name, own in found.items()
    }
    return {"results": results, "student": report.get("student")}


def _about(manifest: Mapping[str, Any]) -> dict[str, Any]:
    """What a manifest says of how its model was made, as far as it has the form that we write."""
    found = {key: manifest[key] for key in _KEPT if key in manifest}
    forms = {"base_model": dict, "data": list, "data_sha256": dict, "text_sha256": str}
    found = {k: v for k, v in found.items() if isinstance(v, forms.get(k, dict))}
    before = [*_items(manifest.get("history")), *_items([manifest.get("made")])]
    found |= {"history": before} if before else {}
    try:
        return found | {"recipe": Recipe.from_json(found["recipe"]).to_json()}
    except (KeyError, RecipeError):
        return {key: value for key, value in found.items() if key != "recipe"}


def _items(commands: Any) -> list[dict[str, Any]]:
    """Of a list of commands and versions, those that have that form."""
    found = commands if isinstance(commands, list) else []
    return [c for c in found if isinstance(c, dict) and isinstance(c.get("versions"), dict)]


def _recipe(run: Path | None) -> dict[str, Any]:
    """How a run was made, for the manifest and the card."""
    if run is None or not (run / origin.RUN_FILE).is_file():
        return {}
    record = origin.read_run(run)
    found = {key: record[key] for key in _KEPT if key in record}
    training = found["recipe"].get("training", {}) | {"steps": record.get("steps"), "tokens": None}
    return found | {"recipe": {**found["recipe"], "training": training}}
