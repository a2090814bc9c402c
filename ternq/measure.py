"""What is measured of one model: each text and each task apart, and kept as soon as it is there.

So a measurement that was stopped half-way goes on where it was, and one that was made before costs
nothing.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib import metadata
from typing import Any, Literal
from weakref import WeakKeyDictionary

from torch import Tensor

from ternq import harness, outlines
from ternq.cache import Cache
from ternq.errors import InputError, RecipeError
from ternq.hf import Loaded
from ternq.kernels import choice
from ternq.perplexity import BLOCK, token_perplexity, tokens_per_second
from ternq.progress import Event, Progress
from ternq.shown import duration
from ternq.subject import Subject, World
from ternq.suites import SUITES
from ternq.tasks import C4_BLOCKS, C4_DOCUMENTS, TOKEN_PERPLEXITY, Job, of_lm_eval

Limit = int | Literal["all"] | None
Values = dict[str, Any]

_COUNTS = ("samples", "partial", "blocks", "block_length", "tokens", "drawn")
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
        return min(self.max_length, outlines.max_length(model))

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


class Meter:
    """What is asked of every model, and what all results have in common.

    ``described`` says of each task what was asked (version, hash of the data), and ``cached`` which
    results were kept from before.
    """

    def __init__(
        self,
        jobs: Sequence[Job],
        suites: Sequence[str],
        asked: Asked,
        world: World,
        cache: Cache,
        progress: Progress,
    ) -> None:
        self._jobs, self._suites, self._asked, self._world = jobs, suites, asked, world
        self._cache, self._progress = cache, progress
        for job in jobs:
            check_metrics(job)
        parts = [part for job in jobs for part in self._parts_of(job)]
        self._parts = list({(part.task, part.what): part for part in parts}.values())
        self._encoded: WeakKeyDictionary[Any, dict[tuple[str, int], Tensor]] = WeakKeyDictionary()
        self.cached: list[list[str]] = []
        self.described: dict[str, Values] = {}
        for part in self._parts:
            self.described.setdefault(part.task, {}).update(part.described)

    def measure(self, subject: Subject) -> None:
        """All tasks of a model; what is kept is not measured again."""
        parts = self._parts
        for job in self._jobs:
            if job.efficiency:
                subject.results[job.name] = self._efficiency(subject)
        kept = {id(part): self._cache.get(self._key(subject, part)) for part in parts}
        if missing := [part for part in parts if kept[id(part)] is None]:
            self._say(subject, missing)
        for part in parts:
            found = kept[id(part)]
            if found is None:
                found = part.run(subject.loaded)
                self._cache.put(self._key(subject, part), found)
            elif [subject.name, part.task] not in self.cached:
                self.cached.append([subject.name, part.task])
            self._note(subject, part, found)
        for job in self._jobs:
            _aggregate(job, subject.results)
        for name, values in subject.results.items():
            _only([job.metrics for job in self._jobs if name in job.names], values)
        for suite in self._suites:
            _suite(suite, subject.results)

    def expected(self, subject: Subject) -> list[Values]:
        """What measuring a model takes: ``{task, what, tokens, seconds}``, and whether it is kept.

        Efficiency is not among it.
        """
        kept = [self._cache.get(self._key(subject, part)) is not None for part in self._parts]
        missing = [part for part, done in zip(self._parts, kept, strict=True) if not done]
        counts = iter(self._say(subject, missing) if missing else ())
        found = []
        for part, done in zip(self._parts, kept, strict=True):
            tokens, seconds = (0, 0.0) if done else next(counts)
            found.append(
                {"task": part.task, "what": part.what, "tokens": tokens, "seconds": seconds}
                | {"kept": done}
            )
        return found

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
            return len(self.ids(job, loaded, asked.length(loaded.model)))

        def run(loaded: Loaded) -> Values:
            length = asked.length(loaded.model)
            ids = self.ids(job, loaded, length)
            values = token_perplexity(
                loaded.model, ids, length, batch_size=asked.batch_size,
                stage=f"{job.name}: token perplexity", progress=self._progress,
            )  # fmt: skip
            cut = text.partial or len(ids) < len(self._all_ids(job, loaded, length))
            whole = text.drawn and values["blocks"] == C4_BLOCKS
            drawn = {"drawn": f"gptq{C4_BLOCKS}"} if whole else {}
            return {"values": values | {"samples": values["blocks"], "partial": cut} | drawn}

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
            if harness.ignores_shots(leaf, asked.num_fewshot):
                said = f"{name}: always asked without examples, so --num-fewshot does nothing"
                self._progress(Event(name, said, level="warning"))
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
        settings = harness.Settings(0, limit, asked.num_fewshot)
        described = {"version": leaf.VERSION, "data": harness.digest(leaf, settings)}
        return Part(name, "lm-eval", described, extent, run, tokens)

    def ids(self, job: Job, loaded: Loaded, length: int) -> Tensor:
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

    def kept(self, subject: Subject, what: Mapping[str, Any], make: Callable[[], Values]) -> Values:
        """What the cache has of a model under ``what``, or what ``make`` finds."""
        key = {**self._about(subject), **what}
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
        how = {"kernel": choice(self._world.device).partition(",")[0]}  # not how many threads
        how |= {"activations": "int8"} if self._world.int8_activations else {}
        return {"model": subject.identity, "versions": versions(), **self.world, **how}

    @property
    def world(self) -> dict[str, str]:
        """Where, and in which numbers, models are computed."""
        usual = "float32" if self._world.device == "cpu" else "the model's own"
        dtype = str(self._world.dtype or usual).removeprefix("torch.")
        return {"device": self._world.device, "dtype": dtype}

    def _key(self, subject: Subject, part: Part) -> Values:
        own = {"task": part.task, "what": part.what, **part.described}
        return self._about(subject) | asdict(self._asked) | own

    def _say(self, subject: Subject, parts: Sequence[Part]) -> list[tuple[int, float]]:
        """Say what will be read, and how long that takes at the speed of a short measured pass.

        Returns tokens and seconds of each part.
        """
        loaded = subject.loaded
        self._check_chat(loaded)
        length = self._asked.length(loaded.model)
        rate = tokens_per_second(loaded.model, length)
        tokens = [part.tokens(loaded) for part in parts]
        lines = [f"{subject.name} reads about {rate:,.0f} tokens a second:"]
        for part, count in zip(parts, tokens, strict=True):
            blocks = f"{count // length or 1:,} blocks of {min(count, length):,} tokens"
            extent = (blocks if part.what == TOKEN_PERPLEXITY else "") + part.extent
            lines.append(f"  {part.task}: {extent}, about {duration(count / rate)}")
        if len(parts) > 1:
            lines.append(f"  in all about {duration(sum(tokens) / rate)}")
        for line in lines:
            self._progress(Event("expect", line))
        return [(count, count / rate) for count in tokens]

    def _check_chat(self, loaded: Loaded) -> None:
        if self._asked.chat and not _template(loaded):
            raise InputError(
                f"The tokenizer of '{loaded.name}' has no chat template.",
                "Leave out --apply-chat-template: the prompts are then given as they are.",
            )


def check_metrics(job: Job) -> None:
    """`RecipeError` for a metric that a task has not, before anything is measured."""
    leaves = job.task.leaves.values() if job.task else ()
    known = {TOKEN_PERPLEXITY} if job.text is not None else set()
    known |= {metric for leaf in leaves for metric in harness.metrics(leaf)}
    for metric in job.metrics:
        if metric.partition("@")[0] not in known:
            raise RecipeError(
                f"Task '{job.name}' has no metric '{metric}'.",
                f"It has {', '.join(sorted(known))}." if known else None,
            )


def _aggregate(job: Job, results: dict[str, Values]) -> None:
    """The scores of a task's groups, of those of the tasks in them."""
    if job.task is not None and job.task.groups:
        own = {name: results[name] for name in job.task.leaves}
        results |= harness.aggregate(job.task, own)


def _only(asked: Sequence[tuple[str, ...]], values: Values) -> None:
    """Keep the metrics that any job asked for; one that named none asked for all."""
    if not asked or not all(asked):
        return
    names = {metric for metrics in asked for metric in metrics}
    wanted = names | {f"{metric}_stderr" for metric in names} | {*_COUNTS}
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


def versions() -> dict[str, str]:
    """Of the programs that numbers come from."""
    return {name: metadata.version(name) for name in _LIBRARIES}
