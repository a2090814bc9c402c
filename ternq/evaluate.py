"""Perplexities and lm-eval tasks of any model ternq loads, alone or against a baseline.

The harness is lm-eval itself, given a live model; ternq adds the token perplexity that papers print
beside lm-eval's word perplexity, what averages hide (how far distributions are apart, and which
answers flipped), and results that are kept: a measurement stopped half-way goes on where it was,
and a baseline that was measured before costs nothing.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any, Literal
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from ternq import compare, harness, hf
from ternq.cache import Cache
from ternq.errors import InputError, RecipeError
from ternq.files import read_json
from ternq.hf import Loaded
from ternq.perplexity import BLOCK, divergence, token_perplexity, tokens_per_second
from ternq.progress import Event, Progress, ignore
from ternq.report import duration
from ternq.samples import PROMPTS, continued
from ternq.subject import Subject, World
from ternq.suites import SUITES
from ternq.tasks import C4_DOCUMENTS, TOKEN_PERPLEXITY, Job, load_jobs, of_lm_eval
from ternq.weights import layer_diagnostics

Limit = int | Literal["all"] | None
Values = dict[str, Any]

_KL_BLOCKS = 16  # the baseline reads them once more for every model: enough for two digits
_COUNTS = ("samples", "partial", "blocks", "block_length", "tokens")
_LIBRARIES = ("ternq", "lm-eval", "torch", "transformers")


@dataclass(frozen=True)
class Asked:
    """What results depend on beside model and task; named as in the report's ``settings``."""

    limit: Limit = None
    num_fewshot: int | None = None
    max_length: int = BLOCK
    batch_size: int | None = None
    chat: bool = False
    seed: int = 0

    def length(self, model: Any) -> int:
        """The longest window, in tokens."""
        return min(self.max_length, hf.max_length(model))

    def documents(self, job: Job) -> int | None:
        """Documents of a task: all (None), or the first of them."""
        if self.limit is None and job.name == "c4":
            return C4_DOCUMENTS
        return self.limit if isinstance(self.limit, int) else None

    def harness(self, job: Job, model: Any) -> harness.Settings:
        """The same for lm-eval."""
        return harness.Settings(
            self.length(model), self.documents(job), self.num_fewshot, self.batch_size, self.chat,
            self.seed,
        )  # fmt: skip


@dataclass(frozen=True)
class Part:
    """What is measured, and kept, at one go: a text's token perplexity, or one task of lm-eval."""

    task: str
    what: str
    described: Values
    extent: str
    run: Callable[[Loaded], Values]
    tokens: Callable[[Loaded], int]


