"""What is watched while a student trains: its codes and scales, and whether it still learns."""

import math

import torch
from torch import Tensor, nn

from ternq.errors import DivergenceError
from ternq.linear import TernaryLinear, ternary_layers

DIAGNOSE_SHARE = 0.05  # of the steps; flips and drift cost a second rounding of every weight


class Watch:
    """Diagnostics of a student's ternary layers, against where they began."""

    def __init__(self, student: nn.Module) -> None:
        self.student = student
        self.initial = {n: _scales(m) for n, m in ternary_layers(student).items()}

    def due(self, step: int, steps: int) -> bool:
        """Whether this step, counted from 0, is one of the few that are looked at."""
        if not self.initial:  # a dense model has no codes to look at
            return False
        every = max(1, round(steps * DIAGNOSE_SHARE))
        return step % every == 0 or step == steps - 1

    def codes(self) -> dict[str, Tensor]:
        """The codes in use, by layer."""
        return {n: m.codes() for n, m in ternary_layers(self.student).items()}

    def diagnostics(self, before: dict[str, Tensor]) -> dict[str, float]:
        """Share of codes this step flipped, share of zeros, drift of scales and shifts."""
        after = self.codes()
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

    def check_finite(self, step: int, loss: float, norm: float) -> None:
        """`DivergenceError`, naming the layer, if the loss or the gradient's norm is not finite."""
        if math.isfinite(loss) and math.isfinite(norm):
            return
        layers = ternary_layers(self.student).items()
        bad = [n for n, m in layers if not _finite(m.weight.grad) or not _finite(m.weight)]
        where = f", first seen in {bad[0]}" if bad else ""
        raise DivergenceError(
            f"Training diverged at step {step + 1}: loss {loss}{where}.",
            "Try a lower --lr; the last checkpoint is kept.",
        )


def _scales(layer: TernaryLinear) -> list[Tensor]:
    both = [layer.weight_scale, layer.weight_shift]
    return [p.detach().clone() for p in both if p is not None]


def _finite(tensor: Tensor | None) -> bool:
    return tensor is None or bool(torch.isfinite(tensor).all())
