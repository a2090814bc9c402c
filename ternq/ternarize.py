"""The main job: a checkpoint in, a packed, verified and measured ternary artefact out.

It is the other verbs in a row: `distill` into a run beside the output (``NAME.run``, which a
stopped command goes on with), `pack`, and the perplexity of what was packed, loaded again.
"""

import shutil
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from ternq import baseline, distill, hf, origin, processes, runs, streamed, trackers
from ternq.errors import InputError, RecipeError
from ternq.evaluate import evaluate
from ternq.files import read_json, renamed, write_json
from ternq.linear import ternary_layers
from ternq.measure import Limit, check_metrics
from ternq.memory import give_back
from ternq.metrics import METRICS, steps_of
from ternq.origin import REPORT
from ternq.pack import pack
from ternq.page import page
from ternq.prepared import Prepared, perplexity
from ternq.progress import Event, Progress, ignore
from ternq.publish import (
    check_output,
    manifest_of,
    read_manifest,
    report_folder,
    verify_files,
)
from ternq.recipe import Recipe, flag, refuse_scratch, untrained
from ternq.report import markdown
from ternq.samples import PROMPTS, continued
from ternq.tasks import Job, load_jobs
from ternq.weights import layer_diagnostics


def ternarize(
    model: str,
    out: Path,
    recipe: Recipe,
    *,
    resume: bool | None = None,
    overwrite: bool = False,
    keep_dtype: bool = False,
    embeddings: str = "keep",
    tasks: tuple[str, ...] = (),
    limit: Limit = None,
    data_dir: str | Path | None = None,
    made: dict[str, Any] | None = None,
    time_limit: float | None = None,
    log_with: tuple[str, ...] = (),
    device: str = "cpu",
    offline: bool = False,
    trust_remote_code: bool = False,
    progress: Progress = ignore,
) -> dict[str, Any]:
    """Make ``model`` ternary and write the packed artefact to ``out``: the contract's fields.

    A finished artefact of the same recipe is left as it is, and its report returned. ``tasks`` are
    measured of ``model`` and of the artefact, as `ternq.evaluate.evaluate` does, before it gets its
    name. ``made`` (a command, versions) goes into its manifest and card.

    Raises:
        RecipeError: ``out`` holds something else; see `ternq.distill.distill` for the rest.
    """
    trackers.check(log_with)
    refuse_scratch(recipe)
    recipe = untrained(recipe)
    baseline.check(recipe, embeddings, keep_dtype)
    run = runs.of_artefact(out)
    asked = _request(recipe, keep_dtype, embeddings, tasks, limit)
    # a command that ended between packing and its report goes on, and packs once more
    begun = (run / origin.RUN_FILE).is_file() and not (report_folder(out) / REPORT).is_file()
    half = begun and _made(out, asked)
    finished = None if overwrite or half else _finished(out, recipe, asked)
    if finished is not None:
        if runs.half_removed(run):
            with runs.locked(run, None, True, []):
                runs.remove(run)
        progress(Event("done", f"{out} is finished already with this recipe; nothing to do"))
        return finished
    jobs = _jobs(tasks, data_dir, offline)
    runs.refuse_input(out, [model])
    check_output(out, overwrite or half)
    with runs.locked(run, resume, overwrite, [model]):
        prepared, record = distill.begin(
            model,
            run,
            recipe,
            by_blocks=streamed.prepare_run,
            resume=resume,
            overwrite=overwrite,
            device=device,
            offline=offline,
            trust_remote_code=trust_remote_code,
            progress=progress,
        )
        if prepared.teacher is None:
            raise InputError(
                f"'{model}' was trained from scratch: there is nothing to compare it with.",
                "Go on with ternq distill, then ternq pack.",
            )
        given = {"time_limit": time_limit, "log_with": log_with}
        unread = {} if tasks else {"limit": limit, "data_dir": data_dir}
        trained = _train(prepared, run, record, given, unread, progress)
        if not processes.is_main():
            return trained
        if _way(prepared) is distill and prepared.recipe.training.cache_teacher:
            # its decoder was dropped, and is needed again
            prepared.teacher = hf.load(
                prepared.teacher.source,
                dtype=torch.float32,
                device=device,
                offline=offline,
                trust_remote_code=trust_remote_code,
            )
        give_back()
        progress(Event("pack", "Packing, and loading what was packed to compare it"))
        whole, form = _source(prepared, run, embeddings, keep_dtype)
        packed = pack(
            whole,
            out,
            **form,
            overwrite=overwrite or half,
            progress=progress,
            extra=asked | ({"made": made} if made else {}),
            measure=partial(
                _measured,
                prepared=prepared,
                trained=trained,
                names=(model, str(out)),
                rounded="format" in form,
                tasks=tasks,
                jobs=jobs,
                limit=limit,
                device=device,
                progress=progress,
            ),
        )
        notes = [*trained["notes"], *packed["notes"]]
        if _way(prepared) is streamed and jobs:
            notes.append(f"{model} itself is too large for the tasks: they are of the result.")
        report = trained | packed | {"notes": notes} | ({"made": made} if made else {})
        report |= _looked_at(model, prepared, run, out, device)
        write_json(run / REPORT, report)
        keep_reports(run, out)
        write_pages(out, {"command": "ternarize", "seed": recipe.seed, **report})
        runs.remove(run)
        return report


