"""The training stage: a dense or ternary model in, a trained ternary run out.

A run is a folder (`ternq.runs`) that can be stopped at any instant and continued; at the end it has
``student.safetensors`` and ``report.json``.
"""

import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ternq import (
    budget,
    checkpoint,
    hf,
    metrics,
    origin,
    outlines,
    processes,
    runs,
    scratch,
    snapshots,
    states,
    stop,
    trackers,
)
from ternq.calibrate import Started, compensated_start
from ternq.errors import RecipeError
from ternq.files import read_json, write_json
from ternq.frozen import fold, plain_state
from ternq.linear import decoder_blocks
from ternq.origin import REPORT
from ternq.precision import products
from ternq.prepared import Prepared, as_made, fitting, perplexity, prepare_run
from ternq.progress import Event, Progress, ignore
from ternq.recipe import Recipe, refuse_untrained
from ternq.reconstruct import rows_at_once
from ternq.teacher import CachedTeacher, TeacherCache, cached_teacher
from ternq.train import Trainer
from ternq.weights import stored_dtype, weights_summary


def distill(
    model: str,
    out: Path,
    recipe: Recipe,
    *,
    teacher: str | None = None,
    resume: bool | None = None,
    overwrite: bool = False,
    time_limit: float | None = None,
    log_with: tuple[str, ...] = (),
    device: str = "cpu",
    offline: bool = False,
    trust_remote_code: bool = False,
    progress: Progress = ignore,
) -> dict[str, Any]:
    """Train a ternary student of ``model`` into the run folder ``out``, or go on where it stopped.

    Returns the fields of the contract for ``distill``. ``resume``: True must, False must not. Of
    several processes (`ternq.processes`) the main one measures the student; others return early.

    Raises:
        RecipeError: ``out`` holds something else, or a run of another recipe.
        StoppedError, InterruptedByUser, DivergenceError: see `ternq.train.Trainer.run`.
    """
    refuse_untrained(recipe)
    trackers.check(log_with)
    with runs.locked(out, resume, overwrite, [model, teacher]):
        prepared, record = begin(
            model,
            out,
            recipe,
            teacher=teacher,
            resume=resume,
            overwrite=overwrite,
            device=device,
            offline=offline,
            trust_remote_code=trust_remote_code,
            progress=progress,
        )
        if (out / REPORT).is_file():
            snapshots.drop_all(out)
            progress(Event("done", f"{out} is finished already; nothing to do"))
            return read_json(out / REPORT)
        report = train_run(
            prepared, out, record, time_limit=time_limit, log_with=log_with, progress=progress
        )
        if not processes.is_main():
            return report
        report["student"] = perplexity(prepared, prepared.student, progress, "student")
        write_json(out / REPORT, report)
        snapshots.drop_all(out)  # only now: a run that stops before it is done goes on from them
        for folder in (runs.START, runs.TEACHER_FOLDER):
            shutil.rmtree(out / folder, ignore_errors=True)
        return report


def begin(
    model: str,
    out: Path,
    recipe: Recipe,
    *,
    resume: bool | None = None,
    overwrite: bool = False,
    progress: Progress = ignore,
    by_blocks: Callable[..., Any] | None = None,
    **options: Any,
) -> tuple[Any, dict[str, Any]]:
    """Check and load everything; open the run folder ``out``, or find it to be of this recipe.

    The folder is held by `ternq.runs.locked`. ``options`` are those of `prepare_run`; ``by_blocks``
    stands in its place for a model that only fits block by block. Returns what they give, and the
    run's record.
    """
    scratch.check(recipe, options.get("teacher"))
    processes.refuse_uneven(recipe.training.batch_size)
    processes.join(options.get("device", "cpu"))
    record = processes.from_main(lambda: _found(out, resume, overwrite))
    access = {k: bool(options.get(k)) for k in ("offline", "trust_remote_code")}
    built, device = outlines.blueprint(model, **access), options.get("device", "cpu")
    asked = {name: getattr(recipe.training, name) for name in budget.STRATEGY}
    recipe, _, notes = processes.from_main(
        lambda: fitting(built, recipe, device, record=record, by_blocks=by_blocks is not None)
    )
    prepare = prepare_run
    if by_blocks is not None and recipe.training.block_by_block:
        prepare = by_blocks
    prepared = prepare(
        model, recipe, notes=notes, cache=out, record=record, progress=progress, **options
    )

    def opened() -> dict[str, Any]:
        _open(prepared, out, record, asked, resume, overwrite, device, access["offline"], progress)
        return origin.read_run(out)

    return prepared, processes.from_main(opened)


