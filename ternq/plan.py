"""``--plan``: everything is validated and said, nothing is done.

Memory is counted on shapes (`ternq.footprint`), so that a model may be planned whose weights are
not here, and for a device that is not here (``--memory``). Time is measured, by a few steps that
teach nothing, where model and device are here (`ternq.pace`).
"""

import time
from pathlib import Path
from typing import Any

import torch

from ternq import budget, hf, outlines, pace, scratch, streamed
from ternq.errors import InputError
from ternq.files import free_disk
from ternq.prepared import fitting, prepare_run
from ternq.processes import Crew, refuse_uneven
from ternq.progress import Event, Progress, ignore
from ternq.publish import check_output
from ternq.recipe import NOT_TERNARY, Recipe
from ternq.student import student_of
from ternq.teacher import cache_bytes
from ternq.weights import stored_dtype, weights_summary


def plan(
    model: str,
    recipe: Recipe,
    *,
    out: Path,
    teacher: str | None = None,
    overwrite: bool = False,
    keep_dtype: bool = False,
    embeddings: str = "keep",
    by_blocks: bool = True,
    memory: int | None = None,
    devices: int | None = None,
    device: str = "cpu",
    offline: bool = False,
    trust_remote_code: bool = False,
    progress: Progress = ignore,
) -> dict[str, Any]:
    """What `ternarize` would make of ``model``: parameters, bits per weight, memory, disk, time.

    ``by_blocks``: going block by block is a strategy. ``memory``: bytes of the device that it is
    planned for; None plans for the one that is here. ``devices`` that are many share the parameters
    (FSDP 2). Time is measured for one device that is here.

    Raises:
        ResourceError: no strategy fits; it says how much is missing.
    """
    scratch.check(recipe, teacher)
    refuse_uneven(recipe.training.batch_size, devices, "devices")
    check_output(out, overwrite)
    own, starting = budget.own_bytes(), budget.age()
    built = outlines.blueprint(model, offline=offline, trust_remote_code=trust_remote_code)
    progress(Event("plan", "Counting what a step of training holds in memory"))
    crew = None if devices is None else Crew(devices, devices > 1)
    recipe, counted, notes = fitting(
        built, recipe, device, memory, by_blocks=by_blocks, exact=True, crew=crew
    )
    assert counted is not None, "it is where no run is gone on with"
    with torch.device("meta"):
        student, selection = student_of(
            built(), built.scheme or recipe.scheme, recipe.training, built()
        )
    dtype = stored_dtype(outlines.dtype_of(built.config), keep_dtype)
    weights = weights_summary(student, dtype, int8_tables=embeddings == "int8")
    training = pace.budgeted(recipe)
    # a budget that is still open has the most that one may have
    tokens = budget.MOST_TOKENS if training["tokens"] is None else training["tokens"]
    width = built.config.get_text_config().hidden_size
    held = counted.counted.host if recipe.training.offload else counted.counted.optimizer
    optimizer = held * (crew.count if crew and crew.sharded else 1)  # a checkpoint has all of it
    disk = _disk(weights, optimizer, recipe, dtype.itemsize, tokens, width)
    free = free_disk(out)
    found: dict[str, Any] = {
        "model": model,
        "weights": weights,
        "dense_layers": [vars(d) for d in selection.dense],
        "notes": notes,
        "memory": counted.to_json() | {"peak": own + counted.needed},
        "disk": {"needed": disk, "free": free},
        "training": training,
        "seconds": None,
        "fits": disk <= free,
        "reason": None if disk <= free else f"{(disk - free) / 1e9:.1f} GB of disk are missing.",
    }
    if memory is not None or devices is not None:
        return found | {"recipe": recipe.to_json()}
    if recipe.training.block_by_block:
        outline = _outline(model, notes)
        if outline is not None:
            streamed.open_text(outline[0], recipe, None, offline, progress)
            try:
                found |= pace.by_blocks(*outline, recipe, device, starting, progress)
            except InputError as error:
                notes.append(f"Time is not measured: {error}")
    else:
        began = time.monotonic()
        prepared = prepare_run(
            model,
            recipe,
            teacher=teacher,
            device=device,
            offline=offline,
            trust_remote_code=trust_remote_code,
            progress=progress,
            open_text=False,
            notes=notes,
        )
        recipe, found["notes"] = prepared.recipe, prepared.notes
        loading = time.monotonic() - began
        found |= pace.end_to_end(prepared, out, starting, loading, progress)
    return found | {"recipe": recipe.to_json()}


def _outline(model: str, notes: list[str]) -> tuple[hf.Loaded, Path] | None:
    """The model without weights, and its folder; None, which is noted, where it is not here."""
    try:
        return hf.outline(model, offline=True)
    except InputError as error:
        notes += [f"Time is not measured: {error}", "The text is not looked at."]
        return None


def _disk(
    weights: dict[str, Any], optimizer: int, recipe: Recipe, itemsize: int, tokens: int, width: int
) -> int:
    """Artefact, checkpoints (of which one is on the way), a start that took time, a cache.

    ``optimizer``: bytes of its states in a checkpoint. What only rounds has none, and what is not
    ternary is a dense folder, of ``itemsize`` bytes a weight. The cache is of ``tokens`` of a
    teacher whose blocks put out ``width`` channels.
    """
    settings, size = recipe.training, weights["bytes"]
    if recipe.only_rounds:
        dense = recipe.scheme.method in NOT_TERNARY
        return int(itemsize * weights["parameters"] if dense else size)
    if settings.block_by_block:
        return int(2 * size)
    student = 4 * weights["parameters"]
    kept = (settings.keep_checkpoints + 1) * (student + optimizer)
    kept += student if settings.calibrated else 0
    kept += cache_bytes(tokens, width) if settings.cache_teacher else 0
    return int(size + kept)
