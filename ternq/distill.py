"""The training stage: a dense or ternary model in, a trained ternary run out.

A run is a folder that can be stopped at any instant and continued: ``run.json`` (what is made, from
what), ``base/`` (configuration and tokenizer), ``checkpoints/``, ``metrics.jsonl``, and at the end
``student.safetensors`` and ``report.json``.
"""

import copy
import hashlib
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import ternq
from ternq import budget, checkpoint, data, hf
from ternq.errors import InputError, RecipeError
from ternq.linear import (
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
from ternq.recipe import DEMO, DEMO_FOLDER, Recipe
from ternq.text import is_offline
from ternq.train import CHECKPOINTS, METRICS, Trainer, checkpoints, remove
from ternq.weights import stored_dtype, weights_summary

HELD_OUT_TOKENS = 8 * BLOCK
DEFAULT_DATA = "allenai/c4"
REPORT = "report.json"
OWN_TEXT_FILE = "self.json"
OWN_TEXT_STEPS = 100  # of text that the teacher writes where no budget is named
OWN_TEXT_TOKENS = 200_000  # written at most; a longer training reads them again


@dataclass
class Prepared:
    """Everything the loop needs, checked; nothing is trained or written yet."""

    recipe: Recipe
    teacher: hf.Loaded
    student: hf.Loaded
    selection: Selection
    held_out: Tensor  # int64 [tokens]
    blocks: Iterator[Tensor]
    text: str  # what the held-out perplexity is measured on
    notes: list[str]


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
        remove(old)
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
    found = _existing(out, overwrite, resume)
    prepared = prepare_run(model, recipe, cache=out, progress=progress, **options)
    if found:
        _same_run(out, prepared, progress)
    else:
        _begin_run(out, prepared)
    return prepared, hf.read_run(out)


def _existing(out: Path, overwrite: bool, resume: bool | None) -> bool:
    """Whether ``out`` is a run to go on with; anything else in its place is refused or removed."""
    if (out / hf.RUN_FILE).is_file():
        if overwrite or resume is False:
            if not overwrite:
                raise RecipeError(f"'{out}' holds a run.", "Go on with it, or pass --overwrite.")
            remove_run(out)
            return False
        return True
    if resume:
        raise InputError(f"There is no run to resume in '{out}'.", "Leave --resume out.")
    begun = {OWN_TEXT_FILE, hf.BASE_FOLDER}  # all there is if a start was cut off
    if out.exists() and (not out.is_dir() or any(p.name not in begun for p in out.iterdir())):
        raise RecipeError(
            f"'{out}' exists and is no run of ternq.", "Choose another folder with -o."
        )
    return False


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
    write_own_text: bool = True,
) -> Prepared:
    """Load teacher and student, put the ternary layers in, choose strategy and text."""
    if device == "cpu":
        torch.manual_seed(recipe.seed)
    options: dict[str, Any] = {
        "device": device,
        "offline": offline,
        "trust_remote_code": trust_remote_code,
    }
    progress(Event("load", f"Loading {model}"))
    base = hf.load(model, dtype=torch.float32, **options)
    notes: list[str] = []
    if base.kind == "dense":
        big = base if teacher is None else hf.load(teacher, dtype=torch.float32, **options)
        student = replace(base, model=copy.deepcopy(base.model))
        selection = prepare(student.model, recipe.scheme, recipe.training.ste)
    else:
        big, student = _from_ternary(base, teacher, options), base
        selection, recipe = _selection_of(student, recipe)
    _same_shape(big, student)
    big.model.requires_grad_(False)
    if rule := group_rule(selection, recipe.scheme.group_size):
        notes.append(rule)
    training, why = budget.choose(student.model, recipe.training, device)
    notes.append(f"Strategy: {why}.")
    longest = hf.max_length(student.model)
    if training.sequence_length > longest:
        notes.append(f"Blocks of {longest} tokens: the model was made for no more positions.")
        training = replace(training, sequence_length=longest)
    recipe = replace(
        recipe, training=training, base=hf.fingerprint(base.model), version=ternq.__version__
    )
    cache = cache if write_own_text else None
    held_out, blocks, text = _text(big, recipe, offline, progress, notes, cache)
    for note in notes:
        progress(Event("plan", note))
    return Prepared(recipe, big, student, selection, held_out, blocks, text, notes)


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
    model = record.get("recipe", {}).get("model")
    return model if isinstance(model, str) else None


