"""The training stage: a dense or ternary model in, a trained ternary run out.

A run is a folder (`ternq.runs`) that can be stopped at any instant and continued; at the end it has
``student.safetensors`` and ``report.json``.
"""

import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import chain, islice
from pathlib import Path
from typing import Any

import torch

import ternq
from ternq import budget, checkpoint, hf, optimize, processes, runs, scratch, snapshots, trackers
from ternq import corpus as corpora
from ternq.calibrate import compensated_start
from ternq.errors import InputError, RecipeError
from ternq.frozen import arrange, fold, made_on_host, plain_state
from ternq.linear import (
    AbsmeanLinear,
    Selection,
    TernaryLinear,
    decoder_blocks,
    group_rule,
    packed_layers,
    prepare,
    ternary_layers,
)
from ternq.perplexity import BLOCK, token_perplexity
from ternq.progress import Event, Progress, ignore
from ternq.recipe import Recipe, Scheme, refuse_rounding
from ternq.reconstruct import rows_at_once
from ternq.runs import REPORT
from ternq.student import student_of
from ternq.teacher import CachedTeacher, TeacherCache, cached_teacher
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
    teacher_weights: str  # their fingerprint
    dense: bool = True  # what is trained was; else it was ternary already
    device: str = "cpu"  # that it is trained on

    def settle(self) -> None:
        """Have weights held as training holds them, and where."""
        pair = [loaded.model for loaded in (self.student, self.teacher) if loaded is not None]
        self.selection.chosen.clear()  # dense layers, which are to go
        arrange(pair[0], self.recipe.training, self.recipe.seed, *pair[1:])
        for model in pair:
            model.to(self.device)


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
    if recipe.training.block_by_block:
        raise RecipeError(
            "--block-by-block leaves no student that could be trained on.",
            "ternq ternarize makes the packed model so.",
        )
    refuse_rounding(recipe)
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
            return checkpoint.read_json(out / REPORT)
        report = train_run(
            prepared, out, record, time_limit=time_limit, log_with=log_with, progress=progress
        )
        if not processes.is_main():
            return report
        report["student"] = perplexity(prepared, prepared.student, progress, "student")
        checkpoint.write_json(out / REPORT, report)
        snapshots.drop_all(out)  # only now: a run that stops before it is done goes on from them
        (out / runs.START_FILE).unlink(missing_ok=True)
        shutil.rmtree(out / runs.TEACHER_FOLDER, ignore_errors=True)
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
    built, device = hf.blueprint(model, **access), options.get("device", "cpu")
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
        _open(prepared, out, record, resume, overwrite, device, access["offline"], progress)
        return hf.read_run(out)

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
        licence = hf.licence(prepared.recipe.model, student.path, offline)
        runs.begin(out, prepared.recipe, student, identity, specs, licence)


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
    notes: Sequence[str] = (),
) -> Prepared:
    """Load teacher and student, put the ternary layers in, choose strategy and text.

    The recipe has been through `fitting`, which said ``notes``.
    ``record`` is that of a run to go on with: what was chosen for it then is chosen again, whatever
    memory and network say now.
    """
    optimize.refuse(recipe.training, device)
    if device == "cpu":
        torch.manual_seed(recipe.seed)
    options: dict[str, Any] = {
        "device": "cpu" if made_on_host(recipe.training, device) else device,
        "offline": offline,
        "trust_remote_code": trust_remote_code,
    }
    notes = list(notes)
    if recipe.training.from_scratch:
        base = hf.drawn(model, recipe.seed, progress=progress, **options)
    else:
        base = hf.load(model, dtype=torch.float32, progress=progress, **options)
    refuse_own_code(base)
    big: hf.Loaded | None
    if base.kind == "dense":
        recipe = replace(recipe, scheme=scratch.settle(base.model, recipe.scheme, notes))
    if recipe.training.from_scratch:
        big = None if teacher is None else hf.load(teacher, dtype=torch.float32, **options)
        student, selection = base, prepare(base.model, recipe.scheme, recipe.training.ste)
    elif base.kind == "dense":
        big = base if teacher is None else hf.load(teacher, dtype=torch.float32, **options)
        pupil, selection = student_of(base.model, recipe.scheme, recipe.training)
        student = replace(base, model=pupil)
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
    if rule and recipe.scheme.method != "absmean":
        notes.append(rule)
    recipe = replace(recipe, base=hf.fingerprint(base.model), version=ternq.__version__)
    taught = "" if big is None else recipe.base if big is base else hf.fingerprint(big.model)
    writer = big or student
    specs, note = text_of(writer, recipe.training.data, record, offline)
    notes += [note] if note else []
    if recipe.training.cache_teacher and recipe.training.off:
        notes.append("OFF: at the last block alone, which is what --cache-teacher keeps.")
    if recipe.training.teacher_dtype != "float32":
        held = recipe.training.teacher_dtype
        notes.append(f"Teacher: its layers are held in {held}, and so it is measured.")
    for note in notes:
        progress(Event("plan", note))
    if big is None:
        scratch.refuse_own_text(specs)
    if not open_text and corpora.has_own_text(specs):
        text = corpora.unwritten(specs)
    else:
        whole = recipe
        text = processes.main_first(
            lambda: corpora.corpus(
                writer, whole, specs, offline=offline, progress=progress, cache=cache
            )
        )
    dense = base.kind == "dense"
    return Prepared(recipe, big, student, selection, text, notes, taught, dense, device)