def evaluate(
    models: Sequence[str | Loaded],
    *,
    tasks: Sequence[str] = ("wikitext",),
    text: Sequence[str | Path] = (),
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
    seed: int = 0,
    cache: Path | None = None,
    samples: bool = False,
    progress: Progress = ignore,
    jobs: Sequence[Job] = (),
) -> dict[str, Any]:
    """Measure models: ``{"results": {MODEL: {TASK: {metric: value, samples: n, partial: bool}}}}``.

    A task is ``wikitext``, ``c4`` or ``ptb`` (token perplexity and lm-eval's perplexities), any
    other task or group of lm-eval, a suite, ``efficiency``, or a local text file or folder;
    ``TASK:METRIC`` takes that metric alone. ``limit`` takes the first documents and blocks only;
    unset, c4's word perplexity takes the first 1000 documents. ``data_dir`` is a folder in the
    hub's layout, used in place of the hub. ``jobs`` are tasks that `load_jobs` has loaded already.

    ``baseline`` is a model, or a .json file of ``ternq eval --json``: it adds ``comparison``, with
    differences, ratios, flips and, of a model, divergences. ``cache`` is the folder of kept
    results (None: none are kept). ``samples`` adds texts that the models write, and per-layer
    diagnostics.

    Raises `RecipeError` for an unknown task and a baseline made with other settings, and
    `InputError` for missing models, texts and data.
    """
    _check(limit, max_length)
    stored = _stored(baseline)
    jobs = jobs or load_jobs((*tasks, *map(str, text)), data_dir, offline, progress)
    if not jobs or not models:
        raise RecipeError("Nothing to evaluate.", "Name a model and a task.")
    asked = Asked(limit, num_fewshot, max_length or BLOCK, batch_size, chat, seed)
    world = World(device, dtype, offline, trust_remote_code)
    suites = [name for name in tasks if name in SUITES]
    run = _Run(list(jobs), suites, asked, world, Cache(cache, progress), progress)
    if stored:
        run.refuse_settings(stored["settings"])
    subjects = _subjects(models, world, progress)
    reference = next((s for s in subjects if s.name == _name(baseline)), None)
    if reference is None and baseline is not None and stored is None:
        reference = Subject(baseline, world, progress)
    for subject in subjects:
        for one in (reference, subject):  # a baseline is measured first
            if one is not None and one.name not in run.models:
                run.measure(one, samples)
                if not samples and not any(job.text for job in jobs):
                    one.release()  # nothing more is asked of it than its results
        if stored:
            run.compare(subject, str(baseline), stored["results"], stored["answers"])
        elif reference is not None and subject is not reference:
            run.compare(subject, reference.name, reference.results, reference.answers)
            run.diverge(subject, reference)
        if samples:
            run.diagnose(subject, reference)
        if subject is not reference:
            subject.release()
    found = run.payload(subjects, _name(baseline))
    if stored:
        found["results"][str(baseline)] = stored["results"]
    elif reference is not None:
        found["results"][reference.name] = reference.results
    return found


