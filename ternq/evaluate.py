"""Perplexities and lm-eval tasks, of any model ternq loads.

The harness is lm-eval itself, given a live model; ternq adds the token perplexity that papers print
beside lm-eval's word perplexity, a batch size computed from the memory that is free (lm-eval's own
search starts at 64 times the model's length), and a local folder that stands for the hub. All
tasks and texts are loaded before the first model is, so that what is missing is said at once.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from ternq import harness
from ternq.errors import InputError, RecipeError
from ternq.hf import Loaded, load, max_length
from ternq.perplexity import BLOCK, token_perplexity
from ternq.progress import Event, Progress, ignore
from ternq.text import is_offline, load_split, looks_local, whole_text

__all__ = ["evaluate", "token_perplexity"]

TOKEN_PERPLEXITY = "token_perplexity"
Limit = int | Literal["all"] | None

_C4_FILE = "en/c4-validation.00000-of-00008.json.gz"
_C4_ROWS, _C4_BLOCKS, _C4_DOCUMENTS = 45_576, 256, 1000
_HUB = {  # task -> dataset, configuration, split, files
    "wikitext": ("Salesforce/wikitext", "wikitext-2-raw-v1", "test", None),
    "c4": ("allenai/c4", "en", "validation", {"validation": _C4_FILE}),
}
_BUILDERS = {"json", "csv", "parquet", "text", "arrow"}


@dataclass
class Job:
    """One task as asked for: what text its token perplexity is taken of, and lm-eval's part."""

    name: str
    metric: str | None = None
    text: str | None = None
    documents: Sequence[str] | None = None
    task: harness.Task | None = None


def evaluate(
    models: Sequence[str | Loaded],
    *,
    tasks: Sequence[str] = ("wikitext",),
    text: Sequence[str | Path] = (),
    limit: Limit = None,
    num_fewshot: int | None = None,
    batch_size: int | None = None,
    data_dir: str | Path | None = None,
    offline: bool = False,
    device: str = "cpu",
    dtype: torch.dtype | None = None,
    trust_remote_code: bool = False,
    seed: int = 0,
    progress: Progress = ignore,
    jobs: Sequence[Job] = (),
) -> dict[str, Any]:
    """Measure models: ``{"results": {MODEL: {TASK: {metric: value, samples: n, partial: bool}}}}``.

    A task is ``wikitext`` or ``c4`` (token perplexity and lm-eval's perplexities), any other task
    or group of lm-eval, or a local text file or folder (token perplexity); ``TASK:METRIC`` takes
    that metric alone. ``limit`` takes the first documents and blocks only; unset, c4 takes the
    first 1000 documents. ``data_dir`` is a folder in the hub's layout, used in place of the hub.
    ``jobs`` are tasks that `load_jobs` has loaded already.
    Raises `RecipeError` for an unknown task and `InputError` for missing models, texts and data.
    """
    if isinstance(limit, int) and limit < 1:
        raise RecipeError(f"--limit is {limit}; it is at least 1, or 'all'.")
    jobs = jobs or load_jobs((*tasks, *map(str, text)), data_dir, offline)
    if not jobs or not models:
        raise RecipeError("Nothing to evaluate.", "Name a model and a task.")
    results: dict[str, dict[str, dict[str, Any]]] = {}
    for model in models:
        name = model if isinstance(model, str) else model.name
        if isinstance(model, str):
            model = load(
                model, dtype=dtype, device=device, offline=offline,
                trust_remote_code=trust_remote_code,
            )  # fmt: skip
        own: dict[str, dict[str, Any]] = {}
        for job in jobs:
            for task, values in _run(
                job, model, limit, num_fewshot, batch_size, seed, progress
            ).items():
                own.setdefault(task, {}).update(values)
        results[name] = own
    return {"results": results}


def load_jobs(
    tasks: Sequence[str], data_dir: str | Path | None = None, offline: bool = False
) -> list[Job]:
    """Load all that tasks need but a model, so that what is missing is said before any long work.

    Raises `RecipeError` for an unknown task and `InputError` for missing texts and data.
    """
    jobs = [_parse(name) for name in tasks]
    _load_texts(jobs, data_dir, offline)
    _load_tasks(jobs, data_dir)
    return jobs


def _run(
    job: Job,
    loaded: Loaded,
    limit: Limit,
    num_fewshot: int | None,
    batch_size: int | None,
    seed: int,
    progress: Progress,
) -> dict[str, dict[str, Any]]:
    """Both parts of a task, under its name; the members of a group beside it."""
    length = min(BLOCK, max_length(loaded.model))
    found: dict[str, dict[str, Any]] = {}
    if job.text is not None or job.documents is not None:
        ids, partial = _ids(job, loaded.tokenizer, length, progress)
        if isinstance(limit, int) and limit * length < len(ids):
            ids, partial = ids[: limit * length], True
        stage = f"{job.name}: token perplexity"
        values = token_perplexity(
            loaded.model, ids, length, batch_size=batch_size, stage=stage, progress=progress
        )
        found[job.name] = values | {"samples": values["blocks"], "partial": partial}
    if job.task is not None:
        if limit is None and job.name == "c4":
            limit = _C4_DOCUMENTS
        most = limit if isinstance(limit, int) else None
        scores = harness.run(
            job.task, loaded, length, most, num_fewshot, batch_size, seed, progress
        )
        for name, values in scores.items():
            before = found.get(name, {})
            partial = values["partial"] or before.get("partial", False)
            found[name] = before | values | {"partial": partial}
    if job.metric is not None:
        _only(found, job)
    return found


