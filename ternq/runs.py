"""The folder of a run: opened, found again, compared, removed.

``run.json`` says what is made from what; ``base/`` holds configuration and tokenizer,
``checkpoints/`` and ``metrics.jsonl`` are the loop's, ``logs/`` the trackers', ``self.json`` is
text that the teacher wrote, ``start/`` the blocks of a start that took calibration,
``teacher/`` what the teacher put out, ``blocks/`` what is made block by block. A lock in it dies
with the process. Only what a run writes is ever removed, and only where ``run.json`` is ours.
"""

import contextlib
import datetime
import hashlib
import json
import os
import shutil
import socket
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import ternq
from ternq import hf, origin, processes
from ternq.checkpoint import dtype_name
from ternq.data import parse_mix
from ternq.errors import InputError, RecipeError
from ternq.files import read_json, sha256, write_json, writing
from ternq.linear import ternary_layers
from ternq.metrics import METRICS
from ternq.recipe import DEMO, DEMO_FOLDER, Recipe
from ternq.snapshots import CHECKPOINTS
from ternq.trackers import LOGS

OWN_TEXT_FILE = "self.json"
TEACHER_FOLDER = "teacher"  # what its last block put out (`ternq.teacher`)
BLOCKS = "blocks"  # finished blocks of a run that goes block by block
START = "start"  # what a start that reads text made, also for the drift of a resumed run
FORMAT = "ternq_run"
FORMAT_VERSION = 2
LOCK = ".lock"
_BEGUN = {OWN_TEXT_FILE, origin.BASE_FOLDER, LOCK}  # all there is if a start was cut off
_REMOVED = f".{origin.RUN_FILE}.removed"  # instead of run.json while a run is being removed


def of_artefact(out: Path) -> Path:
    """The run of an artefact, while it is being made."""
    return out.with_name(out.name + ".run")


@contextlib.contextmanager
def locked(
    out: Path, resume: bool | None, overwrite: bool, inputs: Sequence[str | None]
) -> Iterator[None]:
    """Hold the run in ``out``, or the place where it will be, until the block ends.

    The lock (flock) dies with the process, so that a file which a killed one left does no harm.
    There is none on Windows, on file systems without locks, and in processes that only help the
    first one of a launch.

    Raises:
        RecipeError: another process holds it; or what `refuse_input` and `existing` raise.
    """
    refuse_input(out, list(inputs))
    existing(out, resume, overwrite)
    handle = _lock(out / LOCK)
    try:
        for path in list(out.iterdir()) if handle is not None else []:
            if _leftover(path) and path.name != _REMOVED:
                path.unlink()
        yield
    finally:
        if handle is not None:
            with contextlib.suppress(OSError):
                (out / LOCK).unlink()
                if not any(out.iterdir()):
                    out.rmdir()
            os.close(handle)


def _lock(path: Path) -> int | None:
    """An open file that is locked until it is closed; None where that cannot be."""
    if sys.platform == "win32" or not processes.is_main():
        return None
    import fcntl

    for _ in range(100):  # each time the last holder removed file or folder as it ended
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        except FileNotFoundError:
            continue
        except OSError:  # the first thing that is written says what is wrong with the place
            return None
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(handle)
            raise _in_use(path) from None
        except OSError:
            os.close(handle)
            return None
        if _names(path, handle):
            _sign(handle)
            return handle
        os.close(handle)
    return None


def _sign(handle: int) -> None:
    """Write who holds a lock, for others to say."""
    since = datetime.datetime.now().astimezone().isoformat(" ", "seconds")
    holder = {"pid": os.getpid(), "host": socket.gethostname(), "since": since}
    with contextlib.suppress(OSError):
        os.truncate(handle, 0)
        os.write(handle, json.dumps(holder).encode())


def _names(path: Path, handle: int) -> bool:
    try:
        return os.path.samestat(path.stat(), os.fstat(handle))
    except FileNotFoundError:
        return False


def _in_use(path: Path) -> RecipeError:
    who = "another process"
    with contextlib.suppress(InputError, KeyError):
        holder = read_json(path)
        who = f"process {holder['pid']} on {holder['host']}, since {holder['since']}"
    return RecipeError(
        f"'{path.parent}' is in use by {who}.",
        "Wait for it to end, stop it, or choose another -o.",
    )


def existing(out: Path, resume: bool | None, overwrite: bool) -> dict[str, Any] | None:
    """The record of the run in ``out``, or None if a new one may begin there.

    Raises:
        RecipeError: something else is there, or a run that must not be gone on with.
        InputError: there is none, and there must be.
    """
    if (out / origin.RUN_FILE).is_file():
        if FORMAT not in read_json(out / origin.RUN_FILE):
            raise RecipeError(
                f"'{out}' holds a {origin.RUN_FILE} that is not ternq's.", "Choose another -o."
            )
        if resume is False and not overwrite:
            raise RecipeError(f"'{out}' holds a run.", "Go on with it, or pass --overwrite.")
        record = origin.read_run(out)
        if record[FORMAT] != FORMAT_VERSION and not overwrite:
            raise RecipeError(
                f"'{out}' is a run of another version of ternq (format {record[FORMAT]}; this one "
                f"goes on with format {FORMAT_VERSION}).",
                "Go on with that version, choose another -o, or pass --overwrite.",
            )
        return record
    if resume:
        raise InputError(f"There is no run to resume in '{out}'.", "Leave --resume out.")
    if half_removed(out):
        return None
    if out.exists() and (not out.is_dir() or any(_foreign(p) for p in out.iterdir())):
        raise RecipeError(
            f"'{out}' exists and is no run of ternq.", "Choose another folder with -o."
        )
    return None


