"""The state of a run on disk: student, optimizer, random numbers and place; whole or not there.

A checkpoint is a folder with a manifest (`ternq.publish`). It is written under another name, read
back, compared with what was meant, and then named; only after that are older ones dropped, down to
a number. `Writer` does this on a thread of its own, from copies, while training goes on.
"""

import contextlib
import copy
import shutil
from collections.abc import Mapping
from pathlib import Path
from threading import Thread
from typing import Any

import torch
from torch import Tensor

import ternq
from ternq import checkpoint, metrics, processes
from ternq.errors import InputError, RecipeError, ResourceError, VerificationError
from ternq.files import read_json, sync, writing
from ternq.memory import free_memory
from ternq.optimize import load_state_tensors, state_tensors
from ternq.progress import Event, Progress, ignore
from ternq.publish import CHECKPOINT as STATE
from ternq.publish import verify_files, write_manifest
from ternq.states import load_state, unique_state

CHECKPOINTS = "checkpoints"
FORMAT = 2  # 1 had no hashes and no random numbers
COPY_SHARE = 0.5  # of the free memory may go to copies; training needs some of it beside

Tensors = dict[str, dict[str, Tensor]]
"""Tensors by the file that holds them."""


def checkpoints(run: Path) -> list[Path]:
    """Complete checkpoints of a run, oldest first."""
    found = (run / CHECKPOINTS).glob("step-*")
    return sorted(p for p in found if p.suffix != ".part")


class Writer:
    """Writes a run's checkpoints, one at a time, beside the loop; its errors reach the loop.

    As a context it has the last checkpoint finished before it ends, unless the program is told to
    stop at once.
    """

    def __init__(self, run: Path, keep: int, progress: Progress = ignore) -> None:
        self.run, self.keep, self.progress = run, keep, progress
        self._thread: Thread | None = None
        self._error: BaseException | None = None
        self._said = False

    def __enter__(self) -> "Writer":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            self.wait()
        elif issubclass(kind, Exception) and self._thread is not None:
            self._thread.join()  # the error on its way is the one to tell

    def save(
        self,
        step: int,
        student: Any,
        optimizer: torch.optim.Optimizer,
        record: Mapping[str, Any],
        *,
        aside: bool = True,
    ) -> None:
        """Save a checkpoint: ``aside`` from copies while training goes on, else before returning.

        Raises `ResourceError` if this one, or the one before it, cannot be written.
        """
        self.wait()
        tensors, values = _state_of(student, optimizer)
        if not processes.is_main():
            return
        record = {"step": step, "values": values, **copy.deepcopy(dict(record))}
        copies = _copied(tensors) if aside else None
        if copies is not None:
            self._thread = Thread(target=self._write, args=(step, copies, record), daemon=True)
            self._thread.start()
            return
        if aside and not self._said:
            self._said = True
            said = "Memory has no room for copies: training waits while a checkpoint is written"
            self.progress(Event("train", said))
        write(self.run, step, tensors, record, self.keep)

    def busy(self) -> bool:
        """Whether a checkpoint is being written. Raises the error of one that failed."""
        if self._thread is not None and self._thread.is_alive():
            return True
        self.wait()
        return False

    def wait(self) -> None:
        """Until nothing is being written. Raises the error of a checkpoint that failed."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        error, self._error = self._error, None
        if error is not None:
            raise error

    def _write(self, step: int, tensors: Tensors, record: dict[str, Any]) -> None:
        try:
            write(self.run, step, tensors, record, self.keep)
        except BaseException as error:  # to be raised where somebody hears it
            self._error = error


def write(run: Path, step: int, tensors: Tensors, record: dict[str, Any], keep: int) -> None:
    """Write, prove and name one checkpoint, then drop all but the ``keep`` newest.

    The newest good one is kept beside them, for as long as those after it are not.
    Those of later steps are dropped too: they are of a past that was gone back from.

    Raises:
        ResourceError: it cannot be written, or does not read back as it was; the others stay.
    """
    folder = run / CHECKPOINTS
    final = folder / f"step-{step:08d}"
    staged = folder / (final.name + ".part")
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        for left in folder.glob("*.part"):  # by a run that was killed
            shutil.rmtree(left)
        try:
            staged.mkdir()
            for name, part in tensors.items():
                checkpoint.save_tensors(part, staged / name)
                _compare(part, staged / name)
            about = {"checkpoint_format": FORMAT, "version": ternq.__version__, **record}
            write_manifest(staged, about, STATE)
        except Exception:
            # Raised on whatever it is; half a checkpoint would only take room from a whole one.
            shutil.rmtree(staged, ignore_errors=True)
            raise
        sync(run / metrics.METRICS)
        if final.exists():
            _drop(final)
        staged.rename(final)
        sync(folder)
        before = [path for path in checkpoints(run) if path.name <= final.name]
        best = [path for path in before if _is_good(path)]
        for old in set(checkpoints(run)) - {*before[-keep:], *best[-1:]}:
            _drop(old)


def _is_good(path: Path) -> bool:
    """Whether its record says that the loss was not above its start (`ternq.watch`)."""
    with contextlib.suppress(InputError):
        return bool(read_json(path / STATE).get("good", True))
    return False


def restore(
    run: Path,
    student: Any,
    optimizer: torch.optim.Optimizer,
    progress: Progress = ignore,
    *,
    good: bool = False,
) -> dict[str, Any] | None:
    """Put the newest checkpoint that is whole back and return its record; None if there is none.

    ``good``: the newest of those whose record says so. Metrics of later steps are dropped.

    Raises:
        InputError: every checkpoint is damaged. RecipeError: one is of another format.
    """
    last, record = _newest(run, progress, good)
    if last is not None:
        load_state(student, checkpoint.load_tensors(last / "student.safetensors"), str(last))
        saved: dict[str, Any] = checkpoint.load_tensors(last / "optimizer.safetensors")
        load_state_tensors(optimizer, saved | record["values"])
        _set_random(checkpoint.load_tensors(last / "random.safetensors"))
    if processes.is_main():
        metrics.drop_later(run, record.get("step", 0))
    return record or None


def drop_all(run: Path) -> None:
    """Remove the checkpoints of a run that needs none any more."""
    shutil.rmtree(run / CHECKPOINTS, ignore_errors=True)


def _newest(run: Path, progress: Progress, good: bool) -> tuple[Path | None, dict[str, Any]]:
    """The newest (good) checkpoint that is whole, and its record; damaged ones are said."""
    said = ""
    for path in reversed([p for p in checkpoints(run) if not good or _is_good(p)]):
        try:
            return path, _verified(path)
        except (InputError, VerificationError) as error:
            said = f"{path.name} is damaged ({error.message.rstrip('.')})"
            progress(Event("train", said, level="warning"))
    if said:
        raise InputError(
            f"No checkpoint in {run / CHECKPOINTS} is whole: {said}.",
            "--overwrite begins the run anew.",
        )
    return None, {}


def _verified(path: Path) -> dict[str, Any]:
    """The record of a checkpoint whose files are all as they were written."""
    found = read_json(path / STATE)
    if found.get("checkpoint_format", 1) != FORMAT:
        raise RecipeError(
            f"{path} was written by another version of ternq (checkpoint format "
            f"{found.get('checkpoint_format', 1)}; this one goes on from format {FORMAT}).",
            "Go on with that version, or begin anew with --overwrite.",
        )
    return verify_files(path, STATE)


def _state_of(
    student: Any, optimizer: torch.optim.Optimizer
) -> tuple[Tensors, dict[str, float | int | None]]:
    """The tensors that a step leaves, as they are in use; and the optimizer's plain numbers."""
    state = state_tensors(optimizer)
    tensors = {name: v for name, v in state.items() if isinstance(v, Tensor)}
    files = {
        "student.safetensors": processes.gathered(unique_state(student)),
        "optimizer.safetensors": processes.gathered(tensors),
        "random.safetensors": _random(next(student.parameters()).device),
    }
    return files, {name: v for name, v in state.items() if name not in tensors}