def _way(prepared: Prepared) -> Any:
    """The module that makes the weights: block by block, by rounding alone, or by training."""
    if isinstance(prepared, streamed.Streamed):
        return streamed
    return baseline if prepared.recipe.only_rounds else distill


_READ = {distill: ("time_limit", "log_with"), streamed: ("time_limit",), baseline: ()}
_UNREAD = {
    "time_limit": "a baseline is made in one piece",
    "log_with": "there are no steps of training end to end",
    "limit": "there are no --tasks",
    "data_dir": "there are no --tasks",
}


def _train(
    prepared: Prepared,
    run: Path,
    record: dict[str, Any],
    given: dict[str, Any],
    unread: dict[str, Any],
    progress: Progress,
) -> dict[str, Any]:
    """Make the weights; of ``given`` options, those that this way does not read are ``unread``."""
    way = _way(prepared)
    read = {name: value for name, value in given.items() if name in _READ[way]}
    for name, value in sorted((given | unread).items()):
        if name not in read and value not in (None, ()):
            said = f"{flag(name)} changes nothing: {_UNREAD[name]}."
            prepared.notes.append(said)
            progress(Event("plan", said))
    return dict(way.train_run(prepared, run, record, progress=progress, **read))


def _source(
    prepared: Prepared, run: Path, embeddings: str, keep_dtype: bool
) -> tuple[Any, dict[str, Any]]:
    """What is packed, and the options of `pack` for it."""
    form = {"embeddings": embeddings, "keep_dtype": keep_dtype}
    if isinstance(prepared, streamed.Streamed):
        return streamed.source(prepared, run), form
    if prepared.recipe.only_rounds and not ternary_layers(prepared.student.model):
        return baseline.dense_source(prepared, run)
    return replace(prepared.student, kind="run", path=run), form