def _selection_of(student: hf.Loaded, recipe: Recipe) -> tuple[Selection, Recipe]:
    """The layers that are ternary already, as layers in training; the scheme is theirs."""
    for name, layer in packed_layers(student.model).items():
        new = TernaryLinear.from_packed(layer, recipe.training.ste)
        student.model.set_submodule(name, new)
    layers = ternary_layers(student.model)
    if hasattr(student.model.config, "quantization_config"):
        del student.model.config.quantization_config
    first = next(iter(layers.values()))
    scheme = replace(
        recipe.scheme, group_size=first.group_size, shift=first.weight_shift is not None
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


def _text(
    teacher: hf.Loaded,
    recipe: Recipe,
    offline: bool,
    progress: Progress,
    notes: list[str],
    cache: Path | None,
) -> tuple[Tensor, Iterator[Tensor], str]:
    """Held-out tokens, the endless stream of training blocks, and the name of the text."""
    length = recipe.training.sequence_length
    if teacher.source == DEMO and not recipe.training.data:
        documents = data.read_documents(str(DEMO_FOLDER / "heldout.jsonl.xz"))
        ids = torch.tensor([i for d in data.encode(list(documents), teacher.tokenizer) for i in d])
        stream = data.mixed([str(DEMO_FOLDER / "train.jsonl.xz")], seed=recipe.seed)
        blocks = data.blocks(stream, teacher.tokenizer, length)
        return ids, blocks, "held-out modules of Python's standard library"
    specs = recipe.training.data
    if not specs:
        reachable = not is_offline(offline)
        specs = (DEFAULT_DATA,) if reachable else (data.SELF,)
        why = "no --data was given" + ("" if reachable else " and the hub is not to be reached")
        text = DEFAULT_DATA if reachable else "the teacher's own"
        notes.append(f"Text: {text} ({why}).")
    written: list[str] = []
    if any(name == data.SELF for name, _ in data.parse_mix(specs)):
        written = _own_text(teacher, recipe, progress, cache)
    held_out, blocks = data.split_held_out(
        specs,
        teacher.tokenizer,
        length,
        max(1, HELD_OUT_TOKENS // length) if not written else max(1, len(written) // 8),
        seed=recipe.seed,
        offline=offline,
        progress=progress,
        written=written,
    )
    return held_out.flatten(), blocks, "held out of " + ", ".join(specs)


def _own_text(
    teacher: hf.Loaded, recipe: Recipe, progress: Progress, cache: Path | None
) -> list[str]:
    """Text that the teacher writes; kept in the run's folder, since writing it takes long."""
    length = recipe.training.sequence_length
    per_step = recipe.training.batch_size * length
    tokens = recipe.training.tokens or (recipe.training.steps or OWN_TEXT_STEPS) * per_step
    blocks = max(16, min(tokens, OWN_TEXT_TOKENS) // length) + HELD_OUT_TOKENS // length // 4
    kept = None if cache is None else cache / OWN_TEXT_FILE
    key = [teacher.source, recipe.base, recipe.seed, blocks, length]
    if kept is not None and kept.is_file():
        record = checkpoint.read_json(kept)
        if record.get("key") == key:
            return list(record["text"])
    ids = data.teacher_text(
        teacher.model, teacher.tokenizer, blocks, length, seed=recipe.seed, progress=progress
    )
    written = [teacher.tokenizer.decode(row, skip_special_tokens=True) for row in ids.tolist()]
    if kept is not None:
        kept.parent.mkdir(parents=True, exist_ok=True)
        checkpoint.write_json(kept, {"key": key, "text": written})
    return written


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
    trainer = Trainer(
        student=student.model,
        teacher=prepared.teacher.model,
        blocks=prepared.blocks,
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
    if "teacher" not in record:
        record["teacher"] = perplexity(prepared, prepared.teacher, progress, "teacher")
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
        "recipe": recipe.to_json(),
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
        "notes": prepared.notes + _afterwards(trainer.losses),
        "seconds": time.monotonic() - began,
    }


def perplexity(
    prepared: Prepared, loaded: hf.Loaded, progress: Progress, who: str
) -> dict[str, Any]:
    """Token perplexity on the held-out text, as the contract writes it."""
    length = min(BLOCK, hf.max_length(loaded.model))
    measured = token_perplexity(
        loaded.model, prepared.held_out, length, progress=progress, stage=f"evaluate {who}"
    )
    return {
        "perplexity": measured["token_perplexity"],
        "metric": "token_perplexity",
        "text": prepared.text,
        "samples": measured["blocks"],
        "length": measured["block_length"],
    }


def _steps(trainer: Trainer, progress: Progress) -> int:
    """The steps asked for, or what a short probe says fits into the default time."""
    settings = trainer.settings
    if settings.steps is not None or settings.tokens is not None:
        return budget.planned_steps(settings, rate=0.0)
    progress(Event("plan", "Measuring how fast this machine trains"))
    rate = budget.probe(trainer, trainer.student.get_output_embeddings().weight.shape[0])
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


def _begin_run(out: Path, prepared: Prepared) -> None:
    with checkpoint.writing(out):
        out.mkdir(parents=True, exist_ok=True)
        hf.save_base(prepared.student, out / hf.BASE_FOLDER)
    record = {
        "ternq_run": 1,
        "recipe": prepared.recipe.to_json(),
        "modules": list(ternary_layers(prepared.student.model)),
        "dtype": str(prepared.student.dtype).removeprefix("torch."),
        "text_sha256": _digest(prepared.held_out),
        "notes": prepared.notes,
    }
    checkpoint.write_json(out / hf.RUN_FILE, record)


def _same_run(out: Path, prepared: Prepared, progress: Progress) -> None:
    record = hf.read_run(out)
    differences = prepared.recipe.differences(Recipe.from_json(record["recipe"]))
    if not differences and record.get("text_sha256") != _digest(prepared.held_out):
        differences = ["the text is another"]
    if differences:
        raise RecipeError(
            f"'{out}' is a run of another recipe ({'; '.join(differences)}).",
            "Go on with the same options, choose another -o, or pass --overwrite.",
        )
    progress(Event("plan", f"Going on with the run in {out}"))


def _afterwards(losses: list[float]) -> list[str]:
    if losses and losses[-1] > losses[0]:
        return [
            f"The loss got worse: {losses[0]:.4f} at the first step, {losses[-1]:.4f} at the last."
        ]
    return []


def _digest(ids: Tensor) -> str:
    return hashlib.sha256(ids.numpy().tobytes()).hexdigest()


def remove_run(out: Path) -> None:
    """Remove what a run wrote, and nothing else."""
    for old in [*(out / CHECKPOINTS).glob("step-*"), out / hf.BASE_FOLDER]:
        if old.is_dir():
            remove(old)
    for name in (hf.RUN_FILE, hf.STUDENT_FILE, REPORT, METRICS, OWN_TEXT_FILE):
        (out / name).unlink(missing_ok=True)
    for folder in (out / CHECKPOINTS, out):
        if folder.is_dir() and not any(folder.iterdir()):
            folder.rmdir()
