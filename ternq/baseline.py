"""Baselines: what other methods make of a model without training, in ternq's own pipeline.

A third way beside `ternq.distill` and `ternq.streamed` to what `ternq.ternarize` packs and
measures. RTN, absmean and TWN look at the weights alone; GPTQ, PT2-LLM and BiLLM walk the model
block by block on text, as the compensated start does. What is ternary is packed as ternq's format;
the others are written as a dense folder for plain transformers, and their bits are counted as they
would be stored.
"""

import time
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ternq import billm, grid, origin, processes, pt2
from ternq.calibrate import Found, Layer, compensated_start, put
from ternq.compensate import Compensated, compensate
from ternq.errors import InputError, RecipeError
from ternq.formats import Options
from ternq.grid import Rounded
from ternq.linear import RoundedLinear, TernaryLinear, rounded_layers
from ternq.precision import products
from ternq.prepared import Prepared, as_made, perplexity
from ternq.progress import Event, Progress
from ternq.recipe import CALIBRATED, NOT_TERNARY, Recipe, Scheme
from ternq.source import Source, of_rounded
from ternq.weights import weights_summary, with_file


def check(recipe: Recipe, embeddings: str, keep_dtype: bool) -> None:
    """`RecipeError` for what only a packed artefact has, where the result is a dense folder."""
    if recipe.scheme.method in NOT_TERNARY and (embeddings != "keep" or keep_dtype):
        one = f"--embeddings {embeddings}" if embeddings != "keep" else "--keep-dtype"
        raise RecipeError(
            f"{one} is of a packed model; --method {recipe.scheme.method} writes a dense folder.",
            "Leave it out.",
        )


def train_run(
    prepared: Prepared,
    out: Path,
    record: dict[str, Any],
    *,
    progress: Progress,
) -> dict[str, Any]:
    """Round the student, and measure it and its teacher; the fields of `distill.train_run`.

    It is one piece of work: what is stopped begins again.

    Raises:
        InputError: a layer cannot be rounded, or the model cannot be walked block by block.
        RecipeError: several processes were started.
    """
    began = time.monotonic()
    processes.refuse_many(f"--method {prepared.recipe.scheme.method}")
    assert prepared.teacher is not None, "ternarize refuses models from scratch"
    notes = rounded(prepared, progress)
    seconds = time.monotonic() - began
    for said in notes:
        progress(Event("calibrate", said))
    student = prepared.student
    return {
        "model": prepared.recipe.model,
        "teacher": perplexity(prepared, prepared.teacher, progress, "teacher"),
        "untrained": perplexity(prepared, student, progress, "rounded"),
        "recipe": as_made(prepared, 0).to_json(),
        "training": {
            "steps": 0,
            "tokens": 0,
            "tokens_per_second": None,
            "loss_first": None,
            "loss_last": None,
            "seconds": seconds,
        },
        "weights": weights_summary(student.model),
        "dense_layers": [vars(d) for d in prepared.selection.dense],
        "notes": [*prepared.notes, *notes],
        "seconds": time.monotonic() - began,
    }


def rounded(prepared: Prepared, progress: Progress) -> list[str]:
    """Round every layer of the student, in place; what was done, in sentences."""
    recipe, model = prepared.recipe, prepared.student.model
    scheme, settings = recipe.scheme, recipe.training
    said: list[str] = []
    if scheme.method in CALIBRATED:
        ids = torch.stack(list(islice(prepared.corpus.blocks, settings.calibration)))
        said = compensated_start(
            model,
            ids,
            lambda layer, hessian: round_layer(layer, hessian, scheme),
            how=f"Method {scheme.method}: {{}} layers rounded",
            rows=settings.micro_batch_size or settings.batch_size,
            autocast=products(settings, next(model.parameters()).device),
            progress=progress,
        )
    layers = rounded_layers(model)
    for name, layer in layers.items():
        if not layer.code_bits:  # it needs no inputs, or its weight is of several modules
            _without_inputs(name, layer, scheme)
            for other in layers.values():
                if other.weight is layer.weight:
                    other.code_bits = layer.code_bits
    return [*said, _bits_said(scheme, layers)] if layers else said


def _without_inputs(name: str, layer: RoundedLinear, scheme: Scheme) -> None:
    """Round a layer as if its inputs were alike and not correlated: then GPTQ is RTN."""
    try:
        round_layer(layer, torch.eye(layer.in_features, device=layer.weight.device), scheme)
    except ValueError as error:
        raise InputError(f"The rounding of {name} failed: {error}.") from error


def round_layer(layer: Layer, hessian: Tensor, scheme: Scheme) -> Found:
    """Round a layer, in place, as `round_weight` does."""
    found = round_weight(layer.weight.detach(), hessian, scheme)
    if isinstance(layer, TernaryLinear):
        assert isinstance(found, Compensated), "ternary layers are of ternary methods"
        put(layer, found)
        return found
    assert isinstance(found, Rounded), "others are not"
    with torch.no_grad():
        layer.weight.copy_(found.values)
    layer.code_bits = found.code_bits
    return found


def round_weight(weight: Tensor, hessian: Tensor, scheme: Scheme) -> Found:
    """Round ``[out, in]`` by a scheme's method for inputs of second moments ``[in, in]``.

    Raises:
        ValueError: something is not finite, or too large.
    """
    size, bits = scheme.group_size, scheme.bits or 2
    if scheme.method == "rtn":
        return grid.rtn(weight, bits, scheme.symmetric, size, scheme.grid)
    if scheme.method == "gptq":
        return grid.gptq(weight, hessian, bits, scheme.symmetric, size, scheme.grid)
    if scheme.method == "billm":
        return billm.billm(weight, hessian, size)
    if scheme.method == "pt2":
        return pt2.pt2(weight, hessian, size)
    return compensate(weight, hessian, size, scheme.shift)


def _bits_said(scheme: Scheme, layers: dict[str, RoundedLinear]) -> str:
    count = sum(layer.weight.numel() for layer in layers.values())
    codes, whole = (
        sum(getattr(layer, name) for layer in layers.values()) / count
        for name in ("code_bits", "bits")
    )
    beside = "scales" if scheme.symmetric else "scales and zeros"
    if scheme.method == "billm":
        beside = "sides of the split, salient columns, means and scales"
    return (
        f"Bits per weight: {codes:.3f} of codes, {whole:.3f} with {beside}, as they would be "
        "stored. The file holds the rounded weights as dense ones."
    )


def dense_source(prepared: Prepared, run: Path) -> tuple[Source, dict[str, Any]]:
    """What is written of a student that is not ternary, and how: in float16 if that holds it."""
    whole = replace(prepared.student, kind="run", path=run)
    largest = max(float(p.detach().abs().max()) for p in whole.model.parameters())
    encoding = "float16" if largest <= torch.finfo(torch.float16).max else "bfloat16"
    source = of_rounded(whole, run / origin.BASE_FOLDER)
    return source, {"format": "dense", "options": Options(encoding=encoding)}


def weights(prepared: Prepared, folder: Path) -> dict[str, Any]:
    """The contract's ``weights`` of a dense folder, its bits as they would be stored.

    ``bytes`` and ``bpw_file`` are of the folder as it is.
    """
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    return with_file(weights_summary(prepared.student.model) | {"bytes": size}, folder)
