"""The training stage: a dense or ternary model in, a trained ternary run out.

A run is a folder (`ternq.runs`) that can be stopped at any instant and continued; at the end it has
``student.safetensors`` and ``report.json``.
"""

import copy
import shutil
import time
from dataclasses import dataclass, replace
from itertools import chain, islice
from pathlib import Path
from typing import Any

import torch

import ternq
from ternq import budget, checkpoint, hf, runs, scratch
from ternq import corpus as corpora
from ternq.calibrate import compensated_start
from ternq.errors import InputError, RecipeError
from ternq.linear import (
    AbsmeanLinear,
    Selection,
    TernaryLinear,
    decoder_blocks,
    group_rule,
    packed_layers,
    ternary_layers,
)
from ternq.perplexity import BLOCK, token_perplexity
from ternq.progress import Event, Progress, ignore
from ternq.recipe import Recipe, Scheme, Training
from ternq.runs import REPORT
from ternq.snapshots import checkpoints
from ternq.train import Trainer, has_bf16
from ternq.weights import stored_dtype, weights_summary


@dataclass
class Prepared:
    """Everything the loop needs, checked; nothing is trained or written yet."""

    recipe: Recipe
    teacher: hf.Loaded | None  # None: learns from text alone
    student: hf.Loaded
    selection: Selection
    corpus: corpora.Corpus
    notes: list[str]
    dense: bool = True  # what is trained was; else it was ternary already


def distill(
    model: str,
    out: Path,
    recipe: Recipe,
    *,
    teacher: str | None = None,
    resume: bool | None = None,
    overwrite: bool = False,
    time_limit: float | None = None,
    device: str = "cpu",
    offline: bool = False,
    trust_remote_code: bool = False,
    progress: Progress = ignore,
) -> dict[str, Any]:
    """Train a ternary student of ``model`` into the run folder ``out``, or go on where it stopped.

    Returns the fields of the contract for ``distill``. ``resume``: True must, False must not.

    Raises:
        RecipeError: ``out`` holds something else, or a run of another recipe.
        StoppedError, InterruptedByUser, DivergenceError: see `ternq.train.Trainer.run`.
    """
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
        progress(Event("done", f"{out} is finished already; nothing to do"))
        return checkpoint.read_json(out / REPORT)
    report = train_run(prepared, out, record, time_limit=time_limit, progress=progress)
    report["student"] = perplexity(prepared, prepared.student, progress, "student")
    checkpoint.write_json(out / REPORT, report)
    for old in checkpoints(out):  # only now: a run that stops before it is done goes on from them
        shutil.rmtree(old)
    (out / runs.START_FILE).unlink(missing_ok=True)
    return report


def begin(
    model: str,
    out: Path,
    recipe: Recipe,
    *,
    resume: bool | None = None,
    overwrite: bool = False,
    progress: Progress = ignore,
    **options: Any,
) -> tuple[Prepared, dict[str, Any]]:
    """Check and load everything; open the run folder ``out``, or find it to be of this recipe.

    ``options`` are those of `prepare_run`. Returns what the loop needs and the run's record.
    """
    runs.refuse_input(out, [model, options.get("teacher")])
    record = runs.existing(out, resume, overwrite)
    prepared = prepare_run(model, recipe, cache=out, record=record, progress=progress, **options)
    if record is not None:
        found = runs.differences(record, prepared.recipe, prepared.corpus.held_out)
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
    if record is None:
        student, text = prepared.student, prepared.corpus
        licence = hf.licence(model, student.path, bool(options.get("offline")))
        specs = list(text.specs)
        runs.begin(out, prepared.recipe, student, text.held_out, specs, licence)
    return prepared, hf.read_run(out)


