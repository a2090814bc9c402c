"""lm-eval, from names of tasks to numbers: the one place that imports it.

The harness is given a live model. Three things of its own are replaced: the batch size comes from
the memory that is free (its own search starts at 64 times the model's length), datasets may be
looked for in a local folder in the hub's layout, and progress is reported instead of printed.

A group is run task by task, so that each result can be kept as soon as it is there; lm-eval's own
rule then makes the group's scores of them. Standard errors that lm-eval bootstraps (such as that of
LAMBADA's perplexity) take 1,000 samples where its command takes 100,000, which is minutes.
"""

import contextlib
import difflib
import functools
import hashlib
import importlib
import io
import itertools
import json
import logging
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from ternq.errors import InputError, RecipeError
from ternq.hf import Loaded
from ternq.perplexity import rows_that_fit
from ternq.progress import Event, Progress, ignore
from ternq.text import cache_of, first_line

_BOOTSTRAPS = 1000
_PROBED = 8  # documents that are looked at to say how long a task takes
_GENERATED = 256  # tokens that lm-eval generates where a task does not say
_COUNTS = ("samples", "partial")

Place = Callable[[str, Mapping[str, Any]], tuple[str, str]]
"""From a task and its configuration to where its dataset is (a hub id or a folder), and a sentence
that says what is wanted there."""


@dataclass(frozen=True)
class Task:
    """A task, group or tag of lm-eval, its data loaded: ``leaves`` are the tasks it consists of."""

    name: str
    leaves: dict[str, Any]
    groups: dict[str, Any]
    manager: Any


@dataclass(frozen=True)
class Scores:
    """A task's metrics; per document whether the answer was right ("0110")."""

    values: dict[str, Any]
    answers: str | None


@dataclass(frozen=True)
class Settings:
    """How tasks are run: the longest window, documents of each task (None: all), and so on."""

    length: int
    limit: int | None = None
    num_fewshot: int | None = None
    batch_size: int | None = None
    chat: bool = False
    seed: int = 0


def load_tasks(names: Sequence[str], place: Place, missing: list[InputError]) -> list[Task]:
    """Build lm-eval's tasks and groups by name, which reads their data from where ``place`` says.

    What is wrong with data is added to ``missing``, so that it can be said of all tasks at once.
    Raises `RecipeError` for a name lm-eval does not know or a task that ternq does not run.
    """
    if not names:
        return []
    with _quiet():
        manager = _manager(names)
        for name in names:
            _check_name(name, manager.all_tasks)
        manager._factory = _factory(place)
        found = []
        for name in names:
            try:
                found.append(_build(name, manager))
            except InputError as error:
                missing.append(error)
    return found


def text_task(name: str, documents: Sequence[str]) -> Task:
    """lm-eval's rolling perplexities of any text: a task whose documents are given."""
    import datasets
    from lm_eval.api.task import ConfigurableTask
    from lm_eval.tasks import TaskManager

    rows = datasets.Dataset.from_dict({"text": list(documents)})
    metrics = ("word_perplexity", "byte_perplexity", "bits_per_byte")
    config = {
        "task": name,
        "custom_dataset": lambda **_: {"test": rows},
        "test_split": "test",
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": lambda document: document["text"],
        "metric_list": [{"metric": metric} for metric in metrics],
        "metadata": {"version": 1},
    }
    with _quiet():
        leaf = ConfigurableTask(config=config)
        return Task(name, {name: leaf}, {}, TaskManager(include_defaults=False))


def run(
    task: Task, leaf: str, loaded: Loaded, settings: Settings, progress: Progress = ignore
) -> Scores:
    """lm-eval's scores of one of the tasks that ``task`` consists of.

    The values are ``{metric: value, metric_stderr: value, samples, partial}``. Where the model gave
    likelihoods that are not finite, every metric is NaN: an accuracy would look like chance.
    """
    import lm_eval

    count, asked = n_documents(task.leaves[leaf], settings.limit), settings.num_fewshot
    with _quiet():
        adapter = _adapter(loaded, settings, leaf, count, progress)
        out = lm_eval.simple_evaluate(
            model=adapter,
            tasks=[task.leaves[leaf]],
            task_manager=task.manager,
            num_fewshot=asked and _shots(task.leaves[leaf], asked),
            limit=settings.limit,
            apply_chat_template=settings.chat,
            bootstrap_iters=_BOOTSTRAPS,
            log_samples=True,
            **_seeds(settings.seed),
        )
    name = task.leaves[leaf].task_name
    values = _metrics(out["results"][name])
    if adapter.not_finite:
        said = f"{leaf}: '{loaded.name}' gives likelihoods that are not finite"
        progress(Event(leaf, said, level="warning"))
        values = dict.fromkeys(values, math.nan)
    whole = out["n-samples"][name]["original"]
    values |= {"samples": count, "partial": count < whole}
    answers = None if adapter.not_finite else _answers(out["samples"][name])
    return Scores(values, answers)


