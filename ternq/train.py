"""The training loop: steps, records, stopping and going on.

Plain on purpose. The devices are Accelerate's, the optimizer is AdamW (`ternq.optimize`); what is
ours is the loss (`ternq.objective`), the diagnostics of ternary training (`ternq.watch`) and a
checkpoint that continues to the same bits (`ternq.snapshots`). Nothing in the loop draws random
numbers: dropout is off, and the text is a stream that is skipped to its place.
"""

import json
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ternq import snapshots, stop
from ternq.errors import InterruptedByUser, StoppedError, TernqError
from ternq.files import writing
from ternq.objective import Objective
from ternq.optimize import optimizer, set_rate
from ternq.progress import Event, Progress
from ternq.recipe import Training
from ternq.watch import Watch

TIME_LIMIT = "time limit"


@dataclass
class Trainer:
    """A student on its way from its start to the last step, beside its teacher."""

    student: Any
    teacher: Any
    blocks: Iterator[Tensor]
    settings: Training
    steps: int
    folder: Path
    progress: Progress
    time_limit: float | None = None  # seconds
    step: int = 0
    seconds: float = 0.0
    losses: list[float] = field(default_factory=list)  # first and last

    def __post_init__(self) -> None:
        from accelerate import Accelerator

        self.device = device = next(self.student.parameters()).device
        if device.type == "cuda":
            torch.cuda.set_device(device)  # where Accelerate then works
        # Accelerate's own mixed precision would replace the student's forward for good; a context
        # around the loss leaves the student as it is when it is measured.
        self.accelerator = Accelerator(cpu=device.type == "cpu")
        without_dropout(self.student)
        if self.settings.gradient_checkpointing:
            self.student.gradient_checkpointing_enable({"use_reentrant": False})
        self.watch = Watch(self.student)
        self.writer = snapshots.Writer(self.folder, self.settings.keep_checkpoints, self.progress)
        self.optimizer = optimizer(self.student, self.settings)
        autocast = torch.autocast(device.type, torch.bfloat16, enabled=has_bf16(device))
        self.objective = Objective(self.student, self.teacher, self.settings, autocast)
        self.wrapped, self.optimizer = self.accelerator.prepare(self.objective, self.optimizer)

    # -- the loop ------------------------------------------------------------------------------

    def run(self) -> None:
        """Train to the last step; stop early when asked to, with a checkpoint.

        Raises:
            StoppedError: SIGTERM or the time limit; InterruptedByUser: Ctrl-C; each after saving.
            DivergenceError: the loss or a gradient is not finite.
            InputError: the text failed; after saving. ResourceError: no checkpoint can be written.
        """
        with self.writer:
            self._run()
        stop.not_polled()

    def _run(self) -> None:
        if self.step < self.steps:
            for _ in range(self.step * self.settings.batch_size):
                next(self.blocks)
        began = saved = time.monotonic()
        before = self.seconds
        while self.step < self.steps:
            values = self.one_step()
            self.step += 1
            now = time.monotonic()
            self.seconds = before + now - began
            self._record(values)
            reason = self._stop_reason(now - began)
            last = bool(reason) or self.step == self.steps
            due = now - saved > 60 * self.settings.checkpoint_minutes
            if not self.writer.busy() and due or last:
                self.save(aside=not last)
                saved = now
            if reason and (self.step < self.steps or reason != TIME_LIMIT):
                raise self._stopped(reason)

    def one_step(self) -> dict[str, float]:
        """One optimizer step on ``batch_size`` blocks: the loss and its terms."""
        batch = self.draw()
        diagnose = self.watch.due(self.step, self.steps)
        before = self.watch.codes() if diagnose else {}
        values = self.accumulate(batch)
        norm = float(self.accelerator.clip_grad_norm_(self.wrapped.parameters(), self._clip()))
        self.watch.check_finite(self.step, values["loss"], norm)
        lr = set_rate(self.optimizer, self.step, self.steps, self.settings)
        self.optimizer.step()
        self.optimizer.zero_grad()
        values |= {"gradient_norm": norm, "lr": lr}
        return values | (self.watch.diagnostics(before) if diagnose else {})

    def draw(self) -> Tensor:
        """The next batch ``[blocks, tokens]``; if the text fails, a checkpoint comes first."""
        try:
            return torch.stack([next(self.blocks) for _ in range(self.settings.batch_size)])
        except TernqError as error:
            self.save()
            saved = "A checkpoint is saved: the same command goes on from there."
            error.hint = f"{error.hint} {saved}" if error.hint else saved
            raise

    def accumulate(self, batch: Tensor) -> dict[str, float]:
        """Gradients of the mean loss over a batch ``[blocks, tokens]``, in micro batches."""
        parts = torch.split(batch, self.settings.micro_batch_size or self.settings.batch_size)
        sums: dict[str, float] = {}
        for part in parts:
            loss, terms = self.wrapped(part.to(self.device))
            self.accelerator.backward(loss * (len(part) / len(batch)))
            for name, value in terms.items():
                sums[name] = sums.get(name, 0.0) + float(value) * len(part) / len(batch)
        return sums

    def _clip(self) -> float:
        return self.settings.clip or math.inf

    # -- what is said of it ----------------------------------------------------------------------

    def _record(self, values: dict[str, float]) -> None:
        if len(self.losses) < 2:
            self.losses.append(values["loss"])
        self.losses[-1] = values["loss"]
        line = {"step": self.step, "seconds": round(self.seconds, 3)} | values
        path = self.folder / snapshots.METRICS
        with writing(path), path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        shown = {"loss": values["loss"], "lr": values["lr"]}
        shown |= {k: values[k] for k in ("flip_share",) if k in values}
        self.progress(Event("train", done=self.step, total=self.steps, values=shown))

    # -- stopping and going on -------------------------------------------------------------------

    def _stop_reason(self, seconds: float) -> str | None:
        if self.time_limit is not None and seconds >= self.time_limit:
            return TIME_LIMIT
        return stop.requested()

    def _stopped(self, reason: str) -> Exception:
        said = f"Stopped after step {self.step} of {self.steps} ({reason}); a checkpoint is saved."
        hint = "The same command goes on from there."
        return (InterruptedByUser if reason == "SIGINT" else StoppedError)(said, hint)

    def save(self, *, aside: bool = False) -> None:
        """Write a checkpoint of this step: before returning, or ``aside``."""
        record = {"seconds": self.seconds, "losses": self.losses}
        self.writer.save(self.step, self.student, self.optimizer, record, aside=aside)

    def restore(self) -> bool:
        """Go on from the newest checkpoint, if there is one."""
        record = snapshots.restore(self.folder, self.student, self.optimizer, self.progress)
        if record is None:
            return False
        self.step, self.seconds, self.losses = (record[k] for k in ("step", "seconds", "losses"))
        return True


def without_dropout(model: nn.Module) -> None:
    """Training mode (checkpointing needs it) with every dropout at 0: the loop draws no numbers."""
    model.train()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name in ("attention_dropout", "dropout", "activation_dropout"):
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.0)


def has_bf16(device: torch.device) -> bool:
    """Whether the device has bf16 matrix products of its own, and does not emulate them."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    if device.type == "cpu":
        return bool(torch.cpu._is_avx512_bf16_supported())
    return False