def _measured(
    folder: Path,
    *,
    prepared: Prepared,
    trained: dict[str, Any],
    names: tuple[str, str],
    rounded: bool,
    tasks: tuple[str, ...],
    jobs: list[Job],
    limit: Limit,
    device: str,
    progress: Progress,
) -> dict[str, Any]:
    """What is measured of the artefact in ``folder``, before it has its place, and of the teacher.

    ``names`` are those of teacher and artefact; ``rounded``: it is a dense folder, of a baseline.
    """
    by_blocks = _way(prepared) is streamed
    packed = _reloaded(folder, device, by_blocks)
    student: Any = trained.get("student")  # where the file cannot be loaded, as made
    if packed is None:
        trained["notes"].append("The packed model does not fit here: it is measured as made.")
    else:
        student = perplexity(prepared, packed, progress, "packed student")
    held_out = map(_held_out, (trained["teacher"], student))
    results = dict(zip(names, held_out, strict=True))
    models = (None if by_blocks else prepared.teacher, packed)
    for name, loaded in zip(names, models, strict=True) if jobs else ():
        if loaded is not None:
            found = evaluate([replace(loaded, name=name)], tasks=tasks, jobs=jobs, limit=limit,
                             seed=prepared.recipe.seed, progress=progress)  # fmt: skip
            results[name] |= found["results"][name]
    found = {"student": student, "results": results}
    return found | ({"weights": baseline.weights(prepared, folder)} if rounded else {})


def check(
    out: Path,
    recipe: Recipe,
    *,
    embeddings: str,
    keep_dtype: bool,
    tasks: tuple[str, ...],
    limit: Limit,
    data_dir: str | Path | None,
    log_with: tuple[str, ...],
    offline: bool,
    overwrite: bool,
) -> bool:
    """What a plan checks of the options that are no part of the recipe; see `ternarize`.

    Returns whether nothing is to be done: ``out`` is what this very request makes, finished.

    Raises:
        RecipeError: as `ternarize` would, also of an artefact that another recipe made.
    """
    recipe = untrained(recipe)
    trackers.check(log_with)
    baseline.check(recipe, embeddings, keep_dtype)
    _jobs(tasks, data_dir, offline)
    asked = _request(recipe, keep_dtype, embeddings, tasks, limit)
    return not overwrite and _finished(out, recipe, asked) is not None


def _request(
    recipe: Recipe, keep_dtype: bool, embeddings: str, tasks: tuple[str, ...], limit: Limit
) -> dict[str, Any]:
    """What was asked for, as the manifest keeps it: the same again is not made again."""
    asked: dict[str, Any] = {"asked": recipe.to_json(), "keep_dtype": keep_dtype}
    asked |= {"embeddings": embeddings} if embeddings != "keep" else {}
    return asked | ({"tasks": list(tasks), "limit": limit} if tasks else {})


def _jobs(tasks: tuple[str, ...], data_dir: str | Path | None, offline: bool) -> list[Job]:
    """What is measured in the end; whatever is wrong with it is said before any training.

    Raises:
        RecipeError: an unknown task or metric, or efficiency, which takes a finished model's name.
    """
    jobs = load_jobs(tasks, data_dir, offline) if tasks else []
    for job in jobs:
        check_metrics(job)
        if job.efficiency:
            raise RecipeError(
                "Efficiency is measured from loading on, of a model that is finished.",
                "Leave it out here; then: ternq eval OUT --tasks efficiency",
            )
    return jobs


def _reloaded(folder: Path, device: str, by_blocks: bool) -> hf.Loaded | None:
    """The packed model; None if the model did not fit into memory and this does not either."""
    size = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    if by_blocks and not streamed.fits(size, device):
        return None
    return hf.load(str(folder), dtype=torch.float32, device=device, offline=True)


def _looked_at(model: str, prepared: Prepared, run: Path, out: Path, device: str) -> dict[str, Any]:
    """What is shown of the finished model: text that both write, and each layer's error."""
    if isinstance(prepared, streamed.Streamed):
        layers = streamed.layer_diagnostics(prepared, streamed.source(prepared, run))
        return {"layers": {str(out): layers}}
    assert prepared.teacher is not None, "it is refused without one"
    reloaded = hf.load(str(out), dtype=torch.float32, device=device)
    layers = layer_diagnostics(reloaded.model, prepared.teacher.model)
    texts = samples(model, prepared.teacher, reloaded)
    return {"samples": texts, "layers": {str(out): layers}}


