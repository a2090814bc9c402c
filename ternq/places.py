"""Where the data of tasks is: on the hub, in its cache, or in a folder that stands for the hub.

What can be said without importing anything heavy is said at once.
"""

import functools
import importlib.util
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ternq.errors import InputError
from ternq.suites import EFFICIENCY, expand
from ternq.text import is_offline, load_split, looks_local

# what the token perplexity of a task is taken of, as lm-eval's own configurations say such things;
# PTB as GPTQ's published code has it since its authors' updated results (`get_ptb_new`)
TEXTS: dict[str, dict[str, Any]] = {
    "wikitext": {
        "dataset_path": "Salesforce/wikitext",
        "dataset_name": "wikitext-2-raw-v1",
        "test_split": "test",
    },
    "c4": {
        "dataset_path": "allenai/c4",
        "dataset_name": "en",
        "validation_split": "validation",
        "dataset_kwargs": {
            "data_files": {"validation": "en/c4-validation.00000-of-00008.json.gz"},
        },
    },
    "ptb": {
        "dataset_path": "ptb-text-only/ptb_text_only",
        "dataset_name": "penn_treebank",
        "test_split": "test",
    },
}
_COLUMNS = {"ptb": "sentence"}
_BUILDERS = {"json", "csv", "parquet", "text", "arrow"}
_SPLITS = ("test_split", "validation_split", "training_split", "fewshot_split")


def split(name: str) -> tuple[str, str | None]:
    """A task and the metric after its last colon, where there is one; names of files have colons.

    >>> split("piqa:acc"), split("./a:b.txt")
    (('piqa', 'acc'), ('./a:b.txt', None))
    """
    task, _, metric = name.rpartition(":")
    if not task or Path(name).expanduser().exists():
        return name, None
    known = not looks_local(name) or Path(task).expanduser().exists()
    return (task, metric) if known else (name, None)


def is_text(name: str) -> bool:
    """Whether a task, without its metric, is a local text and not the name of something."""
    if looks_local(name):
        return True
    return name not in TEXTS and not _of_lm_eval(name) and Path(name).expanduser().exists()


@functools.cache
def _folders() -> frozenset[str]:
    """lm-eval's folders of tasks, without importing it."""
    found = importlib.util.find_spec("lm_eval")
    places = found.submodule_search_locations or () if found else ()
    inside = (path for place in places for path in Path(place, "tasks").iterdir())
    return frozenset(path.name for path in inside if path.is_dir())


def _of_lm_eval(name: str) -> bool:
    """Whether lm-eval has a folder that a task of this name may be in."""
    parts = name.split("_")
    return any("_".join(parts[:n]) in _folders() for n in range(1, len(parts) + 1))


def refuse_offline(
    tasks: Sequence[str], data_dir: str | Path | None = None, offline: bool = False
) -> None:
    """`InputError` where a task's data can only be on the hub, and the hub is out of reach."""
    names = [split(name)[0] for name in expand(tuple(tasks))]
    names = [name for name in names if name != EFFICIENCY and not is_text(name)]
    if data_dir is not None or not names or not is_offline(offline):
        return
    os.environ["HF_HUB_OFFLINE"] = "1"  # where no network was found, nothing is to wait for it
    kept = any(_cache().glob("*___*"))
    for name in names:
        if name not in TEXTS and not _of_lm_eval(name):
            continue  # mistyped, perhaps: lm-eval knows better
        if not kept or (name in TEXTS and not _cached(TEXTS[name]["dataset_path"])):
            raise _offline(name)


class Finder:
    """Where datasets are: on the hub, in its library's cache, or in a folder that stands for it."""

    def __init__(self, data_dir: str | Path | None, offline: bool) -> None:
        if data_dir is not None and not Path(data_dir).is_dir():
            raise InputError(
                f"There is no folder '{data_dir}'.", "--data-dir names a folder of data."
            )
        self._root = None if data_dir is None else Path(data_dir).expanduser().resolve()
        self._offline = self._root is None and is_offline(offline)

    def place(self, task: str, config: Mapping[str, Any]) -> tuple[str, str]:
        """The hub id or folder of a task's dataset, and a sentence saying what is wanted there."""
        dataset = config["dataset_path"]
        if dataset in _BUILDERS or Path(dataset).is_dir():
            return dataset, f"'{task}' names its own files."
        if self._root is None:
            if self._offline and not _cached(dataset):
                raise _offline(task)
            return dataset, f"The dataset '{dataset}' is on the hub."
        folder = self._root / dataset
        wanted = _wanted(folder, config)
        if not folder.resolve().is_relative_to(self._root) or not folder.is_dir():
            raise InputError(
                f"Task '{task}' needs the dataset '{dataset}', which --data-dir does not hold.",
                wanted,
            )
        return str(folder), wanted

    def read(self, task: str) -> list[str]:
        """The documents of one of `TEXTS`."""
        config = TEXTS[task]
        where, wanted = self.place(task, config)
        split = config.get("test_split") or config["validation_split"]
        files = config.get("dataset_kwargs", {}).get("data_files")
        try:
            rows = load_split(where, config["dataset_name"], split, files=files)
        except InputError as error:
            raise InputError(error.message, wanted) from error
        column = _COLUMNS.get(task, "text")
        if column not in rows.column_names:
            has = ", ".join(rows.column_names)
            raise InputError(f"The data of task '{task}' has no column '{column}' but {has}.")
        return list(rows[column])


def _wanted(folder: Path, config: Mapping[str, Any]) -> str:
    """What a dataset's folder has to hold, down to a file."""
    files = (config.get("dataset_kwargs") or {}).get("data_files")
    name = config.get("dataset_name") or "default"
    splits = [str(config[key]) for key in _SPLITS if config.get(key)] or ["test"]
    splits = list(dict.fromkeys(splits))
    paths = list(files.values()) if isinstance(files, Mapping) else [f"{name}/{splits[0]}.parquet"]
    such = " and ".join(f"'{folder / str(path)}'" for path in paths)
    return (
        f"Wanted, as on the hub: '{folder / 'README.md'}' with the configuration '{name}' "
        f"(splits: {', '.join(splits)}), and its files, such as {such}."
    )


def _offline(task: str) -> InputError:
    return InputError(
        f"The data of task '{task}' is on the hub, and ternq is offline.",
        "Name a folder in the hub's layout with --data-dir, or a local text file.",
    )


def _cache() -> Path:
    """Where `datasets` keeps what it has read from the hub, without importing it."""
    home = os.environ.get("HF_HOME") or Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / (
        "huggingface"
    )
    return Path(os.environ.get("HF_DATASETS_CACHE") or Path(home) / "datasets").expanduser()


def _cached(dataset: str) -> bool:
    return (_cache() / dataset.replace("/", "___")).is_dir()