def _only(found: dict[str, dict[str, Any]], job: Job) -> None:
    metric = job.metric
    if not any(metric in values for values in found.values()):
        has = sorted({name for values in found.values() for name in values})
        raise RecipeError(
            f"Task '{job.name}' has no metric '{metric}'.", f"It has {', '.join(has)}."
        )
    kept = {metric, f"{metric}_stderr", "samples", "partial", "blocks", "block_length", "tokens"}
    for name, values in found.items():
        found[name] = {key: value for key, value in values.items() if key in kept}


# -- what is measured ------------------------------------------------------------------------------


def _parse(name: str) -> Job:
    task, _, metric = name.rpartition(":")
    if Path(name).expanduser().exists() and (looks_local(name) or name not in _HUB):
        return Job(name)
    if task and not looks_local(name):
        return Job(task, metric)
    return Job(name)


def _is_text(job: Job) -> bool:
    return job.name not in _HUB and (
        looks_local(job.name) or (job.metric is None and Path(job.name).is_file())
    )


def _load_texts(jobs: Sequence[Job], data_dir: str | Path | None, offline: bool) -> None:
    """The texts of token perplexities; and the word that the hub is out of reach."""
    if data_dir is not None and not Path(data_dir).is_dir():
        raise InputError(f"There is no folder '{data_dir}'.", "--data-dir names a folder of data.")
    for job in jobs:
        if _is_text(job):
            job.text = whole_text(job.name)
        elif data_dir is None and is_offline(offline):
            raise InputError(
                f"The data of task '{job.name}' is on the hub, and ternq is offline.",
                "Name a folder in the hub's layout with --data-dir, or a local text file.",
            )
    for job in jobs:
        if job.name in _HUB and job.metric in (None, TOKEN_PERPLEXITY):
            path, config, split, files = _HUB[job.name]
            where = _place(job.name, path, data_dir)
            job.documents = load_split(where, config, split, files=files)["text"]


def _load_tasks(jobs: Sequence[Job], data_dir: str | Path | None) -> None:
    wanted = [job for job in jobs if not _is_text(job) and job.metric != TOKEN_PERPLEXITY]

    def place(task: str, dataset: str) -> str:
        return _place(task, dataset, data_dir)

    loaded = harness.load_tasks([job.name for job in wanted], place)
    for job, task in zip(wanted, loaded, strict=True):
        job.task = task


def _place(task: str, dataset: str, data_dir: str | Path | None) -> str:
    """The hub id, or the folder of ``data_dir`` that stands for it."""
    if data_dir is None or dataset in _BUILDERS:
        return dataset
    folder = Path(data_dir).expanduser().resolve() / dataset
    if not folder.is_dir():
        raise InputError(
            f"Task '{task}' needs the dataset '{dataset}', which --data-dir does not hold.",
            f"Put it at '{folder}', laid out as on the hub.",
        )
    return str(folder)


def _ids(job: Job, tokenizer: Any, length: int, progress: Progress) -> tuple[Tensor, bool]:
    """Token ids [n] of a task's text, and whether they are only a part of what the task means."""
    if job.text is not None:
        return _encode(tokenizer, job.text), False
    documents = job.documents or ()
    if job.name != "c4":
        return _encode(tokenizer, "\n\n".join(documents)), False
    if len(documents) == _C4_ROWS:
        return gptq_sample(documents, tokenizer, length, _C4_BLOCKS), False
    said = f"not C4's validation shard: {len(documents)} documents of {_C4_ROWS}, read in order"
    progress(Event("c4", said, level="warning"))
    return _encode(tokenizer, "\n\n".join(documents))[: _C4_BLOCKS * length], True


def gptq_sample(
    documents: Sequence[str], tokenizer: Any, length: int, n_blocks: int, seed: int = 0
) -> Tensor:
    """Ids [n_blocks * length] drawn as GPTQ's published loader draws C4's validation blocks.

    Documents are drawn with replacement until one is longer than a block, then a place in it.
    """
    rng = random.Random(seed)
    blocks: list[Tensor] = []
    while len(blocks) < n_blocks:
        ids = _encode(tokenizer, documents[rng.randint(0, len(documents) - 1)])
        if len(ids) > length:
            start = rng.randint(0, len(ids) - length - 1)
            blocks.append(ids[start : start + length])
    return torch.cat(blocks)


def _encode(tokenizer: Any, text: str) -> Tensor:
    return torch.tensor(tokenizer(text, verbose=False)["input_ids"], dtype=torch.int64)
