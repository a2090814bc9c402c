"""The state of a run on disk: student, optimizer and place, whole or not there at all."""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from ternq import checkpoint, processes
from ternq.hf import load_state, unique_state
from ternq.optimize import load_state_tensors, state_tensors

CHECKPOINTS = "checkpoints"
METRICS = "metrics.jsonl"


def checkpoints(run: Path) -> list[Path]:
    """Complete checkpoints of a run, oldest first."""
    found = (run / CHECKPOINTS).glob("step-*")
    return sorted(p for p in found if p.suffix != ".part")


def save(
    run: Path, step: int, student: Any, optimizer: torch.optim.Optimizer, record: Mapping[str, Any]
) -> None:
    """Write a checkpoint beside the last one, then drop that one."""
    weights = processes.gathered(unique_state(student))
    tensors = processes.gathered(state_tensors(optimizer))
    if not processes.is_main():
        return
    name = f"step-{step:08d}"
    folder = run / CHECKPOINTS
    staged = folder / (name + ".part")
    for left in folder.glob("*.part"):  # by a run that was killed, or had no room, as it wrote
        shutil.rmtree(left)
    staged.mkdir(parents=True)
    checkpoint.save_tensors(weights, staged / "student.safetensors")
    checkpoint.save_tensors(tensors, staged / "optimizer.safetensors")
    checkpoint.write_json(staged / "state.json", {"step": step, **record})
    if (folder / name).exists():
        shutil.rmtree(folder / name)
    staged.rename(folder / name)
    for old in checkpoints(run):
        if old.name != name:
            shutil.rmtree(old)


def restore(run: Path, student: Any, optimizer: torch.optim.Optimizer) -> dict[str, Any] | None:
    """Put the newest checkpoint back and return its record; None if there is none.

    Lines of the metrics that a killed run wrote after it are dropped.
    """
    found = checkpoints(run)
    if not found:
        return None
    last = found[-1]
    load_state(student, checkpoint.load_tensors(last / "student.safetensors"), str(last))
    load_state_tensors(optimizer, checkpoint.load_tensors(last / "optimizer.safetensors"))
    record = checkpoint.read_json(last / "state.json")
    if processes.is_main():
        _drop_later(run / METRICS, record["step"])
    return record


def _drop_later(path: Path, step: int) -> None:
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    kept = []
    for line in lines:
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line + "\n")
        except ValueError:  # a line that a killed run left half-written
            continue
    path.write_text("".join(kept), encoding="utf-8")