def _found(out: Path, resume: bool | None, overwrite: bool) -> dict[str, Any] | None:
    """The record of the run that is there, if it may be gone on with."""
    record = runs.existing(out, resume, overwrite)
    other_format = record is not None and record[runs.FORMAT] != runs.FORMAT_VERSION
    if other_format or runs.half_removed(out):  # the first only where it is to be overwritten
        runs.remove(out)
        return None
    return record


def _open(
    prepared: Prepared,
    out: Path,
    record: dict[str, Any] | None,
    asked: dict[str, Any],
    resume: bool | None,
    overwrite: bool,
    device: str,
    offline: bool,
    progress: Progress,
) -> None:
    """Make the run folder ``out``, or go on with what is there if it is of this recipe."""
    text = prepared.corpus
    specs = list(text.specs)
    identity = runs.identity(
        prepared.recipe, prepared.teacher_weights, text.held_out, specs, torch.device(device)
    )
    if record is not None:
        found = runs.differences(record, prepared.recipe, identity)
        finished = (out / REPORT).is_file()
        if overwrite and (found or finished or resume is False):
            runs.remove(out, keep_own_text=True)
            record = None
        elif found:
            raise RecipeError(
                f"'{out}' is a run of another recipe ({'; '.join(found)}).",
                "Go on with the same options, choose another -o, or pass --overwrite.",
            )
        else:
            progress(Event("plan", f"Going on with the run in {out}"))
            if changed := runs.changes(record, identity):
                said = f"Not the same to the bit as one uninterrupted run: {'; '.join(changed)}."
                prepared.notes.append(said)
                progress(Event("plan", said, level="warning"))
    if record is None:
        student = prepared.student
        licence = origin.licence(prepared.recipe.model, student.path, offline)
        runs.begin(out, prepared.recipe, student, identity, specs, licence, asked)