class _Run:
    """One evaluation: what is asked of every model, and what was found so far."""

    def __init__(
        self,
        jobs: list[Job],
        suites: list[str],
        asked: Asked,
        world: World,
        cache: Cache,
        progress: Progress,
    ) -> None:
        self._jobs, self._suites, self._asked, self._world = jobs, suites, asked, world
        self._cache, self._progress = cache, progress
        self._parts = [part for job in jobs for part in self._parts_of(job)]
        self._tasks: dict[str, Values] = {}
        self._cached: list[list[str]] = []
        self._comparison: dict[str, dict[str, Values]] = {}
        self._texts: dict[str, dict[str, str]] = {}
        self._layers: dict[str, list[Values]] = {}
        self._notes: list[str] = []
        self.models: dict[str, Values] = {}
        self._encoded: WeakKeyDictionary[Any, dict[tuple[str, int], Tensor]] = WeakKeyDictionary()

    # -- one model ---------------------------------------------------------------------------------

    def measure(self, subject: Subject, samples: bool) -> None:
        """All tasks of a model; what is kept is not measured again."""
        parts = self._parts
        for job in self._jobs:
            if job.efficiency:
                subject.results[job.name] = self._efficiency(subject)
        kept = {id(part): self._cache.get(self._key(subject, part)) for part in parts}
        self._expect(subject, [part for part in parts if kept[id(part)] is None])
        for part in parts:
            found = kept[id(part)]
            if found is None:
                found = part.run(subject.loaded)
                self._cache.put(self._key(subject, part), found)
            else:
                self._cached.append([subject.name, part.task])
            self._note(subject, part, found)
        for job in self._jobs:
            _finish(job, subject.results)
        for suite in self._suites:
            _suite(suite, subject.results)
        key = self._about(subject)
        self.models[subject.name] = self._kept(key | {"what": "model"}, subject.summary)
        if samples:
            write = partial(self._written, subject)
            self._texts[subject.name] = self._kept(key | {"what": "samples"}, write)

    def _parts_of(self, job: Job) -> Iterator[Part]:
        if job.text is not None:
            yield self._text_part(job)
        if job.task is not None:
            for name in job.task.leaves:
                yield self._leaf_part(job, name)

    def _text_part(self, job: Job) -> Part:
        text, asked = job.text, self._asked
        assert text is not None

        def tokens(loaded: Loaded) -> int:
            return len(self._ids(job, loaded, asked.length(loaded.model)))

        def run(loaded: Loaded) -> Values:
            length = asked.length(loaded.model)
            ids = self._ids(job, loaded, length)
            values = token_perplexity(
                loaded.model, ids, length, batch_size=asked.batch_size,
                stage=f"{job.name}: token perplexity", progress=self._progress,
            )  # fmt: skip
            cut = text.partial or len(ids) < len(self._all_ids(job, loaded, length))
            return {"values": values | {"samples": values["blocks"], "partial": cut}}

        extent = ", drawn as GPTQ draws them" if text.drawn else ""
        return Part(job.name, TOKEN_PERPLEXITY, {"text": text.digest()}, extent, run, tokens)

    def _leaf_part(self, job: Job, name: str) -> Part:
        task, asked = job.task, self._asked
        assert task is not None
        leaf, limit = task.leaves[name], asked.documents(job)

        def tokens(loaded: Loaded) -> int:
            settings = asked.harness(job, loaded.model)
            return harness.expected_tokens(leaf, loaded.tokenizer, settings)

        def run(loaded: Loaded) -> Values:
            if harness.generates(leaf) and not _template(loaded):
                said = (
                    f"{name}: '{loaded.name}' has no chat template, so it goes on from the plain "
                    "prompt, and may not stop where an answer ends"
                )
                self._progress(Event(name, said, level="warning"))
            settings = asked.harness(job, loaded.model)
            return asdict(harness.run(task, name, loaded, settings, self._progress))

        count, whole = harness.n_documents(leaf, limit), harness.n_documents(leaf, None)
        extent = (
            f"{count:,} documents"
            if count == whole
            else (f"the first {count:,} of {whole:,} documents")
        )
        described = {"version": leaf.VERSION, "data": harness.digest(leaf, limit)}
        return Part(name, "lm-eval", described, extent, run, tokens)

    def _ids(self, job: Job, loaded: Loaded, length: int) -> Tensor:
        """A job's token ids, as many as ``--limit`` allows."""
        ids = self._all_ids(job, loaded, length)
        limit = self._asked.limit
        return ids[: limit * length] if isinstance(limit, int) else ids

    def _all_ids(self, job: Job, loaded: Loaded, length: int) -> Tensor:
        """A job's token ids, which take long to make and are asked for several times."""
        assert job.text is not None
        known = self._encoded.setdefault(loaded.tokenizer, {})
        if (job.name, length) not in known:
            known[job.name, length] = job.text.ids(loaded.tokenizer, length)
        return known[job.name, length]

    def _note(self, subject: Subject, part: Part, found: Values) -> None:
        """Put a part's result in its place."""
        values = found["values"]
        before = subject.results.setdefault(part.task, {})
        counts = {"partial": values["partial"] or before.get("partial", False)}
        if "blocks" in before and not of_lm_eval(part.task):
            counts["samples"] = before["blocks"]  # what documents a plain text has is our choice
        before.update(values | counts)
        if found.get("answers"):
            subject.answers[part.task] = found["answers"]
        self._tasks.setdefault(part.task, {}).update(part.described)

    def _written(self, subject: Subject) -> Values:
        self._progress(Event("samples", f"Samples of text by {subject.name}"))
        prompts = PROMPTS.get(subject.name, PROMPTS[""])
        return {prompt: continued(subject.loaded, prompt) for prompt in prompts}

    def _kept(self, key: Values, make: Callable[[], Values]) -> Values:
        """What the cache has, or what ``make`` finds."""
        found = self._cache.get(key)
        if found is None:
            found = make()
            self._cache.put(key, found)
        return found

    def _efficiency(self, subject: Subject) -> Values:
        from ternq.efficiency import measure

        if not isinstance(subject.model, str):
            raise RecipeError(
                f"Efficiency is measured from loading on, and '{subject.name}' is loaded already."
            )
        subject.release()
        return measure(subject.model, **vars(self._world), progress=self._progress)

    def _about(self, subject: Subject) -> Values:
        """What everything that is kept of a model depends on."""
        if not self._cache.keeps:
            return {}
        world = {"device": self._world.device, "dtype": str(self._world.dtype)}
        return {"model": subject.identity, **world, "versions": _versions()}

    def _key(self, subject: Subject, part: Part) -> Values:
        own = {"task": part.task, "what": part.what, **part.described}
        return self._about(subject) | asdict(self._asked) | own

    def _expect(self, subject: Subject, parts: Sequence[Part]) -> None:
        """Say what will be read, and how long that takes at the speed of a short measured pass."""
        if not parts:
            return
        loaded = subject.loaded
        self._check_chat(loaded)
        length = self._asked.length(loaded.model)
        rate = tokens_per_second(loaded.model, length)
        tokens = [part.tokens(loaded) for part in parts]
        lines = [f"{subject.name} reads about {rate:,.0f} tokens a second:"]
        for part, count in zip(parts, tokens, strict=True):
            blocks = f"{count // length:,} blocks of {length:,} tokens"
            extent = (blocks if part.what == TOKEN_PERPLEXITY else "") + part.extent
            lines.append(f"  {part.task}: {extent}, about {duration(count / rate)}")
        if len(parts) > 1:
            lines.append(f"  in all about {duration(sum(tokens) / rate)}")
        for line in lines:
            self._progress(Event("expect", line))

    def _check_chat(self, loaded: Loaded) -> None:
        if self._asked.chat and not _template(loaded):
            raise InputError(
                f"The tokenizer of '{loaded.name}' has no chat template.",
                "Leave out --apply-chat-template: the prompts are then given as they are.",
            )

    # -- against a baseline ------------------------------------------------------------------------

    def refuse_settings(self, theirs: Mapping[str, Any] | None) -> None:
        """`RecipeError` where a baseline's results were made with other settings."""
        if theirs is None:
            self._say("The settings that the baseline's results were made with are not recorded.")
            return
        tasks: dict[str, Values] = {}
        for part in self._parts:
            tasks.setdefault(part.task, {}).update(part.described)
        own = asdict(self._asked) | {"tasks": tasks}
        if found := compare.other_settings(own, theirs):
            raise RecipeError(
                f"The baseline was made with other settings: {'; '.join(found)}.",
                "Measure it again with these, or ask for what it was made with.",
            )

    def compare(
        self, subject: Subject, name: str, base: compare.Results, answers: Mapping[str, str]
    ) -> None:
        """Differences, ratios and flips."""
        if not set(subject.results) & set(base):
            self._say(f"The baseline '{name}' has none of these tasks.")
        found = compare.compare(subject.results, base, subject.answers, answers)
        self._comparison[subject.name] = found
        for task, values in subject.results.items():
            if differ := compare.other_blocks(values, base.get(task, {})):
                self._say(
                    f"{task}: the token perplexities of {subject.name} and {name} cannot be "
                    f"compared ({'; '.join(differ)})."
                )

    def diverge(self, subject: Subject, base: Subject) -> None:
        """How far the distributions are apart, on the first blocks of each text."""
        for job in self._jobs:
            if job.text is None:
                continue
            own = {"task": job.name, "what": "divergence", "text": job.text.digest()}
            key = self._about(subject) | asdict(self._asked) | own
            key |= {"baseline": base.identity, "blocks": _KL_BLOCKS}
            found = self._kept(key, partial(self._divergence, job, subject, base))
            if "said" in found:
                self._say(found["said"])
            else:
                self._comparison[subject.name].setdefault(job.name, {}).update(found)

    def _divergence(self, job: Job, subject: Subject, baseline: Subject) -> Values:
        own, base = subject.loaded, baseline.loaded
        length = min(self._asked.length(own.model), self._asked.length(base.model))
        ids, theirs = (self._ids(job, one, length)[: _KL_BLOCKS * length] for one in (own, base))
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
        if self.models[subject.name]["kind"] != "dense":
            self._layers[subject.name] = layer_diagnostics(subject.loaded.model, dense)

    def _say(self, note: str) -> None:
        if note not in self._notes:
            self._notes.append(note)
            self._progress(Event("baseline", note, level="warning"))

    # -- the whole ---------------------------------------------------------------------------------

    def payload(self, subjects: Sequence[Subject], baseline: str | None) -> dict[str, Any]:
        """The contract's fields, and what reports show beside them."""
        settings = asdict(self._asked) | {
            "device": self._world.device,
            "dtype": str(self._world.dtype or "float32").removeprefix("torch."),
            "versions": _versions(),
            "tasks": self._tasks,
        }
        found = {
            "results": {s.name: s.results for s in subjects},
            "answers": {s.name: s.answers for s in subjects},
            "models": self.models,
            "settings": settings,
            "baseline": baseline,
            "comparison": self._comparison,
            "cached": self._cached,
            "notes": self._notes,
        }
        if self._texts:
            prompts = dict.fromkeys(p for texts in self._texts.values() for p in texts)
            found["texts"] = [
                {"prompt": p, "texts": {m: t[p] for m, t in self._texts.items() if p in t}}
                for p in prompts
            ]
        return found | ({"layers": self._layers} if self._layers else {})


