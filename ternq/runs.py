"""The folder of a run: opened, found again, compared, removed.

``run.json`` says what is made from what; ``base/`` holds configuration and tokenizer,
``checkpoints/`` and ``metrics.jsonl`` are the loop's, ``self.json`` is text that the teacher wrote,
``start.safetensors`` is a start that took calibration.
Only what a run writes is ever removed, and only where ``run.json`` is ours.
"""

import hashlib
import shutil
from pathlib import Path
from typing import Any

from torch import Tensor

from ternq import checkpoint, hf
from ternq.data import parse_mix
from ternq.errors import InputError, RecipeError
from ternq.files import sha256
from ternq.linear import ternary_layers
from ternq.recipe import DEMO, DEMO_FOLDER, Recipe
from ternq.snapshots import CHECKPOINTS, METRICS

REPORT = hf.REPORT
OWN_TEXT_FILE = "self.json"
START_FILE = "start.safetensors"  # what a compensated start made, for the drift of a resumed run
FORMAT = "ternq_run"
_BEGUN = {OWN_TEXT_FILE, hf.BASE_FOLDER}  # all there is if a start was cut off


def existing(out: Path, resume: bool | None, overwrite: bool) -> dict[str, Any] | None:
    """The record of the run in ``out``, or None if a new one may begin there.

    Raises:
        RecipeError: something else is there, or a run that must not be gone on with.
        InputError: there is none, and there must be.
    """
    if (out / hf.RUN_FILE).is_file():
        if FORMAT not in checkpoint.read_json(out / hf.RUN_FILE):
            raise RecipeError(
                f"'{out}' holds a {hf.RUN_FILE} that is not ternq's.", "Choose another -o."
            )
        if resume is False and not overwrite:
            raise RecipeError(f"'{out}' holds a run.", "Go on with it, or pass --overwrite.")
        return hf.read_run(out)
    if resume:
        raise InputError(f"There is no run to resume in '{out}'.", "Leave --resume out.")
    if out.exists() and (not out.is_dir() or any(_foreign(p) for p in out.iterdir())):
        raise RecipeError(
            f"'{out}' exists and is no run of ternq.", "Choose another folder with -o."
        )
    return None


def refuse_input(out: Path, sources: list[str | None]) -> None:
    """Refuse an output that is one of the inputs: no input is ever changed."""
    for source in filter(None, sources):
        path = hf.local_path(source)
        if path is not None and path.resolve() == out.resolve():
            raise RecipeError(f"'{out}' holds the model itself.", "Choose another name with -o.")


def begin(
    out: Path,
    recipe: Recipe,
    student: hf.Loaded,
    held_out: Tensor,
    data: list[str],
    licence: str | None,
) -> None:
    """Write what there is before the first step; ``run.json`` last."""
    with checkpoint.writing(out):
        out.mkdir(parents=True, exist_ok=True)
        hf.save_base(student, out / hf.BASE_FOLDER)
    record = {
        FORMAT: 1,
        "recipe": recipe.to_json(),
        "modules": list(ternary_layers(student.model)),
        "dtype": str(student.dtype).removeprefix("torch."),
        "data": data,
        "data_sha256": _hashes(data, recipe.model),
        "text_sha256": _digest(held_out),
        "base_model": {"name": recipe.model, "license": licence},
    }
    if recipe.training.from_scratch:  # nothing of a base model is in it, nor its licence
        del record["base_model"]
    checkpoint.write_json(out / hf.RUN_FILE, record)


def differences(record: dict[str, Any], recipe: Recipe, held_out: Tensor) -> list[str]:
    """What a run's record says that is not so now; empty if it may go on."""
    found = recipe.differences(Recipe.from_json(record["recipe"]))
    if not found and record.get("text_sha256") != _digest(held_out):
        found = ["the text is another"]
    return found


def remove(out: Path, *, keep_own_text: bool = False) -> None:
    """Remove what a run wrote, and nothing else."""
    for folder in (out / CHECKPOINTS, out / hf.BASE_FOLDER):
        if folder.is_dir():
            shutil.rmtree(folder)
    names = {hf.RUN_FILE, hf.STUDENT_FILE, REPORT, METRICS, START_FILE}
    names |= set() if keep_own_text else {OWN_TEXT_FILE}
    for path in list(out.iterdir()) if out.is_dir() else []:
        if path.name in names or _leftover(path):
            path.unlink()
    if out.is_dir() and not any(out.iterdir()):
        out.rmdir()


def _foreign(path: Path) -> bool:
    return path.name not in _BEGUN and not _leftover(path)


def _leftover(path: Path) -> bool:
    """A file that a killed process was writing under a temporary name."""
    return path.is_file() and path.name.startswith((f".{hf.RUN_FILE}.", f".{OWN_TEXT_FILE}."))


def _hashes(data: list[str], model: str) -> dict[str, str]:
    """SHA-256 of every local file that is trained on, by name."""
    names = [name for name, _ in parse_mix(data)]
    paths = [Path(name).expanduser() for name in names]
    paths += [DEMO_FOLDER / "train.jsonl.xz"] if model == DEMO and not data else []
    files = [f for p in paths for f in (sorted(p.rglob("*")) if p.is_dir() else [p])]
    return {file.name: sha256(file) for file in files if file.is_file()}


def _digest(ids: Tensor) -> str:
    return hashlib.sha256(ids.numpy().tobytes()).hexdigest()