def _held_out(measured: dict[str, Any]) -> dict[str, Any]:
    """A measurement of the held-out text, as ``results`` has it."""
    names = {"perplexity": "token_perplexity", "word_perplexity": "word_perplexity"}
    values = {name: measured[key] for key, name in names.items() if measured.get(key)}
    return {"held-out": values | {"samples": measured["samples"], "partial": False}}


def keep_reports(run: Path, out: Path) -> None:
    """Put the run's records beside the artefact: its folder holds only what its manifest names."""
    folder = report_folder(out)
    folder.mkdir(exist_ok=True)
    shutil.rmtree(folder / trackers.LOGS, ignore_errors=True)  # of an artefact that is replaced
    (folder / METRICS).unlink(missing_ok=True)
    for name in (REPORT, METRICS, trackers.LOGS):
        if (run / name).exists():
            (run / name).replace(folder / name)


def write_pages(out: Path, payload: dict[str, Any]) -> None:
    """Write what people read beside the records: ``report.md`` and ``report.html``."""
    folder = report_folder(out)
    texts = {"report.md": markdown(payload), "report.html": page(payload, steps_of(out))}
    for name, text in texts.items():
        with renamed(folder / name) as temporary:
            temporary.write_text(text, encoding="utf-8")


def _made(out: Path, asked: dict[str, Any]) -> bool:
    """Whether the artefact at ``out`` is what this very request makes."""
    name = manifest_of(out)
    if name is None:
        return False
    manifest = read_manifest(out, name)
    if not isinstance(was := manifest.get("asked"), dict) or _other(asked["asked"], was):
        return False
    return all(manifest.get(key) == value for key, value in asked.items() if key != "asked") and (
        manifest.get("embeddings", "keep") == asked.get("embeddings", "keep")
    )


def _other(asked: dict[str, Any], was: dict[str, Any]) -> list[str]:
    """How the recipe asked for differs from that of an artefact; settings newer than it may."""
    mine, theirs = Recipe.from_json(asked), Recipe.from_json(was)
    found = mine.differences(theirs)
    if mine.model != theirs.model:
        found.insert(0, f"model: {theirs.model} there, {mine.model} here")
    return found


def _finished(out: Path, recipe: Recipe, asked: dict[str, Any]) -> dict[str, Any] | None:
    """The report of an artefact that this very request made; None where ``out`` has none."""
    name = manifest_of(out)
    if name is None:
        return None
    manifest = read_manifest(out, name)
    if not isinstance(manifest.get("asked"), dict):
        return None
    if not _made(out, asked):
        found = _other(asked["asked"], manifest["asked"])
        found = found or [f"other {key}" for key in asked if manifest.get(key) != asked[key]]
        raise RecipeError(
            f"'{out}' was made with another recipe ({'; '.join(found) or 'other embeddings'}).",
            "Choose another -o, or pass --overwrite.",
        )
    verify_files(out, name)  # what is finished must also be whole
    report = report_folder(out) / REPORT
    if report.is_file():
        return _renamed(read_json(report), recipe.model, out)
    names = ("format", "weights", "verify", "files", "student", "results", "recipe")
    kept = {name: manifest[name] for name in names if name in manifest}
    notes = [f"{report} is gone: this is what the artefact says of itself."]
    return _renamed({"model": recipe.model, "notes": notes} | kept, recipe.model, out)


def _renamed(report: dict[str, Any], model: str, out: Path) -> dict[str, Any]:
    """The report of an artefact that may have been moved, or was made from another folder.

    What is told of another than ``model`` is told of it.
    """
    for key in ("results", "layers"):
        if isinstance(own := report.get(key), dict):
            report[key] = {n if n == model else str(out): found for n, found in own.items()}
    return report | {"out": str(out)}


def samples(model: str, teacher: hf.Loaded, student: hf.Loaded) -> list[dict[str, str]]:
    """What teacher and student write after the same prompts, greedily."""
    prompts = PROMPTS.get(model, PROMPTS[""])
    return [
        {"prompt": p, "teacher": continued(teacher, p), "student": continued(student, p)}
        for p in prompts
    ]
