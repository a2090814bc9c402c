"""What is watched while a student trains: its codes and scales, and whether it still learns.

Three things end a training with `DivergenceError`: a loss or gradient that is not finite, a loss
that stays above its start, and a layer whose codes have become one and the same. The limits are
ours, and wide: a run that trips them is lost, not slow.
"""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from operator import itemgetter
from typing import Any

import torch
from torch import Tensor, nn

from ternq import packing, processes
from ternq.errors import DivergenceError
from ternq.linear import TernaryLinear, ternary_layers

DIAGNOSE_SHARE = 0.05  # of a training between them; each costs a second rounding of every weight
START_STEPS = 10  # their mean loss is where the training starts
WORSE = 1.05  # times the start: a loss beyond it is above the start, not merely noisy
LONG_SHARE, LONG_STEPS = 0.1, 50  # of the steps, and at least: this long above is lost
ONE_CODE = 0.995  # share of a layer's commonest code from which on it is one code


@dataclass
class Course:
    """How the loss went so far: its mean over the first steps, and how long it has been above."""

    start: float = 0.0
    counted: int = 0
    above: int = 0

    def add(self, loss: float) -> None:
        """Count a step's loss."""
        if self.counted < START_STEPS:
            self.counted += 1
            self.start += (loss - self.start) / self.counted
        self.above = self.above + 1 if loss > WORSE * self.start else 0


class Watch:
    """Diagnostics of a student's ternary layers, against where they began."""

    def __init__(self, student: nn.Module) -> None:
        self.student = student
        self.initial = {n: _scales(m) for n, m in ternary_layers(student).items()}
        self.course = Course()
        layers = ternary_layers(student).items()
        self.constant = set(self._alike({n: _counts(m.codes()) for n, m in layers}))  # from here
        self.collapsed: list[str] = []

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps; ``good``: its loss was not above the start."""
        return {"course": asdict(self.course), "good": self.course.above == 0}

    def go_on(self, state: Mapping[str, Any]) -> None:
        """Take up the `state` of a checkpoint."""
        self.course = Course(**state["course"])
        self.collapsed = []

    def due(self, step: int, steps: int) -> bool:
        """Whether this step, counted from 0, is one of the few that are looked at."""
        if not self.initial:  # a dense model has no codes to look at
            return False
        every = max(1, round(steps * DIAGNOSE_SHARE))
        return step % every == 0 or step == steps - 1

    def codes(self) -> dict[str, Tensor]:
        """The codes in use by layer, packed, since they are kept while a step takes its memory.

        Of a layer in shards, this process's rows.
        """
        layers = ternary_layers(self.student).items()
        return {n: packing.pack_base3(m.codes(), check=False) for n, m in layers}

    def diagnostics(self, before: dict[str, Tensor]) -> dict[str, float]:
        """Share of codes this step flipped, share of zeros, drift of scales and shifts."""
        counts, flips = {}, 0
        drift = [torch.zeros(2, dtype=torch.float64), torch.zeros(2, dtype=torch.float64)]
        for name, layer in ternary_layers(self.student).items():
            codes = layer.codes()
            counts[name] = _counts(codes)
            flips += int((codes != packing.unpack_base3(before[name], codes.shape[1])).sum())
            for i, (now, start) in enumerate(zip(_scales(layer), self.initial[name], strict=True)):
                scale = self.initial[name][0].abs().sum()
                drift[i] += torch.stack([(now - start).abs().sum(), scale]).cpu().double()
        self.collapsed = [n for n in self._alike(counts) if n not in self.constant]
        zeros, count = (sum(map(of, counts.values())) for of in (itemgetter(1), sum))
        some = next(iter(ternary_layers(self.student).values()))
        every, flipped, zero = processes.over_shards([count, flips, zeros], some.weight)
        drifts = processes.over_shards(torch.cat(drift).tolist(), some.weight_scale)
        scale_drift, shift_drift = (a / b if b else 0.0 for a, b in (drifts[:2], drifts[2:]))
        return {
            "flip_share": flipped / every,
            "zero_share": zero / every,
            "scale_drift": scale_drift,
            "shift_drift": shift_drift,
        }

    def _alike(self, counts: dict[str, list[int]]) -> list[str]:
        """The layers nearly all of whose codes are one; ``counts`` are of this process's rows."""
        if not counts:
            return []
        some = next(iter(ternary_layers(self.student).values())).weight
        sums = processes.over_shards([n for own in counts.values() for n in own], some)
        three = (sums[i : i + 3] for i in range(0, len(sums), 3))
        return [n for n, own in zip(counts, three, strict=True) if max(own) >= ONE_CODE * sum(own)]

    # -- divergence --------------------------------------------------------------------------------

    def check_finite(self, step: int, loss: float, norm: float) -> None:
        """`DivergenceError`, naming the layer, if the loss or the gradient's norm is not finite.

        ``step`` is counted from 1.
        """
        if math.isfinite(loss) and math.isfinite(norm):
            return
        layers = ternary_layers(self.student).items()
        bad = [n for n, m in layers if not _finite(m.weight.grad) or not _finite(m.weight)]
        where = f", first seen in {bad[0]}" if bad else ""
        what = f"loss {loss}" if not math.isfinite(loss) else "a gradient that is not finite"
        raise _diverged(step, f"{what}{where}", "a lower --lr, or a smaller --clip")

    def check(self, step: int, steps: int, loss: float) -> None:
        """`DivergenceError` if a layer's codes have become one, or the loss is lost; once a step.

        ``step`` is counted from 1.
        """
        self.course.add(loss)
        if self.collapsed:
            name = self.collapsed[0]
            why = f"{ONE_CODE:.1%} of the codes of {name} have become one"
            raise _diverged(step, why, f"a lower --lr, or --skip {name}")
        longest = max(LONG_STEPS, round(LONG_SHARE * steps))
        if self.course.above >= longest:
            why = f"for {longest} steps the loss was above its start of {self.course.start:.4f}"
            raise _diverged(step, f"{why} (now {loss:.4f})", "a lower --lr, or more --warmup")


def _diverged(step: int, why: str, instead: str) -> DivergenceError:
    return DivergenceError(
        f"Training diverged at step {step}: {why}.",
        f"Try {instead}; the last good checkpoint is kept. --retreats N goes back to it, slower.",
    )


def _counts(codes: Tensor) -> list[int]:
    """How many codes are -1, 0 and +1."""
    return [int((codes == v).sum()) for v in (-1, 0, 1)]


def _scales(layer: TernaryLinear) -> list[Tensor]:
    both = [layer.weight_scale, layer.weight_shift]
    return [processes.local(p.detach()).clone() for p in both if p is not None]


def _finite(tensor: Tensor | None) -> bool:
    return tensor is None or bool(torch.isfinite(processes.local(tensor)).all())