def aggregate(task: Task, values: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """The scores of a task's groups, by lm-eval's own rule, of those of its leaves."""
    leaves = {
        name: {_key(metric): value for metric, value in own.items() if metric not in _COUNTS}
        | {"sample_len": own["samples"]}
        for name, own in values.items()
    }
    found: dict[str, dict[str, Any]] = {}
    with _quiet():
        for name, group in task.groups.items():
            members = [values[leaf.task_name] for leaf in group.get_all_tasks()]
            scores = _metrics(group.aggregate(leaves))
            if scores:
                samples = sum(own["samples"] for own in members)
                partial = any(own["partial"] for own in members)
                found[name] = scores | {"samples": samples, "partial": partial}
    return found


def n_documents(leaf: Any, limit: int | None) -> int:
    """Documents that a task is measured on."""
    whole = len(leaf.eval_docs)
    return whole if limit is None else min(limit, whole)


def digest(leaf: Any, settings: Settings) -> str:
    """What a task asks: a hash of its documents, so that other data is not taken for the same.

    Where examples go before the questions, what they are drawn from counts too.
    """
    found = hashlib.blake2b(digest_size=16)
    asked = itertools.islice(leaf.eval_docs, n_documents(leaf, settings.limit))
    shots = _shots(leaf, settings.num_fewshot)
    for document in itertools.chain(asked, (leaf.fewshot_docs() or ()) if shots else ()):
        text = json.dumps(document, sort_keys=True, default=str, ensure_ascii=False)
        found.update(text.encode("utf-8", errors="surrogatepass"))
    return found.hexdigest()


def expected_tokens(leaf: Any, tokenizer: Any, settings: Settings) -> int:
    """Roughly how many tokens a task takes: those of its first documents, times their number.

    Of generated text the longest is counted, so it takes at most that.
    """
    with _quiet():
        leaf.set_config(key="num_fewshot", value=_shots(leaf, settings.num_fewshot))
        leaf.set_fewshot_seed(seed=settings.seed)
        count = n_documents(leaf, settings.limit)
        leaf.build_all_requests(limit=min(count, _PROBED))
    tokens = sum(_request_tokens(request, tokenizer, settings) for request in leaf.instances)
    return tokens * count // max(1, min(count, _PROBED))


def _shots(leaf: Any, asked: int | None) -> int:
    """Examples before each question: as asked, but none where a task's authors have it so."""
    if leaf.OUTPUT_TYPE == "loglikelihood_rolling":
        return 0  # the likelihood of a whole text: there is no question
    own = leaf.get_config("num_fewshot")
    return int((own if asked is None or own == 0 else asked) or 0)


def ignores_shots(leaf: Any, asked: int | None) -> bool:
    """Whether a task takes no examples, whatever is asked for."""
    return bool(asked) and _shots(leaf, asked) == 0


def metrics(leaf: Any) -> set[str]:
    """The names of what a task measures."""
    return set(leaf.aggregation())


def generates(leaf: Any) -> bool:
    """Whether a task has the model write text."""
    return bool(leaf.OUTPUT_TYPE == "generate_until")


def _seeds(seed: int) -> dict[str, int]:
    """lm-eval's own seeds for ours of 0, so that examples are those that its command draws."""
    kinds = ("random", "numpy_random", "torch_random", "fewshot_random")
    return {f"{kind}_seed": seed for kind in kinds} if seed else {}


def _request_tokens(request: Any, tokenizer: Any, settings: Settings) -> int:
    text = "".join(part for part in request.args if isinstance(part, str))
    own = len(tokenizer(text, verbose=False)["input_ids"])
    if request.request_type == "generate_until":
        return min(own, settings.length) + int(request.args[1].get("max_gen_toks", _GENERATED))
    return own if "rolling" in request.request_type else min(own, settings.length)


def _manager(names: Sequence[str]) -> Any:
    """lm-eval's task manager; its index of all tasks takes seconds, so the likely folders first."""
    from lm_eval import tasks
    from lm_eval.tasks._index import Kind

    root = Path(tasks.__file__).parent
    parts = [name.split("_") for name in names]
    starts = {"_".join(part[:n]) for part in parts for n in range(1, len(part) + 1)}
    folders: list[str | Path] = [root / s for s in sorted(starts) if s and (root / s).is_dir()]
    if folders:
        few = tasks.TaskManager(include_path=folders, include_defaults=False)
        entries = [few.task_index.get(name) for name in names]
        if all(entry is not None and entry.kind is Kind.TASK for entry in entries):
            return few
    return _index()


@functools.cache
def _index() -> Any:
    """lm-eval's index of all tasks, which takes seconds."""
    from lm_eval import tasks

    return tasks.TaskManager()


def _check_name(name: str, known: Sequence[str]) -> None:
    if name not in known:
        near = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
        raise RecipeError(
            f"lm-eval has no task '{name}'.",
            f"Nearest: {', '.join(near)}." if near else "See `lm-eval ls tasks`.",
        )


def _factory(place: Place) -> Any:
    """lm-eval's builder of tasks, with every dataset where ``place`` says."""
    from lm_eval.tasks._factory import TaskFactory

    class Factory(TaskFactory):  # type: ignore[misc, unused-ignore]
        wanted: str | None = None

        def _load_full_config(self, entry: Any, overrides: Any = None) -> dict[str, Any]:
            config: dict[str, Any] = super()._load_full_config(entry, overrides)
            if config.get("dataset_path"):
                where, self.wanted = place(entry.name, config)
                config["dataset_path"] = where
                if (cache := cache_of(where)) is not None:
                    kwargs = config.get("dataset_kwargs") or {}
                    config["dataset_kwargs"] = kwargs | {"cache_dir": cache}
            return config

    return Factory()


def _build(name: str, manager: Any) -> Task:
    """The task or group, its data loaded; what cannot be run is refused."""
    from datasets.exceptions import DatasetGenerationError
    from jinja2 import UndefinedError

    try:
        loaded = manager.load([name])
    except (OSError, ValueError, DatasetGenerationError) as error:
        raise InputError(
            f"The data of task '{name}' cannot be loaded: {first_line(error)}",
            manager._factory.wanted,
        ) from error
    except (KeyError, UndefinedError) as error:
        raise InputError(
            f"The data of task '{name}' has other splits or columns than the task reads: "
            f"{first_line(error)}.",
            manager._factory.wanted,
        ) from error
    except ImportError as error:
        raise InputError(f"Task '{name}' needs a package: {first_line(error)}") from error
    for task in loaded["tasks"].values():
        unsafe = getattr(task, "UNSAFE_CODE", False)
        if unsafe or getattr(task, "MULTIMODAL", False):
            why = "runs code that the model writes" if unsafe else "is not of text alone"
            raise RecipeError(f"Task '{name}' {why}; ternq does not run it.")
    return Task(name, dict(loaded["tasks"]), dict(loaded["groups"]), manager)


def _metrics(values: Mapping[str, Any]) -> dict[str, Any]:
    """``acc,none`` -> ``acc``, ``exact_match,strict`` -> ``exact_match@strict``; numbers only."""
    metrics: dict[str, Any] = {}
    for key, value in values.items():
        metric, comma, strained = key.partition(",")
        if comma and isinstance(value, int | float):
            metrics[metric if strained == "none" else f"{metric}@{strained}"] = float(value)
    return metrics


def _key(metric: str) -> str:
    """lm-eval's name of one of `_metrics`."""
    name, _, strained = metric.partition("@")
    return f"{name},{strained or 'none'}"


def _answers(samples: Sequence[Mapping[str, Any]]) -> str | None:
    """Per document "1" where the answer was right, else "0"; None where that cannot be said."""
    for metric in ("acc", "exact_match"):
        having = [sample for sample in samples if metric in sample]
        first = [sample for sample in having if sample["filter"] == having[0]["filter"]]
        found = [float(sample[metric]) for sample in sorted(first, key=lambda s: s["doc_id"])]
        if found and set(found) <= {0.0, 1.0}:
            return "".join(str(int(value)) for value in found)
    return None


def _adapter(
    loaded: Loaded, settings: Settings, stage: str, documents: int, progress: Progress
) -> Any:
    """lm-eval's view of a live model, which reports progress and chooses its batch size."""
    from lm_eval.models.huggingface import HFLM

    tokenizer, length = loaded.tokenizer, settings.length
    if tokenizer.eos_token_id is None and tokenizer.bos_token_id is None:
        raise InputError(
            f"The tokenizer of '{loaded.name}' has no token for the beginning or end of text, "
            "which lm-eval needs.",
            "Take the token perplexity alone, as in wikitext:token_perplexity.",
        )

    class Adapter(HFLM):  # type: ignore[misc, unused-ignore]
        done = total = 0
        not_finite = False

        def _expect(self, total: int, longest: int) -> None:
            self.done, self.total = 0, total
            rows = settings.batch_size or rows_that_fit(loaded.model, longest)
            self.batch_size_per_gpu = rows

        def _advance(self, requests: int) -> None:
            """Progress in documents, of which each may be several requests."""
            self.done = min(self.done + requests, self.total)
            seen = documents * self.done // self.total
            progress(Event(stage, done=seen, total=documents))

        def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = False) -> Any:
            sizes = [len(self.tok_encode(request.args[0])) for request in requests]
            self._expect(sum(-(-size // length) or 1 for size in sizes), length)
            found = super().loglikelihood_rolling(requests, disable_tqdm=True)
            self.not_finite |= not all(map(math.isfinite, found))
            return found

        def _loglikelihood_tokens(
            self, requests: Any, disable_tqdm: bool = False, override_bs: int | None = None
        ) -> Any:
            if override_bs is None and requests:
                answer = max(len(rest) for *_, rest in requests)
                if answer > length:
                    raise InputError(
                        f"Task '{stage}' has an answer of {answer} tokens; "
                        f"'{loaded.name}' reads {length} at most."
                    )
                longest = max(len(context) + len(rest) for _, context, rest in requests)
                # answers of one token after one text are read off one pass
                passes = {(*context, *rest[:-1]) for _, context, rest in requests}
                self._expect(len(passes), min(longest, length))
            found = super()._loglikelihood_tokens(requests, True, override_bs)
            self.not_finite |= not all(math.isfinite(value) for value, _ in found)
            return found

        def generate_until(self, requests: Any, disable_tqdm: bool = False) -> Any:
            longest = max(int(r.args[1].get("max_gen_toks", _GENERATED)) for r in requests)
            if longest >= length:
                raise InputError(
                    f"Task '{stage}' has {longest} tokens written; '{loaded.name}' reads {length} "
                    "at most, prompt included."
                )
            self._expect(len(requests), length)
            return super().generate_until(requests, disable_tqdm=True)

        def _model_generate(self, context: Tensor, *args: Any, **kwargs: Any) -> Any:
            written = super()._model_generate(context, *args, **kwargs)
            self._advance(len(context))
            return written

        def _model_call(self, inps: Tensor, *args: Any, **kwargs: Any) -> Any:
            logits = super()._model_call(inps, *args, **kwargs)
            self._advance(len(inps))
            return logits

    return Adapter(pretrained=loaded.model, tokenizer=tokenizer, batch_size=1, max_length=length)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep lm-eval's logs, prints and progress bars off the terminal: ternq has its own.

    No processes are forked beside torch's threads, and neither git nor pip is asked what is here.
    """
    import datasets
    from tqdm import tqdm

    def silent(*args: Any, **options: Any) -> Any:
        return tqdm(*args, **options | {"disable": True})

    log = logging.getLogger("lm_eval")
    level = log.level
    log.setLevel(logging.CRITICAL)
    datasets.disable_progress_bars()
    with contextlib.ExitStack() as stack:
        stack.callback(log.setLevel, level)
        for module in ("api.task", "api.model", "models.huggingface"):
            stack.enter_context(_swapped(f"lm_eval.{module}", "tqdm", silent))
        stack.enter_context(_swapped("lm_eval.evaluator", "get_git_commit_hash", lambda: None))
        stack.enter_context(_swapped("lm_eval.evaluator", "add_env_info", lambda results: None))
        stack.enter_context(_environment("DISABLE_MULTIPROC", "1"))
        stack.enter_context(contextlib.redirect_stdout(io.StringIO()))
        yield


@contextlib.contextmanager
def _swapped(module: str, name: str, value: Any) -> Iterator[None]:
    place = importlib.import_module(module)
    before = getattr(place, name)
    setattr(place, name, value)
    try:
        yield
    finally:
        setattr(place, name, before)


@contextlib.contextmanager
def _environment(name: str, value: str) -> Iterator[None]:
    before = os.environ.get(name)
    os.environ[name] = value
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before