def prepare_run(
    model: str,
    recipe: Recipe,
    *,
    teacher: str | None = None,
    device: str = "cpu",
    offline: bool = False,
    trust_remote_code: bool = False,
    progress: Progress = ignore,
    cache: Path | None = None,
    record: dict[str, Any] | None = None,
    open_text: bool = True,
) -> Prepared:
    """Load teacher and student, put the ternary layers in, choose strategy and text.

    ``record`` is that of a run to go on with: what was chosen for it then is chosen again, whatever
    memory and network say now.
    """
    if device == "cpu":
        torch.manual_seed(recipe.seed)
    options: dict[str, Any] = {
        "device": device,
        "offline": offline,
        "trust_remote_code": trust_remote_code,
    }
    scratch.check(recipe, teacher)
    if recipe.training.from_scratch:
        base = hf.drawn(model, recipe.seed, progress=progress, **options)
    else:
        base = hf.load(model, dtype=torch.float32, progress=progress, **options)
    if "auto_map" in vars(base.model.config):
        raise InputError(f"'{model}' brings its own code, which ternq cannot pack yet.")
    notes: list[str] = []
    big: hf.Loaded | None
    if recipe.training.from_scratch:
        big = None if teacher is None else hf.load(teacher, dtype=torch.float32, **options)
        student = base
        selection, recipe = scratch.prepare(student.model, recipe, notes)
    elif base.kind == "dense":
        big = base if teacher is None else hf.load(teacher, dtype=torch.float32, **options)
        budget.refuse_without_room(base.model, device)
        student = replace(base, model=copy.deepcopy(base.model))
        selection, recipe = scratch.prepare(student.model, recipe, notes)
    else:
        alone = recipe.training.objective == "ce" and _recorded_base(base) is None
        big, student = None if alone else _from_ternary(base, teacher, options), base
        selection, recipe = _selection_of(student, recipe)
        if recipe.training.start != "closed-form":
            notes.append("Start: the codes that the model has; --start is for dense models.")
    if big is not None:
        _same_shape(big, student)
        big.model.requires_grad_(False)
    rule = group_rule(selection, recipe.scheme.group_size)
    if rule and recipe.scheme.method == "dlt":
        notes.append(rule)
    recipe = replace(recipe, base=hf.fingerprint(base.model), version=ternq.__version__)
    recipe = replace(recipe, training=_fitting(student, recipe.training, record, device, notes))
    writer = big or student
    specs, note = corpora.choose(writer, recipe.training.data, offline)
    if record is not None and not recipe.training.data:
        specs, note = tuple(record.get("data", ())), None
    notes += [note] if note else []
    for note in notes:
        progress(Event("plan", note))
    if big is None:
        scratch.refuse_own_text(specs)
    if not open_text and corpora.has_own_text(specs):
        text = corpora.unwritten(specs)
    else:
        text = corpora.corpus(
            writer, recipe, specs, offline=offline, progress=progress, cache=cache
        )
    return Prepared(recipe, big, student, selection, text, notes, base.kind == "dense")


def _fitting(
    student: hf.Loaded,
    training: Training,
    record: dict[str, Any] | None,
    device: str,
    notes: list[str],
) -> Training:
    """The training settings with the strategy that fits, and no more positions than there are."""
    if record is None:
        training, why = budget.choose(student.model, training, device)
        notes.append(f"Strategy: {why}.")
    else:
        then = Recipe.from_json(record["recipe"]).training
        training = replace(
            training,
            micro_batch_size=training.micro_batch_size or then.micro_batch_size,
            gradient_checkpointing=training.gradient_checkpointing or then.gradient_checkpointing,
        )
    longest = hf.max_length(student.model)
    if training.sequence_length > longest:
        notes.append(f"Blocks of {longest} tokens: the model was made for no more positions.")
        training = replace(training, sequence_length=longest)
    return training


