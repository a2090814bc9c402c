"""Perplexities and lm-eval tasks of any model ternq loads, alone or against a baseline.

The harness is lm-eval itself, given a live model; ternq adds the token perplexity that papers print
beside lm-eval's word perplexity, what averages hide (how far distributions are apart, and which
answers flipped), and results that are kept: a measurement stopped half-way goes on where it was,
and a baseline that was measured before costs nothing.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import partial
from itertools import combinations
from pathlib import Path
from typing import Any

import torch

from ternq import compare
from ternq.cache import Cache
from ternq.errors import InputError, RecipeError
from ternq.files import read_json
from ternq.hf import Loaded
from ternq.measure import Asked, Limit, Meter, Values, versions
from ternq.perplexity import BLOCK, divergence
from ternq.progress import Event, Progress, ignore
from ternq.samples import PROMPTS, continued
from ternq.subject import Subject, World
from ternq.suites import SUITES
from ternq.tasks import Job, load_jobs
from ternq.weights import layer_diagnostics

_KL_BLOCKS = 16  # the baseline reads them once more for every model: enough for two digits


def evaluate(
    models: str | Loaded | Sequence[str | Loaded],
    *,
    tasks: str | Sequence[str] = ("wikitext",),
    baseline: str | Loaded | None = None,
    limit: Limit = None,
    num_fewshot: int | None = None,
    max_length: int | None = None,
    batch_size: int | None = None,
    chat: bool = False,
    data_dir: str | Path | None = None,
    offline: bool = False,
    device: str = "cpu",
    dtype: torch.dtype | None = None,
    trust_remote_code: bool = False,
    int8_activations: bool = False,
    seed: int = 0,
    cache: Path | None = None,
    samples: bool = False,
    progress: Progress = ignore,
    jobs: Sequence[Job] = (),
    plan: bool = False,
) -> dict[str, Any]:
    """Measure models: ``{"results": {MODEL: {TASK: {metric: value, samples: n, partial: bool}}}}``.

    A task is ``wikitext``, ``c4`` or ``ptb`` (token perplexity and lm-eval's perplexities), any
    other task or group of lm-eval, a suite, ``efficiency``, or a local text file or folder;
    ``TASK:METRIC`` takes that metric alone. ``limit`` takes the first documents and blocks only;
    unset, c4's word perplexity takes the first 1000 documents. ``data_dir`` is a folder in the
    hub's layout, used in place of the hub. ``int8_activations`` is for models that are packed and
    named, not given loaded. ``jobs`` are tasks that `load_jobs` has loaded already.

    ``baseline`` is a model, or a .json file of ``ternq eval --json``: it adds ``comparison``, with
    differences, ratios, flips and, of a model, divergences. ``cache`` is the folder of kept
    results (None: none are kept). ``samples`` adds texts that the models write, and per-layer
    diagnostics. ``plan``: everything is checked and loaded, but only the speed of the models is
    measured: ``expected`` says what each would read and how long it would take.

    Raises `RecipeError` for an unknown task and a baseline made with other settings, and
    `InputError` for missing models, texts and data.
    """
    models = [models] if isinstance(models, str | Loaded) else models
    tasks = tasks.split(",") if isinstance(tasks, str) else tasks
    _check(limit, max_length, batch_size, num_fewshot)
    stored = _stored(baseline)
    jobs = jobs or load_jobs(tasks, data_dir, offline, progress)
    if not jobs or not models:
        raise RecipeError("Nothing to evaluate.", "Name a model and a task.")
    world = World(device, dtype, offline, trust_remote_code, int8_activations)
    subjects = _subjects(models, world, progress)
    reference = next((s for s in subjects if s.name == _name(baseline)), None)
    if reference is None and baseline is not None and stored is None:
        reference = Subject(baseline, world, progress)
    for model in (*subjects, *([reference] if reference else [])):
        model.check()
    asked = Asked(limit, num_fewshot, max_length or BLOCK, batch_size, chat, seed)
    suites = [name for name in tasks if name in SUITES]
    meter = Meter(jobs, suites, asked, world, Cache(cache, progress), progress)
    names = [*(s.name for s in subjects), _name(baseline)]
    prompts = next((PROMPTS[str(n)] for n in names if n in PROMPTS), PROMPTS[""])
    run = _Run(jobs, asked, meter, prompts if samples else (), progress)
    if stored:
        run.refuse(str(baseline), stored)
    if plan:
        return _expected(meter, [*subjects, *([reference] if reference else [])])
    for subject in subjects:
        for one in (reference, subject):  # a baseline is measured first
            if one is not None:
                run.measure(one)
        if stored:
            run.compare(subject, str(baseline), stored["results"], stored["answers"])
        elif reference is not None and subject is not reference:
            run.compare(subject, reference.name, reference.results, reference.answers)
            run.diverge(subject, reference)
        if samples:
            run.diagnose(subject, reference)
        if subject is not reference:
            subject.release()
    run.compare_blocks(subjects)
    found = run.payload(subjects, _name(baseline))
    if stored:
        found["results"][str(baseline)] = stored["results"]
    elif reference is not None:
        found["results"][reference.name] = reference.results
        found["answers"][reference.name] = reference.answers
    return found


class _Run:
    """One evaluation: its models, what they are compared with, and what was found."""

    def __init__(
        self,
        jobs: Sequence[Job],
        asked: Asked,
        meter: Meter,
        prompts: Sequence[str],
        progress: Progress,
    ) -> None:
        self._jobs, self._asked, self._meter, self._progress = jobs, asked, meter, progress
        self._prompts = prompts
        self._models: dict[str, Values] = {}
        self._comparison: dict[str, dict[str, Values]] = {}
        self._texts: dict[str, Values] = {}
        self._layers: dict[str, list[Values]] = {}
        self._notes: list[str] = []

    def measure(self, subject: Subject) -> None:
        """All that is asked of a model alone, once."""
        if subject.name in self._models:
            return
        self._meter.measure(subject)
        self._models[subject.name] = self._meter.kept(subject, {"what": "model"}, subject.summary)
        if self._prompts:
            own = {"what": "samples", "prompts": list(self._prompts)}
            write = partial(self._written, subject)
            self._texts[subject.name] = self._meter.kept(subject, own, write)
        elif not any(job.text for job in self._jobs):
            subject.release()  # nothing more is asked of it than its results

    def _written(self, subject: Subject) -> Values:
        self._progress(Event("samples", f"Samples of text by {subject.name}"))
        return {prompt: continued(subject.loaded, prompt) for prompt in self._prompts}

    def refuse(self, name: str, stored: Mapping[str, Any]) -> None:
        """`RecipeError` where a file's results are of other tasks, or made with other settings."""
        described = self._meter.described
        if described and not set(described) & set(stored["results"]):
            raise RecipeError(
                f"The baseline '{name}' has none of these tasks, but "
                f"{', '.join(stored['results']) or 'nothing'}.",
                "Name results of the same tasks.",
            )
        theirs = stored["settings"]
        if theirs is None:
            self._say("The settings that the baseline's results were made with are not recorded.")
            return
        own = asdict(self._asked) | self._meter.world | {"tasks": described}
        if found := compare.other_settings(own, theirs):
            raise RecipeError(
                f"The baseline was made with other settings: {'; '.join(found)}.",
                "Measure it again with these, or ask for what it was made with.",
            )

    def compare(
        self, subject: Subject, name: str, base: compare.Results, answers: Mapping[str, str]
    ) -> None:
        """Differences, ratios and flips."""
        found = compare.compare(subject.results, base, subject.answers, answers)
        self._comparison[subject.name] = found
        for task, values in subject.results.items():
            if differ := compare.other_blocks(values, base.get(task, {})):
                self._say(
                    f"{task}: the token perplexities of {subject.name} and {name} cannot be "
                    f"compared ({'; '.join(differ)})."
                )

    def compare_blocks(self, subjects: Sequence[Subject]) -> None:
        """Say which token perplexities of several models may not be compared with one another."""
        for first, other in combinations(subjects, 2):
            for task, values in first.results.items():
                if differ := compare.other_blocks(values, other.results.get(task, {})):
                    self._say(
                        f"{task}: the token perplexities of {first.name} and {other.name} cannot "
                        f"be compared ({'; '.join(differ)})."
                    )

    def diverge(self, subject: Subject, base: Subject) -> None:
        """How far the distributions are apart, on the first blocks of each text."""
        for job in self._jobs:
            if job.text is None:
                continue
            own: Values = {"task": job.name, "what": "divergence", "text": job.text.digest()}
            own |= {"baseline": base.identity, "blocks": _KL_BLOCKS} | asdict(self._asked)
            find = partial(self._divergence, job, subject, base)
            found = self._meter.kept(subject, own, find)
            if "said" in found:
                self._say(found["said"])
            else:
                self._comparison[subject.name].setdefault(job.name, {}).update(found)

    def _divergence(self, job: Job, subject: Subject, baseline: Subject) -> Values:
        own, base = subject.loaded, baseline.loaded
        length = min(self._asked.length(own.model), self._asked.length(base.model))
        ids, theirs = (
            self._meter.ids(job, one, length)[: _KL_BLOCKS * length] for one in (own, base)
        )
        if not torch.equal(ids, theirs):
            return {
                "said": f"{job.name}: '{own.name}' and '{base.name}' cut text into other tokens: "
                "their perplexities and distributions cannot be compared token by token."
            }
        try:
            return divergence(
                own.model, base.model, ids, length, batch_size=self._asked.batch_size,
                stage=f"{job.name}: divergence", progress=self._progress,
            )  # fmt: skip
        except InputError as error:
            return {"said": f"{job.name}: {error.message}"}

    def diagnose(self, subject: Subject, base: Subject | None) -> None:
        """Zero share and error of each ternary layer, the error to a dense baseline."""
        dense = base.loaded.model if base is not None and base is not subject else None
        if self._models[subject.name]["kind"] != "dense":
            self._layers[subject.name] = layer_diagnostics(subject.loaded.model, dense)

    def _say(self, note: str) -> None:
        if note not in self._notes:
            self._notes.append(note)
            self._progress(Event("baseline", note, level="warning"))

    def payload(self, subjects: Sequence[Subject], baseline: str | None) -> dict[str, Any]:
        """The contract's fields, and what reports show beside them."""
        settings = asdict(self._asked) | {"versions": versions(), "tasks": self._meter.described}
        settings |= self._meter.world
        found = {
            "results": {s.name: s.results for s in subjects},
            "answers": {s.name: s.answers for s in subjects},
            "models": self._models,
            "settings": settings,
            "baseline": baseline,
            "comparison": self._comparison,
            "cached": self._meter.cached,
            "notes": self._notes,
        }
        if self._texts:
            found["texts"] = [
                {"prompt": p, "texts": {model: texts[p] for model, texts in self._texts.items()}}
                for p in self._prompts
            ]
        return found | ({"layers": self._layers} if self._layers else {})


def _expected(meter: Meter, subjects: Sequence[Subject]) -> dict[str, Any]:
    found = {}
    for subject in subjects:
        found[subject.name] = meter.expected(subject)
        subject.release()
    total = sum(part["seconds"] for parts in found.values() for part in parts)
    return {"plan": True, "results": {}, "expected": found, "seconds": {"total": total}}


def _check(limit: Limit, max_length: Any, batch_size: Any, num_fewshot: Any) -> None:
    """`RecipeError` for numbers that mean nothing."""
    if limit not in (None, "all") and not _whole(limit, 1):
        raise RecipeError(f"--limit is {limit}; it is at least 1, or 'all'.")
    least = {"--max-length": (max_length, 2), "--batch-size": (batch_size, 1)}
    for name, (value, low) in (least | {"--num-fewshot": (num_fewshot, 0)}).items():
        if value is not None and not _whole(value, low):
            raise RecipeError(f"{name} is {value}; it is a whole number, at least {low}.")


def _whole(value: Any, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def _subjects(models: Sequence[str | Loaded], world: World, progress: Progress) -> list[Subject]:
    """Each model once."""
    found: dict[str, Subject] = {}
    for model in models:
        one = Subject(model, world, progress)
        if found.setdefault(one.name, one).model != model:
            raise RecipeError(f"Two models are named '{one.name}'.")
    return list(found.values())


def _stored(baseline: str | Loaded | None) -> dict[str, Any] | None:
    """The results in a baseline's file; None where it is a model."""
    if not isinstance(baseline, str) or baseline.lower().endswith(".gguf"):
        return None
    if not (baseline.endswith(".json") or Path(baseline).is_file()):
        return None
    return compare.from_file(read_json(Path(baseline)), baseline)


def _name(baseline: str | Loaded | None) -> str | None:
    return baseline.name if isinstance(baseline, Loaded) else baseline