def train_run(
    prepared: Prepared,
    out: Path,
    record: dict[str, Any],
    *,
    time_limit: float | None,
    log_with: tuple[str, ...] = (),
    progress: Progress,
) -> dict[str, Any]:
    """Measure teacher and start, train to the end, save the student.

    Returns the fields of ``distill`` but the student's perplexity: `distill` measures the student,
    `ternq.ternarize` what became of it in the file. After the last step processes part: what is
    returned is the main one's to go on with.
    """
    began, check = time.monotonic(), stop.Check(time_limit)
    recipe, student = prepared.recipe, prepared.student
    _read_on(prepared, record, progress)
    if recipe.training.calibrated and prepared.dense:
        _compensate(prepared, out, record, check, progress)
        stop.not_polled()
    prepared.settle()
    record |= processes.from_main(lambda: _measured(prepared, record, progress))
    trainer = Trainer(
        student=student.model,
        teacher=prepared.teacher and prepared.teacher.model,
        blocks=prepared.corpus.blocks,
        settings=recipe.training,
        steps=0,
        folder=out,
        progress=progress,
        time_limit=check.left(),
        log_with=log_with,
        seed=recipe.seed,
    )
    steps = record.get("steps")
    if steps is None:
        steps = _steps(trainer, progress)
        record |= {"steps": steps}
    processes.from_main(lambda: write_json(out / origin.RUN_FILE, record))
    trainer.steps = steps
    if recipe.training.cache_teacher:
        trainer.learn_from(_cached(prepared, trainer, out, check, progress))
        trainer.time_limit = check.left()
    if trainer.restore():
        progress(Event("train", f"Going on after step {trainer.step} of {steps}"))
    trainer.run()
    fold(student.model)
    state = plain_state(student.model, processes.gathered(states.unique_state(student.model)))
    processes.leave()
    if not processes.is_main():
        return {"model": recipe.model}
    checkpoint.save_tensors(state, out / origin.STUDENT_FILE)
    if trainer.sharded:  # what only all processes together could call
        student.model = hf.load(str(out), device=str(trainer.device)).model
    student.model.eval()
    tokens = steps * recipe.training.batch_size * recipe.training.sequence_length
    return {
        "model": recipe.model,
        "teacher": record["teacher"],
        "untrained": record["untrained"],
        "recipe": as_made(prepared, steps).to_json(),
        "training": {
            "steps": steps,
            "tokens": tokens,
            "tokens_per_second": tokens / trainer.seconds if trainer.seconds else None,
            "loss_first": trainer.losses[0] if trainer.losses else None,
            "loss_last": trainer.losses[-1] if trainer.losses else None,
            "seconds": trainer.seconds,
        },
        "weights": weights_summary(student.model, stored_dtype(student.dtype)),
        "dense_layers": [vars(d) for d in prepared.selection.dense],
        "notes": [
            *prepared.notes,
            *record.get("start", []),
            *trainer.said,
            *_afterwards([row["loss"] for row in metrics.steps(out)]),
        ],
        "seconds": time.monotonic() - began,
    }


def _measured(prepared: Prepared, record: dict[str, Any], progress: Progress) -> dict[str, Any]:
    """Perplexities of the teacher and of the start, unless an earlier command took them."""
    if "untrained" in record:
        return {}
    teacher = prepared.teacher
    return {
        "teacher": teacher and perplexity(prepared, teacher, progress, "teacher"),
        "untrained": perplexity(prepared, prepared.student, progress, "untrained"),
    }


def _cached(
    prepared: Prepared, trainer: Trainer, out: Path, check: stop.Check, progress: Progress
) -> CachedTeacher:
    """The teacher's outputs on the text of the run, made or gone on with; its decoder is freed."""
    processes.refuse_many("--cache-teacher")
    assert prepared.teacher is not None, "it is refused without one"
    settings, model = prepared.recipe.training, prepared.teacher.model
    key = {"teacher": prepared.teacher_weights, "length": settings.sequence_length}
    return cached_teacher(
        model,
        prepared.corpus.blocks,
        trainer.steps * settings.batch_size,
        TeacherCache(out / runs.TEACHER_FOLDER, key),
        rows=settings.micro_batch_size or settings.batch_size,
        autocast=trainer.objective.autocast,
        reason=check.reason,
        progress=progress,
    )


def _read_on(prepared: Prepared, record: dict[str, Any], progress: Progress) -> None:
    """Begin behind the text that was read by the run which the student comes from."""
    if "text_from" not in record:
        record["text_from"] = _text_read(prepared)
    if skipped := record["text_from"]:
        said = f"Text: goes on behind the {skipped:,} blocks that the model has been trained on."
        prepared.notes.append(said)
        progress(Event("plan", said))
        prepared.corpus.blocks = islice(prepared.corpus.blocks, skipped, None)


def _text_read(prepared: Prepared) -> int:
    """Blocks of this text that a student which is a run has read before; 0 of other text."""
    student, recipe = prepared.student, prepared.recipe
    if student.kind != "run" or student.path is None:
        return 0
    run = origin.read_run(student.path)
    before = Recipe.from_json(run["recipe"])
    own, its = recipe.training, before.training
    if (list(prepared.corpus.specs), recipe.seed, own.sequence_length) != (
        run.get("data"),
        before.seed,
        its.sequence_length,
    ):
        return 0
    calibrated = its.calibration if "start" in run else 0
    return int(run.get("text_from", 0) + calibrated + run.get("steps", 0) * its.batch_size)