def _from_ternary(base: hf.Loaded, teacher: str | None, options: dict[str, Any]) -> hf.Loaded:
    source = teacher or _recorded_base(base)
    if source is None:
        raise InputError(
            f"'{base.source}' is ternary, and does not say what it was made from.",
            "Name its full-precision teacher with --teacher.",
        )
    try:
        found = hf.load(source, dtype=torch.float32, **options)
    except InputError as error:
        hint = "Name the full-precision teacher with --teacher."
        raise InputError(error.message, hint) from error
    return found if teacher or found.kind == "dense" else _from_ternary(found, None, options)


def _recorded_base(base: hf.Loaded) -> str | None:
    if base.path is None:
        return None
    if base.kind == "run":
        record = hf.read_run(base.path)
    elif (base.path / checkpoint.MANIFEST).is_file():
        record = checkpoint.read_manifest(base.path)
    else:  # an artefact that was loaded and saved again
        return None
    recipe = record.get("recipe", {})
    if (recipe.get("training") or {}).get("from_scratch"):
        return None
    model = recipe.get("model")
    return model if isinstance(model, str) else None


def _selection_of(student: hf.Loaded, recipe: Recipe) -> tuple[Selection, Recipe]:
    """The layers that are ternary already, as layers in training; the scheme is theirs."""
    hf.undo_int8(student.model)
    for name, layer in packed_layers(student.model).items():
        new = TernaryLinear.from_packed(layer, recipe.training.ste)
        student.model.set_submodule(name, new)
    layers = ternary_layers(student.model)
    if hasattr(student.model.config, "quantization_config"):
        del student.model.config.quantization_config
    first = next(iter(layers.values()))
    scheme = Scheme(
        group_size=first.group_size,
        shift=first.weight_shift is not None,
        method="absmean" if isinstance(first, AbsmeanLinear) else "dlt",
    )
    if recipe.scheme not in (scheme, Scheme()):
        raise RecipeError(
            f"'{student.source}' is ternary already, with --group-size {scheme.group_size} and "
            f"{'--shift' if scheme.shift else '--no-shift'}; its layers cannot be chosen again.",
            "Leave --group-size, --shift and --skip out, or start from the dense model.",
        )
    return Selection(dict(layers)), replace(recipe, scheme=scheme)


def _same_shape(teacher: hf.Loaded, student: hf.Loaded) -> None:
    a, b = teacher.model, student.model
    vocabularies = [m.get_output_embeddings().weight.shape[0] for m in (a, b)]
    if vocabularies[0] != vocabularies[1] or teacher.tokenizer.get_vocab() != (
        student.tokenizer.get_vocab()
    ):
        raise RecipeError(
            f"Teacher '{teacher.source}' and student '{student.source}' differ in vocabulary."
        )
    if len(decoder_blocks(a)[1]) != len(decoder_blocks(b)[1]):
        raise RecipeError(
            f"Teacher '{teacher.source}' and student '{student.source}' differ in their blocks."
        )


def train_run(
    prepared: Prepared,
    out: Path,
    record: dict[str, Any],
    *,
    time_limit: float | None,
    progress: Progress,
) -> dict[str, Any]:
    """Measure teacher and start, train to the end, save the student.

    Returns the fields of ``distill`` but the student's perplexity: `distill` measures the student,
    `ternq.ternarize` what became of it in the file.
    """
    began = time.monotonic()
    recipe, student = prepared.recipe, prepared.student
    if recipe.training.start == "compensated" and prepared.dense:
        _compensate(prepared, out, record, progress)
    trainer = Trainer(
        student=student.model,
        teacher=prepared.teacher and prepared.teacher.model,
        blocks=prepared.corpus.blocks,
        settings=recipe.training,
        steps=0,
        folder=out,
        progress=progress,
        time_limit=time_limit,
    )
    steps = record.get("steps")
    if steps is None:
        steps = _steps(trainer, progress)
        record |= {"steps": steps}
    if "untrained" not in record:
        teacher = prepared.teacher
        measured = None if teacher is None else perplexity(prepared, teacher, progress, "teacher")
        record["teacher"] = measured
        record["untrained"] = perplexity(prepared, student, progress, "untrained")
    checkpoint.write_json(out / hf.RUN_FILE, record)
    trainer.steps = steps
    if trainer.restore():
        progress(Event("train", f"Going on after step {trainer.step} of {steps}"))
    trainer.run()
    checkpoint.save_tensors(hf.unique_state(student.model), out / hf.STUDENT_FILE)
    student.model.eval()
    tokens = steps * recipe.training.batch_size * recipe.training.sequence_length
    return {
        "model": recipe.model,
        "teacher": record["teacher"],
        "untrained": record["untrained"],
        "recipe": _as_made(prepared, steps).to_json(),
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
        "notes": prepared.notes + record.get("start", []) + _afterwards(trainer.losses),
        "seconds": time.monotonic() - began,
    }


