"""``--plan``: everything is validated and said, nothing is done.

Memory is counted on shapes (`ternq.footprint`), so that a model may be planned whose weights are
not here, and for a device that is not here (``--memory``). Time is measured, by a few steps that
teach nothing, where model and device are here.
"""

import time
from collections import Counter
from pathlib import Path
from typing import Any

import torch

from ternq import baseline, budget, checkpoint, outlines, scratch
from ternq.corpus import HELD_OUT_TOKENS
from ternq.errors import RecipeError
from ternq.linear import rounded_layers, ternary_layers
from ternq.perplexity import BLOCK, tokens_per_second
from ternq.prepared import Prepared, fitting, prepare_run
from ternq.processes import Crew
from ternq.progress import Event, Progress, ignore
from ternq.recipe import Recipe
from ternq.reconstruct import rows_at_once
from ternq.samples import PROMPTS, TOKENS
from ternq.student import student_of
from ternq.teacher import cache_bytes
from ternq.train import Trainer
from ternq.weights import stored_dtype, weights_summary

SAVING = 200e6  # bytes a second that a checkpoint is written, read back and compared at
TEXTS = 2 * len(PROMPTS[""]) * TOKENS  # tokens that teacher and student write for the report
WALKS = 4  # passes of a whole model that a start over its text is worth; 2.7 to 3.5 in bf16
SOME = 1024  # rows and columns of a layer that is rounded to know how long all take
PASSES = 3  # over the held-out text: teacher, untrained and packed student


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
    if devices and recipe.training.batch_size % devices:
        raise RecipeError(
            f"--batch-size {recipe.training.batch_size} cannot be shared evenly among {devices} "
            "devices.",
            "Name a multiple.",
        )
    checkpoint.check_output(out, overwrite)
    resident, starting = budget.resident(), budget.age()
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
    training = _training(recipe, None)
    width = built.config.get_text_config().hidden_size
    disk = _disk(weights, counted, recipe, training["tokens"] or 0, width)
    free = checkpoint.free_disk(out)
    found: dict[str, Any] = {
        "model": model,
        "weights": weights,
        "dense_layers": [vars(d) for d in selection.dense],
        "notes": notes,
        "memory": counted.to_json() | {"peak": resident + counted.needed},
        "disk": {"needed": disk, "free": free},
        "training": training,
        "seconds": None,
        "fits": disk <= free,
        "reason": None if disk <= free else f"{(disk - free) / 1e9:.1f} GB of disk are missing.",
    }
    here = memory is None and devices is None
    if here and not recipe.training.block_by_block:
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
        found |= _times(prepared, out, starting, loading, progress)
    return found | {"recipe": recipe.to_json()}


def _times(
    prepared: Prepared, out: Path, starting: float, loading: float, progress: Progress
) -> dict[str, Any]:
    """How long the parts of it take, from a few steps and a few pages measured here."""
    progress(Event("plan", "Measuring how fast this machine trains and reads"))
    prepared.settle()
    student = prepared.student.model
    teacher = prepared.teacher and prepared.teacher.model
    length = min(BLOCK, outlines.max_length(student))
    with torch.no_grad():
        reading = tokens_per_second(student.eval(), length)
        passes = (PASSES - 1) / reading
        passes += 1 / tokens_per_second(teacher.eval(), length) if teacher else 0.0
    rounding = _rounding(prepared)
    rate = None
    if not prepared.recipe.only_rounds:
        trainer = Trainer(
            student=student,
            teacher=teacher,
            blocks=iter(()),
            settings=prepared.recipe.training,
            steps=1,
            folder=out,
            progress=progress,
        )
        rate = budget.probe(trainer)
    training = _training(prepared.recipe, rate)
    held_out = len(prepared.corpus.held_out) or HELD_OUT_TOKENS
    state = sum(p.nbytes for p in student.parameters()) * (3 if training["steps"] else 1)
    parts = {
        "starting": starting,
        "loading": loading,
        "start": rounding + _walking(prepared.recipe, reading, rate),
        "training": training["seconds"] or 0.0,
        "evaluation": held_out * passes,
        "saving": state / SAVING,
        "packing": loading,  # written, read back and loaded again
        "texts": TEXTS * _forward(student),
    }
    return {"training": training, "seconds": parts | {"total": sum(parts.values())}}


def _walking(recipe: Recipe, reading: float, rate: float | None) -> float:
    """Seconds that the text of a start takes through the blocks, and their training on it."""
    settings, scheme = recipe.training, recipe.scheme
    tokens = settings.calibration * settings.sequence_length
    if scheme.method not in baseline.CALIBRATED and not settings.calibrated:
        return 0.0
    epochs = settings.reconstruction_epochs if settings.start == "reconstructed" else 0
    return WALKS * tokens / reading + epochs * tokens / (rate or reading)


def _rounding(prepared: Prepared) -> float:
    """Seconds of rounding all layers by their inputs, from one of each shape."""
    recipe = prepared.recipe
    if recipe.scheme.method not in baseline.CALIBRATED and not recipe.training.calibrated:
        return 0.0
    layers = {**ternary_layers(prepared.student.model), **rounded_layers(prepared.student.model)}
    shapes = Counter(tuple(layer.weight.shape) for layer in layers.values())
    seconds = 0.0
    for (rows, columns), count in shapes.items():
        weight = torch.randn(min(rows, SOME), min(columns, SOME))
        began = time.monotonic()
        baseline.round_weight(weight, torch.eye(weight.shape[1]), recipe.scheme)
        took = time.monotonic() - began
        seconds += count * took * rows * columns / weight.numel()
    return seconds


def _forward(model: Any) -> float:
    """Seconds of a pass over one token."""
    ids = torch.zeros(1, 1, dtype=torch.int64, device=model.device)
    seconds = []
    with torch.no_grad():
        for _ in range(4):
            began = time.monotonic()
            float(model.eval()(ids, use_cache=False).logits[0, 0, 0])
            seconds.append(time.monotonic() - began)
    return min(seconds)


def _training(recipe: Recipe, rate: float | None) -> dict[str, Any]:
    """Steps and tokens, where they are named or a rate is known; and how long they take."""
    settings = recipe.training
    if settings.block_by_block:  # each block by itself
        rows = rows_at_once(settings, True)
        made = settings.reconstruction_epochs * -(-settings.calibration // rows)
        read = settings.reconstruction_epochs * settings.calibration * settings.sequence_length
        return {"steps": made, "tokens": read, "tokens_per_second": None, "seconds": None}
    named = settings.steps is not None or settings.tokens is not None
    steps = budget.planned_steps(settings, rate or 0.0) if named or rate else None
    tokens = None if steps is None else steps * settings.batch_size * settings.sequence_length
    seconds = tokens / rate if rate and tokens is not None else None
    return {"steps": steps, "tokens": tokens, "tokens_per_second": rate, "seconds": seconds}


def _disk(
    weights: dict[str, Any], counted: budget.Memory, recipe: Recipe, tokens: int, width: int
) -> int:
    """Artefact, checkpoints (of which one is on the way), a start that took time, a cache.

    The cache is of ``tokens`` of a teacher whose blocks put out ``width`` channels.
    """
    settings = recipe.training
    student = 4 * weights["parameters"]
    kept = (settings.keep_checkpoints + 1) * (student + counted.counted.optimizer)
    kept += student if settings.calibrated else 0
    kept += cache_bytes(tokens, width) if settings.cache_teacher else 0
    return int(weights["bytes"] + (weights["bytes"] if settings.block_by_block else kept))