def _copied(tensors: Tensors) -> Tensors | None:
    """Copies in memory that training does not touch; None where there is no room for them."""
    needed = sum(t.nbytes for part in tensors.values() for t in part.values())
    if needed > COPY_SHARE * free_memory(torch.device("cpu")):
        return None
    return {
        file: {name: t.detach().to("cpu", copy=True) for name, t in part.items()}
        for file, part in tensors.items()
    }


def _compare(tensors: Mapping[str, Tensor], path: Path) -> None:
    """`ResourceError` if a file does not read back as what was written, to the bit."""
    folder = checkpoint.TensorFolder(path.parent, path.name)
    for name, meant in tensors.items():
        if not torch.equal(_bytes(folder[name]), _bytes(meant)):
            raise ResourceError(
                f"{path} does not read back as it was written.", "The disk may be failing."
            )


def _bytes(tensor: Tensor) -> Tensor:
    """The bytes of a tensor, in which a NaN is equal to itself."""
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)


def _random(device: torch.device) -> dict[str, Tensor]:
    """Where torch's generators are, for what draws from them."""
    states = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state()
    return states


def _set_random(states: Mapping[str, Tensor]) -> None:
    torch.set_rng_state(states["cpu"])
    if "cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"])


def _drop(path: Path) -> None:
    """Remove a checkpoint; killed on the way, none of it lies under its name."""
    doomed = path.with_name(path.name + ".old.part")
    path.rename(doomed)
    shutil.rmtree(doomed)