def _finish(job: Job, results: dict[str, Values]) -> None:
    """The scores of groups, of the tasks in them; and the metric alone that was asked for."""
    if job.task is not None and job.task.groups:
        own = {name: results[name] for name in job.task.leaves}
        results |= harness.aggregate(job.task, own)
    if job.metrics:
        names = {job.name, *(job.task.leaves | job.task.groups if job.task else ())}
        _only(job, {name: results[name] for name in names if name in results})


def _only(job: Job, found: Mapping[str, Values]) -> None:
    """Keep the metrics that were asked for."""
    for metric in job.metrics:
        if not any(metric in values for values in found.values()):
            has = sorted({name for values in found.values() for name in values} - {*_COUNTS})
            raise RecipeError(
                f"Task '{job.name}' has no metric '{metric}'.", f"It has {', '.join(has)}."
            )
    wanted = {*job.metrics, *(f"{metric}_stderr" for metric in job.metrics), *_COUNTS}
    for values in found.values():
        for key in set(values) - wanted:
            del values[key]


def _suite(name: str, results: dict[str, Values]) -> None:
    """A suite's own score: the plain mean of the accuracies that its paper averages."""
    having = [results[task] for task in SUITES[name].averaged if "acc" in results.get(task, {})]
    if len(having) < len(SUITES[name].averaged):
        return
    errors = [values.get("acc_stderr", math.nan) for values in having]
    results[name] = {
        "acc": sum(values["acc"] for values in having) / len(having),
        "acc_stderr": math.hypot(*errors) / len(having),
        "samples": sum(values["samples"] for values in having),
        "partial": any(values["partial"] for values in having),
    }


def _template(loaded: Loaded) -> bool:
    return bool(getattr(loaded.tokenizer, "chat_template", None))


def _check(limit: Limit, max_length: int | None) -> None:
    if isinstance(limit, int) and limit < 1:
        raise RecipeError(f"--limit is {limit}; it is at least 1, or 'all'.")
    if max_length is not None and max_length < 2:
        raise RecipeError(f"--max-length is {max_length}; it is at least 2.")


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
    if not isinstance(baseline, str) or not baseline.endswith(".json"):
        return None
    return compare.from_file(read_json(Path(baseline)), baseline)


def _name(baseline: str | Loaded | None) -> str | None:
    return baseline.name if isinstance(baseline, Loaded) else baseline


def _versions() -> dict[str, str]:
    return {name: metadata.version(name) for name in _LIBRARIES}
