"""``--plan``: everything is validated and said, nothing is done."""

from pathlib import Path
from typing import Any

from ternq import budget, checkpoint, distill
from ternq.progress import Progress, ignore
from ternq.recipe import Recipe
from ternq.train import Trainer
from ternq.weights import stored_dtype, weights_summary


def plan(
    model: str,
    recipe: Recipe,
    *,
    out: Path,
    teacher: str | None = None,
    overwrite: bool = False,
    device: str = "cpu",
    offline: bool = False,
    trust_remote_code: bool = False,
    progress: Progress = ignore,
) -> dict[str, Any]:
    """What `ternarize` would make of ``model``: parameters, bits per weight, memory, disk, time.

    Time comes from one training step measured here; the other figures are counted or estimated.
    """
    checkpoint.check_output(out, overwrite)
    prepared = distill.prepare_run(
        model,
        recipe,
        teacher=teacher,
        device=device,
        offline=offline,
        trust_remote_code=trust_remote_code,
        progress=progress,
        open_text=False,
    )
    student = prepared.student.model
    settings = prepared.recipe.training
    memory = budget.estimate(student, settings, device)
    trainer = Trainer(
        student=student,
        teacher=prepared.teacher and prepared.teacher.model,
        blocks=iter(()),
        settings=settings,
        steps=1,
        folder=out,
        progress=progress,
    )
    rate = budget.probe(trainer)
    steps = budget.planned_steps(settings, rate)
    tokens = steps * settings.batch_size * settings.sequence_length
    trained = sum(p.numel() for p in student.parameters() if p.requires_grad)
    everything = sum(p.numel() for p in student.parameters())
    weights = weights_summary(student, stored_dtype(prepared.student.dtype))
    disk = weights["bytes"] + 2 * 4 * (everything + 2 * trained)  # two checkpoints at once
    disk += 4 * everything if settings.start == "compensated" else 0
    free = checkpoint.free_disk(out)
    fits = memory.fits and disk <= free
    return {
        "model": model,
        "weights": weights,
        "dense_layers": [vars(d) for d in prepared.selection.dense],
        "notes": prepared.notes,
        "recipe": prepared.recipe.to_json(),
        "training": {
            "steps": steps,
            "tokens": tokens,
            "tokens_per_second": rate,
            "seconds": tokens / rate,
        },
        "memory": {"needed": memory.needed, "free": memory.free},
        "disk": {"needed": disk, "free": free},
        "fits": fits,
        "reason": None if fits else _missing(memory, disk, free),
    }


def _missing(memory: budget.Memory, disk: int, free: int) -> str:
    if not memory.fits:
        return f"{(memory.needed - memory.free) / 1e9:.1f} GB of memory are missing."
    return f"{(disk - free) / 1e9:.1f} GB of disk are missing."
