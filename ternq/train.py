"""The training loop: DLT in the layers, OFF and the teacher's logits in the loss.

Plain on purpose. The devices are Accelerate's, the optimizer is AdamW; what is ours is the loss,
the diagnostics of ternary training and a checkpoint that continues to the same bits. Nothing in the
loop draws random numbers: dropout is off, and the text is a stream that is skipped to its place.
"""

import json
import math
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ternq import checkpoint, stop
from ternq.blocks import BlockOutputs
from ternq.errors import DivergenceError, InterruptedByUser, StoppedError
from ternq.hf import load_state, unique_state
from ternq.linear import TernaryLinear, ternary_layers
from ternq.losses import logit_loss, off_per_block
from ternq.modeling_ternq import is_linear
from ternq.progress import Event, Progress
from ternq.recipe import Training

BETAS = (0.9, 0.95)
CHECKPOINTS = "checkpoints"
TIME_LIMIT = "time limit"
METRICS = "metrics.jsonl"
DIAGNOSE_SHARE = 0.05  # of the steps; flips and drift cost a second rounding of every weight


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
        # around the loop leaves the student as it is when it is measured.
        self.accelerator = Accelerator(cpu=device.type == "cpu")
        self.autocast = torch.autocast(device.type, torch.bfloat16, enabled=has_bf16(device))
        without_dropout(self.student)
        if self.settings.gradient_checkpointing:
            self.student.gradient_checkpointing_enable({"use_reentrant": False})
        self.initial = {n: _scales(m) for n, m in ternary_layers(self.student).items()}
        self.optimizer = optimizer(self.student, self.settings)
        self.wrapped, self.optimizer = self.accelerator.prepare(self.student, self.optimizer)

    # -- the loop ------------------------------------------------------------------------------

    def run(self) -> None:
        """Train to the last step; stop early when asked to, with a checkpoint.

        Raises:
            StoppedError: SIGTERM or the time limit; InterruptedByUser: Ctrl-C; each after saving.
            DivergenceError: the loss or a gradient is not finite.
        """
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
            due = now - saved > 60 * self.settings.checkpoint_minutes
            if reason or due or self.step == self.steps:
                self.save()
                saved = now
            if reason and (self.step < self.steps or reason != TIME_LIMIT):
                raise self._stopped(reason)
        stop.not_polled()

    def one_step(self) -> dict[str, float]:
        """One optimizer step on ``batch_size`` blocks: the loss and its terms."""
        batch = torch.stack([next(self.blocks) for _ in range(self.settings.batch_size)])
        diagnose = self._diagnoses()
        before = self._codes() if diagnose else {}
        values = self.accumulate(batch)
        norm = float(self.accelerator.clip_grad_norm_(self.wrapped.parameters(), self._clip()))
        if not (math.isfinite(values["loss"]) and math.isfinite(norm)):
            self._diverged(values["loss"])
        now = rate(self.step, self.steps, self.settings.warmup)
        for group in self.optimizer.param_groups:
            group["lr"] = group["peak_lr"] * now
        values |= {"gradient_norm": norm, "lr": self.settings.lr * now}
        self.optimizer.step()
        self.optimizer.zero_grad()
        return values | (self._diagnostics(before) if diagnose else {})

    def accumulate(self, batch: Tensor) -> dict[str, float]:
        """Gradients of the mean loss over a batch ``[blocks, tokens]``, in micro batches."""
        parts = torch.split(batch, self.settings.micro_batch_size or self.settings.batch_size)
        sums: dict[str, float] = {}
        for part in parts:
            loss, values = self._loss(part.to(self.device))
            self.accelerator.backward(loss * (len(part) / len(batch)))
            for name, value in values.items():
                sums[name] = sums.get(name, 0.0) + value * len(part) / len(batch)
        return sums

    def _loss(self, ids: Tensor) -> tuple[Tensor, dict[str, float]]:
        use_teacher = bool(self.settings.off or self.settings.kl)
        with self.autocast, BlockOutputs(self.student) as student:
            logits = self.wrapped(input_ids=ids, use_cache=False).logits
        with self.autocast, torch.no_grad(), BlockOutputs(self.teacher) as teacher:
            target = self.teacher(input_ids=ids, use_cache=False).logits if use_teacher else None
        loss, kl, ce = logit_loss(
            logits[:, :-1].flatten(0, 1),
            None if target is None else target[:, :-1].flatten(0, 1),
            ids[:, 1:].flatten(),
            kl=self.settings.kl,
            ce=self.settings.ce,
        )
        values = {"kl": float(kl), "ce": float(ce)}
        if self.settings.off:
            distances = off_per_block(student.features, teacher.features)
            loss = loss + self.settings.off * distances.mean()
            values["off"] = float(distances.detach().mean())
            values |= {f"cosine_{i}": 1 - d for i, d in enumerate(distances.tolist())}
        return loss, {"loss": float(loss.detach())} | values

    # -- what is said of it ----------------------------------------------------------------------

    def _diagnoses(self) -> bool:
        every = max(1, round(self.steps * DIAGNOSE_SHARE))
        return self.step % every == 0 or self.step == self.steps - 1

    def _codes(self) -> dict[str, Tensor]:
        return {n: m.codes() for n, m in ternary_layers(self.student).items()}

    def _diagnostics(self, before: dict[str, Tensor]) -> dict[str, float]:
        """Share of codes this step flipped, share of zeros, drift of scales and shifts."""
        after = self._codes()
        count = sum(c.numel() for c in after.values())
        flips = sum(int((after[n] != before[n]).sum()) for n in after)
        zeros = sum(int((c == 0).sum()) for c in after.values())
        drift = [torch.zeros(2, dtype=torch.float64), torch.zeros(2, dtype=torch.float64)]
        for name, layer in ternary_layers(self.student).items():
            for i, (now, start) in enumerate(zip(_scales(layer), self.initial[name], strict=True)):
                scale = self.initial[name][0].abs().sum()
                drift[i] += torch.stack([(now - start).abs().sum(), scale]).cpu().double()
        scale_drift, shift_drift = (float(a / b) if b else 0.0 for a, b in drift)
        return {
            "flip_share": flips / count,
            "zero_share": zeros / count,
            "scale_drift": scale_drift,
            "shift_drift": shift_drift,
        }

    def _record(self, values: dict[str, float]) -> None:
        if len(self.losses) < 2:
            self.losses.append(values["loss"])
        self.losses[-1] = values["loss"]
        line = {"step": self.step, "seconds": round(self.seconds, 3)} | values
        with (self.folder / METRICS).open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        shown = {"loss": values["loss"], "lr": values["lr"]}
        shown |= {k: values[k] for k in ("flip_share",) if k in values}
        self.progress(Event("train", done=self.step, total=self.steps, values=shown))

    def _diverged(self, loss: float) -> None:
        layers = ternary_layers(self.student).items()
        bad = [n for n, m in layers if not _finite(m.weight.grad) or not _finite(m.weight)]
        where = f", first seen in {bad[0]}" if bad else ""
        raise DivergenceError(
            f"Training diverged at step {self.step + 1}: loss {loss}{where}.",
            "Try a lower --lr; the last checkpoint is kept.",
        )

    # -- stopping and going on -------------------------------------------------------------------

    def _stop_reason(self, seconds: float) -> str | None:
        if self.time_limit is not None and seconds >= self.time_limit:
            return TIME_LIMIT
        return stop.requested()

    def _stopped(self, reason: str) -> Exception:
        said = f"Stopped after step {self.step} of {self.steps} ({reason}); a checkpoint is saved."
        hint = "The same command goes on from there."
        return (InterruptedByUser if reason == "SIGINT" else StoppedError)(said, hint)

    def save(self) -> None:
        """Write a checkpoint beside the last one, then drop that one."""
        name = f"step-{self.step:08d}"
        folder = self.folder / CHECKPOINTS
        staged = folder / (name + ".part")
        for left in folder.glob("*.part"):  # by a run that was killed, or had no room, as it wrote
            shutil.rmtree(left)
        staged.mkdir(parents=True)
        checkpoint.save_tensors(unique_state(self.student), staged / "student.safetensors")
        state = self.optimizer.state_dict()["state"]
        tensors = {f"{i}.{k}": v for i, s in state.items() for k, v in s.items()}
        checkpoint.save_tensors(tensors, staged / "optimizer.safetensors")
        record = {"step": self.step, "seconds": self.seconds, "losses": self.losses}
        checkpoint.write_json(staged / "state.json", record)
        if (folder / name).exists():
            shutil.rmtree(folder / name)
        staged.rename(folder / name)
        for old in checkpoints(self.folder):
            if old.name != name:
                shutil.rmtree(old)

    def restore(self) -> bool:
        """Go on from the newest checkpoint, if there is one."""
        found = checkpoints(self.folder)
        if not found:
            return False
        last = found[-1]
        load_state(self.student, checkpoint.load_tensors(last / "student.safetensors"), str(last))
        saved = checkpoint.load_tensors(last / "optimizer.safetensors")
        state = self.optimizer.state_dict()
        state["state"] = {}
        for name, tensor in saved.items():
            index, key = name.split(".", 1)
            state["state"].setdefault(int(index), {})[key] = tensor
        self.optimizer.load_state_dict(state)
        record = checkpoint.read_json(last / "state.json")
        self.step, self.seconds, self.losses = (record[k] for k in ("step", "seconds", "losses"))
        self._drop_later_metrics()
        return True

    def _drop_later_metrics(self) -> None:
        path = self.folder / METRICS
        lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
        kept = []
        for line in lines:
            try:
                if json.loads(line)["step"] <= self.step:
                    kept.append(line + "\n")
            except ValueError:  # a line that a killed run left half-written
                continue
        path.write_text("".join(kept), encoding="utf-8")

    def _clip(self) -> float:
        return self.settings.clip or math.inf