def refuse_own_code(base: hf.Loaded) -> None:
    """`InputError` for a model whose code could not go with what is packed."""
    if "auto_map" in vars(base.model.config):
        raise InputError(f"'{base.source}' brings its own code, which ternq cannot pack yet.")


def text_of(
    writer: hf.Loaded, asked: tuple[str, ...], record: dict[str, Any] | None, offline: bool
) -> tuple[tuple[str, ...], str | None]:
    """The text to train on, and what is to be said of it; of a run that was begun, as it was."""
    if record is not None and not asked:
        return tuple(record.get("data", ())), None
    return processes.from_main(lambda: corpora.choose(writer, asked, offline))


def fitting(
    built: hf.Blueprint,
    recipe: Recipe,
    device: str,
    memory: int | None = None,
    record: dict[str, Any] | None = None,
    by_blocks: bool = False,
    exact: bool = False,
) -> tuple[Recipe, budget.Memory | None, list[str]]:
    """The recipe with the strategy that fits, and no more positions than the model has.

    Nothing is loaded for it. ``by_blocks``: going block by block is one of them; ``exact``: memory
    is counted even where there is plenty. ``memory`` are bytes, by default what the device has
    free. Returns the memory counted for it (None where ``record`` has the strategy), and what was
    chosen in words.
    """
    training, notes = recipe.training, []
    longest = hf.max_length(built)
    if training.sequence_length > longest:
        notes.append(f"Blocks of {longest} tokens: the model was made for no more positions.")
        training = replace(training, sequence_length=longest)
    counted = None
    if recipe.only_rounds:
        counted, why = budget.rounding(built, training, device, memory)
        notes.append(f"Strategy: {why}.")
    elif record is None:
        scheme = built.scheme or recipe.scheme
        by_blocks = by_blocks and built.by_blocks
        training, counted, why = budget.choose(
            built, scheme, training, device, memory, by_blocks=by_blocks, exact=exact
        )
        notes.append(f"Strategy: {why}.")
    else:
        then = Recipe.from_json(record["recipe"]).training
        training = replace(
            training,
            micro_batch_size=training.micro_batch_size or then.micro_batch_size,
            gradient_checkpointing=training.gradient_checkpointing or then.gradient_checkpointing,
            train=then.train if training.train == "all" else training.train,
            teacher_dtype=then.teacher_dtype
            if training.teacher_dtype == "float32"
            else training.teacher_dtype,
            block_by_block=training.block_by_block or then.block_by_block,
        )
        notes += [f"Strategy: {budget.BY_BLOCKS}."] if training.block_by_block else []
    return replace(recipe, training=training), counted, notes


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
    log_with: tuple[str, ...] = (),
    progress: Progress,
) -> dict[str, Any]:
    """Measure teacher and start, train to the end, save the student.

    Returns the fields of ``distill`` but the student's perplexity: `distill` measures the student,
    `ternq.ternarize` what became of it in the file. After the last step processes part: what is
    returned is the main one's to go on with.
    """
    began = time.monotonic()
    recipe, student = prepared.recipe, prepared.student
    if recipe.training.start != "closed-form" and prepared.dense:
        _compensate(prepared, out, record, progress)
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
        time_limit=time_limit,
        log_with=log_with,
        seed=recipe.seed,
    )
    steps = record.get("steps")
    if steps is None:
        steps = _steps(trainer, progress)
        record |= {"steps": steps}
    processes.from_main(lambda: checkpoint.write_json(out / hf.RUN_FILE, record))
    trainer.steps = steps
    if recipe.training.cache_teacher:
        trainer.learn_from(_cached(prepared, trainer, out, progress))
    if trainer.restore():
        progress(Event("train", f"Going on after step {trainer.step} of {steps}"))
    trainer.run()
    fold(student.model)
    state = plain_state(student.model, processes.gathered(hf.unique_state(student.model)))
    processes.leave()
    if not processes.is_main():
        return {"model": recipe.model}
    checkpoint.save_tensors(state, out / hf.STUDENT_FILE)
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
            *_afterwards(trainer.losses),
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


def _cached(prepared: Prepared, trainer: Trainer, out: Path, progress: Progress) -> CachedTeacher:
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
        progress=progress,
    )


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
    reconstructed = settings.start == "reconstructed"
    record["start"] = compensated_start(
        model,
        torch.stack(taken),
        rows=rows_at_once(settings, reconstructed),
        autocast=torch.autocast(device.type, torch.bfloat16, enabled=has_bf16(device)),
        reconstruction=settings if reconstructed else None,
        seed=prepared.recipe.seed,
        progress=progress,
    )
    for said in record["start"]:
        progress(Event("calibrate", said))
    if processes.is_main():
        checkpoint.save_tensors(hf.unique_state(model), path)
        checkpoint.write_json(out / hf.RUN_FILE, record)


def as_made(prepared: Prepared, steps: int) -> Recipe:
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
    return described(prepared, measured)


def described(prepared: Prepared, measured: dict[str, Any]) -> dict[str, Any]:
    """What `token_perplexity` found on the held-out text, as the contract writes it."""
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
    if losses and losses[-1] > losses[0]:
        return [
            f"The loss got worse: {losses[0]:.4f} at the first step, {losses[-1]:.4f} at the last."
        ]
    return []