def refuse_input(out: Path, sources: list[str | None]) -> None:
    """Refuse an output that is one of the inputs: no input is ever changed."""
    for source in filter(None, sources):
        path = origin.local_path(source)
        if path is not None and path.resolve() == out.resolve():
            raise RecipeError(f"'{out}' holds the model itself.", "Choose another name with -o.")


def begin(
    out: Path,
    recipe: Recipe,
    student: hf.Loaded,
    identity: dict[str, Any],
    data: list[str],
    licence: str | None,
    asked: dict[str, Any],
) -> None:
    """Write what there is before the first step; ``run.json`` last.

    ``asked`` is the strategy before the machine had its say.
    """
    with writing(out):
        out.mkdir(parents=True, exist_ok=True)
        hf.save_base(student, out / origin.BASE_FOLDER)
    record = {
        FORMAT: FORMAT_VERSION,
        "recipe": recipe.to_json(),
        "modules": list(ternary_layers(student.model)),
        "dtype": dtype_name(student.dtype),
        "data": data,
        "asked_strategy": asked,
        **identity,
        "base_model": {"name": recipe.model, "license": licence},
    }
    if recipe.training.from_scratch:  # nothing of a base model is in it, nor its licence
        del record["base_model"]
    write_json(out / origin.RUN_FILE, record)


def identity(
    recipe: Recipe, teacher: str, held_out: Tensor, data: list[str], device: torch.device
) -> dict[str, Any]:
    """What a run is made from and on, beside its recipe; ``teacher`` is its fingerprint."""
    chip = torch.backends.cpu.get_cpu_capability()
    if device.type == "cuda":
        chip = torch.cuda.get_device_name(device)
    return {
        "data_sha256": _hashes(data, recipe.model),
        "text_sha256": _digest(held_out),
        "teacher_weights": teacher,
        "machine": {
            "ternq": ternq.__version__,
            "torch": torch.__version__,
            "device": f"{device.type} ({chip})",
            "threads": torch.get_num_threads(),
        },
    }


def differences(record: dict[str, Any], recipe: Recipe, identity: dict[str, Any]) -> list[str]:
    """What a run's record says that is not so now; empty if it may go on."""
    found = recipe.differences(Recipe.from_json(record["recipe"]))
    found = ["the base model's weights" if d.startswith("base: ") else d for d in found]
    then, now = record.get("data_sha256", {}), identity["data_sha256"]
    changed = sorted(n for n in then.keys() | now.keys() if then.get(n) != now.get(n))
    found = found or [f"{name} is not the file that it was" for name in changed]
    said = {"text_sha256": "the text is another", "teacher_weights": "the teacher's weights"}
    for key in said if not found else ():
        if record.get(key, identity[key]) != identity[key]:
            found.append(said[key])
    return found


def changes(record: dict[str, Any], identity: dict[str, Any]) -> list[str]:
    """What is another now that changes the last bits of a run, and no more than those."""
    now, then = identity["machine"], record.get("machine", {})
    return [f"{k} {then[k]} then, {now[k]} now" for k in now if k in then and then[k] != now[k]]


def remove(out: Path, *, keep_own_text: bool = False) -> None:
    """Remove what a run wrote, and nothing else; killed on the way, it is `half_removed`."""
    if (out / origin.RUN_FILE).is_file():
        with writing(out):
            (out / origin.RUN_FILE).replace(out / _REMOVED)
    own = (CHECKPOINTS, origin.BASE_FOLDER, LOGS, TEACHER_FOLDER, BLOCKS, START)
    for folder in (out / name for name in own):
        if folder.is_dir():
            shutil.rmtree(folder)
    names = {origin.STUDENT_FILE, origin.REPORT, METRICS}
    names |= set() if keep_own_text else {OWN_TEXT_FILE}
    for path in list(out.iterdir()) if out.is_dir() else []:
        if path.name != _REMOVED and (path.name in names or _leftover(path)):
            path.unlink()
    (out / _REMOVED).unlink(missing_ok=True)
    if out.is_dir() and not any(out.iterdir()):
        out.rmdir()


def half_removed(out: Path) -> bool:
    """Whether the removal of a run was cut off here, and is to be gone on with."""
    return (out / _REMOVED).is_file() and not (out / origin.RUN_FILE).exists()


def _foreign(path: Path) -> bool:
    return path.name not in _BEGUN and not _leftover(path)


def _leftover(path: Path) -> bool:
    """A file that a killed process was writing under a temporary name."""
    written = (origin.RUN_FILE, OWN_TEXT_FILE, origin.REPORT, METRICS, origin.STUDENT_FILE)
    return path.is_file() and path.name.startswith(tuple(f".{name}." for name in written))


def _hashes(data: list[str], model: str) -> dict[str, str]:
    """SHA-256 of every local file that is trained on, by name; of a folder's, by path in it."""
    paths = [Path(name).expanduser() for name, _ in parse_mix(data)]
    paths += [DEMO_FOLDER / "train.jsonl.xz"] if model == DEMO and not data else []
    found: dict[str, str] = {}
    for path in paths:
        for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
            if file.is_file():
                name = file.relative_to(path.parent).as_posix()
                found[str(file) if name in found else name] = sha256(file)
    return found


def _digest(ids: Tensor) -> str:
    return hashlib.sha256(ids.numpy().tobytes()).hexdigest()