@dataclass(frozen=True)
class _Start:
    """The finished blocks of a start, in the run's folder and record (`ternq.calibrate.Kept`)."""

    run: Path
    record: dict[str, Any]

    def path(self, index: int) -> Path:
        return self.run / runs.START / f"{index:05d}.safetensors"

    @property
    def finished(self) -> list[dict[str, Any]]:
        """What was counted in each."""
        found: list[dict[str, Any]] = self.record.setdefault("start_blocks", [])
        return found

    def whole(self, blocks: int) -> bool:
        return len(self.finished) == blocks and all(self.path(i).is_file() for i in range(blocks))

    def load(self, index: int, block: nn.Module) -> Started | None:
        path = self.path(index)
        if index >= len(self.finished) or not path.is_file():
            return None
        states.load_state(block, checkpoint.load_tensors(path), str(path))
        return Started(**self.finished[index])

    def save(self, index: int, block: nn.Module, found: Started) -> None:
        self.finished[index:] = [vars(found)]
        if processes.is_main():
            self.path(index).parent.mkdir(exist_ok=True)
            checkpoint.save_tensors(states.unique_state(block), self.path(index))
            write_json(self.run / origin.RUN_FILE, self.record)


def _compensate(
    prepared: Prepared, out: Path, record: dict[str, Any], check: stop.Check, progress: Progress
) -> None:
    """The start that reads text; blocks that an earlier command on this run made are not made anew.

    Training reads on behind the blocks that it is calibrated on: it fits those better than other
    text, so that a training which began with them could only seem to get worse.
    """
    settings, model = prepared.recipe.training, prepared.student.model
    taken = list(islice(prepared.corpus.blocks, settings.calibration))
    kept, blocks = _Start(out, record), decoder_blocks(model)[1]
    if "start" in record and kept.whole(len(blocks)):
        for index, block in enumerate(blocks):
            kept.load(index, block)
        return
    record["start"] = compensated_start(
        model,
        torch.stack(taken),
        rows=rows_at_once(settings),
        device=prepared.device,
        autocast=products(settings, prepared.device),
        reconstruction=settings if settings.passes else None,
        seed=prepared.recipe.seed,
        progress=progress,
        check=check,
        kept=kept,
    )
    for said in record["start"]:
        progress(Event("calibrate", said))
    if processes.is_main():
        write_json(out / origin.RUN_FILE, record)


def _steps(trainer: Trainer, progress: Progress) -> int:
    """The steps asked for, or what a short probe says fits into the default time."""
    settings = trainer.settings
    if settings.steps is not None or settings.tokens is not None:
        return budget.planned_steps(settings, rate=0.0)
    progress(Event("plan", "Measuring how fast this machine trains"))
    rate = _slowest(budget.probe(trainer))
    steps = budget.planned_steps(settings, rate)
    tokens = steps * settings.batch_size * settings.sequence_length
    progress(
        Event(
            "plan",
            f"Budget: {tokens:,} tokens ({steps:,} steps) at {rate:,.0f} tokens a second, "
            f"about {tokens / rate / 60:.0f} minutes of training; --tokens changes it",
        )
    )
    return steps


def _slowest(rate: float) -> float:
    """Tokens a second of all processes together, which wait for the slowest."""
    return min(processes.gather(rate)) * processes.count()


def _afterwards(losses: list[float]) -> list[str]:
    """What is to be said of the losses of all steps; those of single ones differ by a third."""
    some = max(1, len(losses) // 10)
    first, last = (sum(part) / some for part in (losses[:some], losses[-some:]))
    if last <= first:
        return []
    steps = "step" if some == 1 else f"{some} steps (mean)"
    return [f"The loss got worse: {first:.4f} at the first {steps}, {last:.4f} at the last."]