def _compensate(prepared: Prepared, out: Path, record: dict[str, Any], progress: Progress) -> None:
    """The compensated start, or what an earlier command on this run made of it.

    It is calibrated on the blocks of text that training then begins with.
    """
    settings, model, corpus = prepared.recipe.training, prepared.student.model, prepared.corpus
    path = out / runs.START_FILE
    if "start" in record and path.is_file():
        hf.load_state(model, checkpoint.load_tensors(path), str(path))
        return
    taken = list(islice(corpus.blocks, settings.calibration))
    corpus.blocks = chain(taken, corpus.blocks)
    device = next(model.parameters()).device
    record["start"] = compensated_start(
        model,
        torch.stack(taken),
        rows=settings.micro_batch_size or settings.batch_size,
        autocast=torch.autocast(device.type, torch.bfloat16, enabled=has_bf16(device)),
        progress=progress,
    )
    for said in record["start"]:
        progress(Event("calibrate", said))
    checkpoint.save_tensors(hf.unique_state(model), path)
    checkpoint.write_json(out / hf.RUN_FILE, record)


def _as_made(prepared: Prepared, steps: int) -> Recipe:
    """The recipe with what was left to the machine filled in, so that it can be replayed."""
    recipe = prepared.recipe
    training = replace(recipe.training, steps=steps, tokens=None, data=prepared.corpus.specs)
    return replace(recipe, training=training)


def perplexity(
    prepared: Prepared, loaded: hf.Loaded, progress: Progress, who: str
) -> dict[str, Any]:
    """Token perplexity on the held-out text, as the contract writes it."""
    length = min(BLOCK, hf.max_length(loaded.model))
    measured = token_perplexity(
        loaded.model, prepared.corpus.held_out, length, progress=progress, stage=f"evaluate {who}"
    )
    return {
        "perplexity": measured["token_perplexity"],
        "metric": "token_perplexity",
        "word_perplexity": _per_word(measured, prepared),
        "text": prepared.corpus.name,
        "samples": measured["blocks"],
        "length": measured["block_length"],
    }


def _per_word(measured: dict[str, Any], prepared: Prepared) -> float | None:
    """The perplexity per word of the same text: token perplexity to the power of tokens per word.

    Words are what lies between white space, as in lm-eval.
    """
    ids = prepared.corpus.held_out[: measured["tokens"]]
    words = len(prepared.student.tokenizer.decode(ids, skip_special_tokens=True).split())
    if not words:
        return None
    try:
        return float(measured["token_perplexity"] ** (measured["tokens"] / words))
    except OverflowError:
        return None


def _steps(trainer: Trainer, progress: Progress) -> int:
    """The steps asked for, or what a short probe says fits into the default time."""
    settings = trainer.settings
    if settings.steps is not None or settings.tokens is not None:
        return budget.planned_steps(settings, rate=0.0)
    progress(Event("plan", "Measuring how fast this machine trains"))
    rate = budget.probe(trainer)
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


def _afterwards(losses: list[float]) -> list[str]:
    if losses and losses[-1] > losses[0]:
        return [
            f"The loss got worse: {losses[0]:.4f} at the first step, {losses[-1]:.4f} at the last."
        ]
    return []
