"""The training loop: steps, records, stopping and going on.

Plain on purpose. The devices are Accelerate's, the optimizer is AdamW (`ternq.optimize`); what is
ours is the loss (`ternq.objective`), the diagnostics of ternary training (`ternq.watch`) and a
checkpoint that continues to the same bits (`ternq.snapshots`). Nothing in the loop draws random
numbers but what follows from seed and step (`ternq.optimize.take_step`): dropout is off, and the
text is a stream that is skipped to its place.
"""

import copy
import math
import time
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ternq import metrics, processes, snapshots, stop, trackers
from ternq.errors import DivergenceError, TernqError
from ternq.frozen import arrange
from ternq.linear import decoder_blocks, rounded_once
from ternq.objective import Objective
from ternq.optimize import optimizer, set_rate, take_step
from ternq.precision import products
from ternq.progress import Event, Progress
from ternq.recipe import Training
from ternq.teacher import CachedTeacher
from ternq.watch import Watch

_KEPT = ("seconds", "losses", "read", "retreats", "said")  # in a checkpoint, beside the step


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
    log_with: tuple[str, ...] = ()  # names of `ternq.trackers`
    alone: bool = False  # no other process takes part, whatever started this one
    seed: int = 0
    step: int = 0
    seconds: float = 0.0
    losses: list[float] = field(default_factory=list)  # first and last
    read: int = 0  # blocks of the text
    retreats: int = 0  # made after a divergence
    said: list[str] = field(default_factory=list)  # of them

    def __post_init__(self) -> None:
        self.device = device = next(self.student.parameters()).device
        if device.type == "cuda":
            torch.cuda.set_device(device)  # where Accelerate then works
        arrange(self.student, self.settings, self.seed, self.teacher)
        without_dropout(self.student)
        if self.settings.gradient_checkpointing:
            self.student.gradient_checkpointing_enable({"use_reentrant": False})
        autocast = products(self.settings, device)
        self.objective = Objective(self.student, self.teacher, self.settings, autocast)
        # Shards come first: all that follows refers to the parameters that there are then.
        self.sharded = not self.alone and processes.shard(
            self.objective, decoder_blocks(self.student)[1]
        )
        self.watch = Watch(self.student)
        self.writer = snapshots.Writer(self.folder, self.settings.keep_checkpoints, self.progress)
        self.optimizer = optimizer(self.student, self.settings)
        self.wrapped: Any = self.objective
        if not self.alone:
            processes.refuse_uneven(self.settings.batch_size)
            processes.join(device.type)
            self.accelerator = self._accelerator()
            if not self.sharded:
                self.wrapped, self.optimizer = self.accelerator.prepare(
                    self.objective, self.optimizer, device_placement=[True, False]
                )
        if self.objective.whole:
            said = f"Logits are held whole, which takes more memory: {self.objective.whole}."
            self.progress(Event("plan", said))

    def learn_from(self, teacher: CachedTeacher) -> None:
        """Train on the text of a cached teacher, beside it."""
        self.teacher, self.blocks = teacher, teacher.cache.blocks()
        self.objective.learn_from(teacher)

    def _accelerator(self) -> Any:
        """What is computed is the recipe's to say: settings of `accelerate config` are not asked.

        Its mixed precision would replace a forward for good; a context around the loss leaves the
        student as it is when it is measured.
        """
        from accelerate import Accelerator
        from accelerate.utils import DistributedDataParallelKwargs, GradientAccumulationPlugin

        features_only = self.settings.kl == self.settings.ce == 0  # final norm and head: no part
        return Accelerator(
            cpu=self.device.type == "cpu",
            mixed_precision="no",
            gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=1),
            kwargs_handlers=[
                DistributedDataParallelKwargs(
                    broadcast_buffers=False,
                    find_unused_parameters=features_only,
                    gradient_as_bucket_view=True,
                )
            ],
            log_with=list(self.log_with) or None,
            project_dir=self.folder / trackers.LOGS,
        )

    # -- the loop ------------------------------------------------------------------------------

    def run(self) -> None:
        """Train to the last step; stop early when asked to, with a checkpoint.

        Raises:
            StoppedError: SIGTERM or the time limit; InterruptedByUser: Ctrl-C; each after saving.
            DivergenceError: see `ternq.watch`; no retreat is left.
            InputError: the text failed; after saving. ResourceError: no checkpoint can be written.
        """
        with self.writer:
            self._run()
        stop.not_polled()

    def _run(self) -> None:
        if self.step < self.steps:
            self._find_place()
        trackers.begin(self.accelerator, self.folder, asdict(self.settings))
        try:
            self._train()
        finally:
            trackers.end(self.accelerator)

    def _find_place(self) -> None:
        """Skip the blocks that were read before: the text is a stream, read from its beginning."""
        for done in range(self.read):
            next(self.blocks)
            event = Event("finding the place in the text", done=done + 1, total=self.read)
            self.progress(event)

    def _train(self) -> None:
        began = saved = time.monotonic()
        before = self.seconds
        if self.settings.retreats and not self.step:
            self.save()  # the start, to go back to
        while self.step < self.steps:
            try:
                values = self.one_step()
                self.step += 1
                now = time.monotonic()
                self.seconds = before + now - began
                self._record(values)
                self.watch.check(self.step, self.steps, values["loss"])
            except DivergenceError as error:
                self._retreat(error)
                continue
            reason = self._stop_reason(now - began)
            late = now - saved > 60 * self.settings.checkpoint_minutes
            due = late and processes.is_main() and not self.writer.busy()  # whose writer it is
            reason, due = processes.agreed(reason, due)
            last = bool(reason) or self.step == self.steps
            if due or last:
                self.save(aside=not last)
                saved = now
            if reason and (self.step < self.steps or reason != stop.TIME_LIMIT):
                raise self._stopped(reason)

    def _retreat(self, error: DivergenceError) -> None:
        """Go back to the last good checkpoint with half the rate, reading on in the text.

        Raises ``error`` where no retreat is left.
        """
        if self.retreats == self.settings.retreats:
            raise error
        retreats, read = self.retreats + 1, self.read
        self.writer.wait()
        processes.gather(None)  # others than the main one have nothing to wait for, and read it too
        if not self.restore(good=True):
            raise error
        processes.gather(None)
        self.optimizer.zero_grad()
        self.retreats, self.read = retreats, read
        said = f"{error.message} Back to step {self.step}, at 1/{2**retreats} of the rate"
        self.said.append(said)
        self.progress(Event("train", said, level="warning"))
        self.save()

    def one_step(self) -> dict[str, float]:
        """One optimizer step on ``batch_size`` blocks: the loss and its terms."""
        batch = self.draw()
        diagnose = self.watch.due(self.step, self.steps)
        before = self.watch.codes() if diagnose else {}
        values = self.accumulate(batch if self.alone else processes.share(batch))
        values = values if self.alone else processes.mean(values)
        norm = self.clip()
        self.watch.check_finite(self.step + 1, values["loss"], norm)
        slower = 0.5**self.retreats
        lr = set_rate(self.optimizer, self.step, self.steps, self.settings, slower)
        take_step(self.optimizer, self.settings, seed=self.seed, step=self.step, norm=norm)
        self.optimizer.zero_grad()
        values |= {"gradient_norm": norm, "lr": lr}
        return values | (self.watch.diagnostics(before) if diagnose else {})

    def draw(self) -> Tensor:
        """The next batch ``[blocks, tokens]``; if the text fails, a checkpoint comes first."""
        try:
            found = torch.stack([next(self.blocks) for _ in range(self.settings.batch_size)])
        except TernqError as error:
            self.save()
            saved = "A checkpoint is saved: the same command goes on from there."
            error.hint = f"{error.hint} {saved}" if error.hint else saved
            raise
        self.read += len(found)
        return found

    def accumulate(self, batch: Tensor) -> dict[str, float]:
        """Gradients of the mean loss over a batch ``[blocks, tokens]``, in micro batches."""
        parts = torch.split(batch, self.settings.micro_batch_size or self.settings.batch_size)
        # Several processes add up gradients as they are made; recomputing is asked for to save
        # memory, which rounded weights that are kept would take.
        single = self.alone or processes.count() == 1
        once = single and len(parts) > 1 and not self.settings.gradient_checkpointing
        sums: dict[str, float] = {}
        with rounded_once(self.student) if once else nullcontext():
            for part in parts:
                # of DDP: processes add their gradients up once a step
                self.wrapped.require_backward_grad_sync = part is parts[-1]
                loss, terms = self.wrapped(part.to(self.device))
                (loss * (len(part) / len(batch))).backward()
                values = torch.stack([t.float() for t in terms.values()]).tolist()  # one transfer
                for name, value in zip(terms, values, strict=True):
                    sums[name] = sums.get(name, 0.0) + value * len(part) / len(batch)
        return sums

    def clip(self) -> float:
        """Clip the gradient; returns the norm that it had."""
        largest = self.settings.clip or math.inf
        norm = nn.utils.clip_grad_norm_(self.wrapped.parameters(), largest)
        return float(processes.whole(norm))

    # -- what is said of it ----------------------------------------------------------------------

    def _record(self, values: dict[str, float]) -> None:
        if len(self.losses) < 2:
            self.losses.append(values["loss"])
        self.losses[-1] = values["loss"]
        if not processes.is_main():
            return
        line = {"step": self.step, "seconds": round(self.seconds, 3)} | values
        metrics.append(self.folder, line)
        self.accelerator.log(values, step=self.step)
        shown = {"loss": values["loss"], "lr": values["lr"]}
        shown |= {k: values[k] for k in ("flip_share",) if k in values}
        self.progress(Event("train", done=self.step, total=self.steps, values=shown))

    # -- stopping and going on -------------------------------------------------------------------

    def _stop_reason(self, seconds: float) -> str | None:
        if self.time_limit is not None and seconds >= self.time_limit:
            return stop.TIME_LIMIT
        return stop.requested()

    def _stopped(self, reason: str) -> Exception:
        said = f"Stopped after step {self.step} of {self.steps} ({reason}); a checkpoint is saved."
        return stop.ended(reason, said, "The same command goes on from there.")

    def save(self, *, aside: bool = False) -> None:
        """Write a checkpoint of this step: before returning, or ``aside``."""
        record = {name: getattr(self, name) for name in _KEPT} | self.watch.state()
        self.writer.save(self.step, self.student, self.optimizer, record, aside=aside)

    def restore(self, *, good: bool = False) -> bool:
        """Go on from the newest checkpoint, if there is one; ``good``: whose loss was not lost."""
        record = snapshots.restore(
            self.folder, self.student, self.optimizer, self.progress, good=good
        )
        if record is None:
            return False
        self.step = record["step"]
        for name in _KEPT:
            setattr(self, name, record[name])
        self.watch.go_on(record)
        return True


def without_dropout(model: Any) -> None:
    """Training mode (checkpointing needs it) with every dropout at 0: the loop draws no numbers.

    A layer may read its share from the configuration in every pass: it gets one of its own, since
    the model's is stored with it.
    """
    model.train()
    dry = copy.copy(model.config)
    for name in _dropouts(dry):
        setattr(dry, name, 0.0)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name in _dropouts(module):
            setattr(module, name, 0.0)
        if vars(module).get("config") is model.config and not hasattr(module, "save_pretrained"):
            module.config = dry


def _dropouts(thing: Any) -> list[str]:
    named = [name for name, value in vars(thing).items() if isinstance(value, float)]
    return [name for name in named if "drop" in name]