def optimizer(student: nn.Module, settings: Training) -> torch.optim.AdamW:
    """AdamW over the latent weights, over scales and shifts, and over norms and biases.

    Embeddings, output head and linear weights that were skipped stay as the teacher has them.
    """
    scale_lr = settings.lr if settings.scale_lr is None else settings.scale_lr
    groups: dict[str, list[nn.Parameter]] = {"weights": [], "scales": [], "rest": []}
    seen: set[int] = set()
    for module in student.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if id(parameter) in seen:
                continue
            seen.add(id(parameter))
            kind = _kind(module, name)
            parameter.requires_grad_(kind is not None)
            if kind is not None:
                groups[kind].append(parameter)
    decay = {"weights": settings.weight_decay}
    rates = {"weights": settings.lr, "scales": scale_lr, "rest": settings.lr}
    return torch.optim.AdamW(
        [
            {"params": p, "lr": rates[k], "peak_lr": rates[k], "weight_decay": decay.get(k, 0.0)}
            for k, p in groups.items()
            if p
        ],
        betas=BETAS,
    )


def _kind(module: nn.Module, name: str) -> str | None:
    if isinstance(module, TernaryLinear):
        if name == "weight":
            return "weights"
        return "scales" if name.startswith("weight_") else "rest"
    if isinstance(module, nn.Embedding) or (is_linear(module) and name == "weight"):
        return None
    return "rest"


def rate(step: int, steps: int, warmup: float) -> float:
    """Linear warm-up to 1, then linear decay to 0 after the last step."""
    rising = max(1, round(steps * warmup))
    if step < rising:
        return (step + 1) / (rising + 1)
    return max(0.0, (steps - step) / max(1, steps - rising))


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


def checkpoints(folder: Path) -> list[Path]:
    """Complete checkpoints of a run, oldest first."""
    found = (folder / CHECKPOINTS).glob("step-*")
    return sorted(p for p in found if p.suffix != ".part")


def _scales(layer: TernaryLinear) -> list[Tensor]:
    both = [layer.weight_scale, layer.weight_shift]
    return [p.detach().clone() for p in both if p is not None]


def _finite(tensor: Tensor | None) -> bool:
    return tensor is None or bool(torch.isfinite(tensor).all())
