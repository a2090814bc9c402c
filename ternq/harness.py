"""lm-eval, from names of tasks to numbers: the one place that imports it.

The harness is given a live model. Three things of its own are replaced: the batch size comes from
the memory that is free (its own search starts at 64 times the model's length), datasets may be
looked for in a local folder in the hub's layout, and progress is reported instead of printed.
"""

import contextlib
import difflib
import importlib
import io
import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from ternq.errors import InputError, RecipeError
from ternq.hf import Loaded
from ternq.perplexity import rows_that_fit
from ternq.progress import Event, Progress
from ternq.text import cache_of, first_line

_BOOTSTRAPS = 1000

Place = Callable[[str, str], str]
"""From a task and its dataset to where the dataset is: a hub id or a folder."""


@dataclass(frozen=True)
class Task:
    """A task or group of lm-eval (a tag is several) with its data loaded."""

    name: str
    parts: list[Any]
    manager: Any


def load_tasks(names: Sequence[str], place: Place) -> list[Task]:
    """Build lm-eval's tasks and groups by name, which reads their data from where ``place`` says.

    Raises `RecipeError` for a name lm-eval does not know or a task that ternq does not run, and
    `InputError` for data that is missing or has another shape.
    """
    if not names:
        return []
    with _quiet():
        manager = _manager(names)
        for name in names:
            _check_name(name, manager.all_tasks)
        manager._factory = _factory(place)
        return [Task(name, _build(name, manager), manager) for name in names]


def run(
    task: Task,
    loaded: Loaded,
    length: int,
    limit: int | None,
    num_fewshot: int | None,
    batch_size: int | None,
    seed: int,
    progress: Progress,
) -> dict[str, dict[str, Any]]:
    """lm-eval's scores ``{NAME: {metric: value, metric_stderr: value, samples, partial}}``.

    Names are those of the task, or of the group and its members. ``length`` is the longest window,
    ``limit`` the number of documents of each task (None: all).
    """
    import lm_eval

    with _quiet():
        out = lm_eval.simple_evaluate(
            model=_adapter(loaded, length, batch_size, task.name, progress),
            tasks=task.parts,
            task_manager=task.manager,
            num_fewshot=num_fewshot,
            limit=limit,
            bootstrap_iters=_BOOTSTRAPS,
            log_samples=False,
            random_seed=seed,
            numpy_random_seed=seed,
            torch_random_seed=seed,
            fewshot_random_seed=seed,
        )
    return {name: _scores(name, out) for name in out["results"] if _metrics(out["results"][name])}


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
        def _load_full_config(self, entry: Any, overrides: Any = None) -> dict[str, Any]:
            config: dict[str, Any] = super()._load_full_config(entry, overrides)
            if config.get("dataset_path"):
                where = place(entry.name, config["dataset_path"])
                config["dataset_path"] = where
                if (cache := cache_of(where)) is not None:
                    kwargs = config.get("dataset_kwargs") or {}
                    config["dataset_kwargs"] = kwargs | {"cache_dir": cache}
            return config

    return Factory()


def _build(name: str, manager: Any) -> list[Any]:
    """The task or group, its data loaded; what cannot be run is refused."""
    from datasets.exceptions import DatasetGenerationError
    from jinja2 import UndefinedError

    try:
        loaded = manager.load([name])
    except (OSError, ValueError, KeyError, UndefinedError, DatasetGenerationError) as error:
        raise InputError(
            f"The data of task '{name}' cannot be loaded: {first_line(error)}"
        ) from error
    except ImportError as error:
        raise InputError(f"Task '{name}' needs a package: {first_line(error)}") from error
    for task in loaded["tasks"].values():
        unsafe = getattr(task, "UNSAFE_CODE", False)
        if unsafe or getattr(task, "MULTIMODAL", False):
            why = "runs code that the model writes" if unsafe else "is not of text alone"
            raise RecipeError(f"Task '{name}' {why}; ternq does not run it.")
    inner = {child for members in loaded["group_map"].values() for child in members}
    parts = loaded["groups"] | loaded["tasks"]
    return [part for key, part in parts.items() if key not in inner]


def _scores(name: str, out: Mapping[str, Any]) -> dict[str, Any]:
    counts = out["n-samples"]
    members = _members(name, out.get("group_subtasks", {}))
    seen = sum(counts[member]["effective"] for member in members if member in counts)
    whole = sum(counts[member]["original"] for member in members if member in counts)
    return _metrics(out["results"][name]) | {"samples": seen, "partial": seen < whole}


def _members(name: str, groups: Mapping[str, Sequence[str]]) -> list[str]:
    children = groups.get(name) or ()
    return [leaf for child in children for leaf in _members(child, groups)] or [name]


def _metrics(values: Mapping[str, Any]) -> dict[str, float]:
    """``acc,none`` -> ``acc``, ``exact_match,strict`` -> ``exact_match@strict``; numbers only."""
    metrics: dict[str, float] = {}
    for key, value in values.items():
        metric, comma, strained = key.partition(",")
        if comma and isinstance(value, int | float):
            metrics[metric if strained == "none" else f"{metric}@{strained}"] = float(value)
    return metrics


def _adapter(
    loaded: Loaded, length: int, batch_size: int | None, stage: str, progress: Progress
) -> Any:
    """lm-eval's view of a live model, which reports progress and chooses its batch size."""
    from lm_eval.models.huggingface import HFLM

    tokenizer = loaded.tokenizer
    if tokenizer.eos_token_id is None and tokenizer.bos_token_id is None:
        raise InputError(
            f"The tokenizer of '{loaded.name}' has no token for the beginning or end of text, "
            "which lm-eval needs.",
            "Take the token perplexity alone, as in wikitext:token_perplexity.",
        )

    class Adapter(HFLM):  # type: ignore[misc, unused-ignore]
        done = total = 0

        def _expect(self, total: int, longest: int) -> None:
            self.done, self.total = 0, total
            self.batch_size_per_gpu = batch_size or rows_that_fit(loaded.model, longest)

        def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = False) -> Any:
            sizes = [len(self.tok_encode(request.args[0])) for request in requests]
            self._expect(sum(-(-size // length) or 1 for size in sizes), length)
            return super().loglikelihood_rolling(requests, disable_tqdm=True)

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
                self._expect(len(requests), min(longest, length))
            return super()._loglikelihood_tokens(requests, True, override_bs)

        def generate_until(self, requests: Any, disable_tqdm: bool = False) -> Any:
            self._expect(len(requests), length)
            return super().generate_until(requests, disable_tqdm=True)

        def _model_call(self, inps: Tensor, *args: Any, **kwargs: Any) -> Any:
            logits = super()._model_call(inps, *args, **kwargs)
            self.done = min(self.done + len(inps), self.total)
            progress(Event(stage, done=self.done, total=self.total))
            return logits

    return Adapter(pretrained=loaded.model, tokenizer=tokenizer, batch_size=1, max_length=length)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep lm-eval's logs, prints and progress bars off the terminal: ternq has its own.

    No processes are forked beside torch's threads, and git is not asked for a commit.
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
