"""What is to be measured: tasks, suites and texts by name, with their data found and loaded.

All of it is loaded before the first model is, so that whatever is missing is said at once.
"""

import hashlib
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ternq import harness
from ternq.errors import InputError
from ternq.places import TEXTS, Finder, is_text, refuse_offline, split
from ternq.progress import Event, Progress, ignore
from ternq.suites import EFFICIENCY, SUITES, expand
from ternq.text import whole_documents

TOKEN_PERPLEXITY = "token_perplexity"

_C4_ROWS, C4_BLOCKS, C4_DOCUMENTS = 45_576, 256, 1000
_LM_EVAL = ("wikitext", "c4")  # of the texts lm-eval has tasks of its own for these
_JOINTS = {"ptb": " "}
_MISSES = 10_000  # of C4's documents about one in fifty is long enough


@dataclass(frozen=True)
class Text:
    """The text of a token perplexity: read from its start, or blocks drawn from its documents."""

    text: str
    drawn: Sequence[str] = ()
    blocks: int | None = None
    partial: bool = False

    def ids(self, tokenizer: Any, length: int) -> Tensor:
        """Token ids [n] in blocks of ``length``."""
        if self.drawn:
            return gptq_sample(self.drawn, tokenizer, length, C4_BLOCKS)
        ids = encode(tokenizer, self.text)
        return ids if self.blocks is None else ids[: self.blocks * length]

    def digest(self) -> str:
        """A hash of the text."""
        found = hashlib.blake2b(digest_size=16)
        for part in self.drawn or (self.text,):
            found.update(part.encode("utf-8", errors="surrogatepass"))
        return found.hexdigest()


@dataclass
class Job:
    """One task as asked for: what text its token perplexity is taken of, and lm-eval's part."""

    name: str
    metrics: tuple[str, ...] = ()
    text: Text | None = None
    task: harness.Task | None = None

    @property
    def rolling(self) -> bool:
        """Whether anything but the token perplexity is asked for, which is lm-eval's."""
        return self.metrics != (TOKEN_PERPLEXITY,)

    @property
    def blocks(self) -> bool:
        """Whether the token perplexity is asked for."""
        return not self.metrics or TOKEN_PERPLEXITY in self.metrics

    @property
    def names(self) -> set[str]:
        """What it has results of."""
        return {self.name, *(self.task.leaves | self.task.groups if self.task else ())}

    @property
    def efficiency(self) -> bool:
        """Whether this is not about quality, but about time and memory."""
        return self.name == EFFICIENCY


def load_jobs(
    tasks: Sequence[str],
    data_dir: str | Path | None = None,
    offline: bool = False,
    progress: Progress = ignore,
) -> list[Job]:
    """Load all that tasks need but a model, so that what is missing is said before any long work.

    Raises `RecipeError` for an unknown task and `InputError` for missing texts and data.
    """
    refuse_offline(tasks, data_dir, offline)
    for name in tasks:
        if name in SUITES and (left_out := SUITES[name].left_out):
            progress(Event("tasks", f"{name}: {left_out}."))
    jobs = _merged([_parse(name) for name in expand(tuple(tasks))])
    finder = Finder(data_dir, offline)
    missing: list[InputError] = []
    for job in jobs:
        try:
            _load_text(job, finder, progress)
        except InputError as error:
            missing.append(error)
    wanted = [job for job in jobs if job.rolling and of_lm_eval(job.name)]
    loaded = harness.load_tasks([job.name for job in wanted], finder.place, missing)
    _refuse(missing)
    for job, task in zip(wanted, loaded, strict=True):
        job.task = task
    return jobs


def of_lm_eval(name: str) -> bool:
    """Whether a task is lm-eval's, or is taken to be."""
    return name in _LM_EVAL or not (name in TEXTS or name == EFFICIENCY or is_text(name))


def _refuse(missing: Sequence[InputError]) -> None:
    """One error for all that is missing, each said once."""
    if len(missing) == 1:
        raise missing[0]
    if missing:
        said = dict.fromkeys(error.message for error in missing)
        hints = dict.fromkeys(error.hint for error in missing if error.hint)
        raise InputError(" ".join(said), " ".join(hints) or None)


def gptq_sample(
    documents: Sequence[str], tokenizer: Any, length: int, n_blocks: int, seed: int = 0
) -> Tensor:
    """Ids [n_blocks * length] drawn as GPTQ's published loader draws C4's validation blocks.

    Documents are drawn with replacement until one is longer than a block, then a place in it.
    (``get_c4`` of its ``datautils.py``, which would fail on a document of just one block.)
    """
    rng = random.Random(seed)
    blocks: list[Tensor] = []
    misses = 0
    while len(blocks) < n_blocks:
        ids = encode(tokenizer, documents[rng.randint(0, len(documents) - 1)])
        if len(ids) > length:
            start = rng.randint(0, len(ids) - length - 1)
            blocks.append(ids[start : start + length])
            misses = 0
        elif (misses := misses + 1) > _MISSES:
            raise InputError(
                f"{_MISSES:,} documents in a row have fewer than {length} tokens to draw from.",
                "Take a smaller --max-length.",
            )
    return torch.cat(blocks)


def encode(tokenizer: Any, text: str) -> Tensor:
    """Token ids [n], with the special tokens that the tokenizer adds by itself."""
    return torch.tensor(tokenizer(text, verbose=False)["input_ids"], dtype=torch.int64)


def _parse(name: str) -> Job:
    task, metric = split(name)
    return Job(task, (metric,) if metric else ())


def _merged(jobs: Sequence[Job]) -> list[Job]:
    """One job for each name, with all metrics that were asked for; none named means every one."""
    found: dict[str, Job] = {}
    for job in jobs:
        other = found.setdefault(job.name, job)
        both = other.metrics and job.metrics
        other.metrics = tuple(dict.fromkeys((*other.metrics, *job.metrics))) if both else ()
    return list(found.values())


def _load_text(job: Job, finder: Finder, progress: Progress) -> None:
    """The text of a token perplexity; for a text that is no task of lm-eval, its task too."""
    if is_text(job.name):
        whole, documents = whole_documents(job.name)
        job.text = Text(whole) if job.blocks else None
        job.task = harness.text_task(job.name, documents) if job.rolling else None
    elif job.name in TEXTS and (job.blocks or job.name not in _LM_EVAL):
        text = _text(job.name, finder.read(job.name), progress)
        job.text = text if job.blocks else None
        if job.name not in _LM_EVAL and job.rolling:
            job.task = harness.text_task(job.name, [text.text])


def _text(name: str, documents: list[str], progress: Progress) -> Text:
    """What of a task's documents is read, and how they are joined."""
    if name != "c4":
        return Text(_JOINTS.get(name, "\n\n").join(documents))
    if len(documents) == _C4_ROWS:
        return Text("", drawn=documents)
    said = f"not C4's validation shard: {len(documents)} documents of {_C4_ROWS}, read in order"
    progress(Event("c4", said, level="warning"))
    return Text("\n\n".join(documents), blocks=C4_BLOCKS, partial=True)
