"""How learning rate and weight decay change over the steps; both are functions of the step alone.

Spectra's schedule (Kaushal et al. 2024, arXiv 2407.12327 v5): warm-up and linear decay, the peak
lowered after half of the steps, weight decay removed after two thirds of them.
"""

import math

from ternq.recipe import Training


def rate(step: int, steps: int, settings: Training) -> float:
    """The share of ``lr`` that step ``step``, counted from 0, is taken with.

    Linear warm-up to 1; then linear or cosine decay to 0 after the last step. From half of the
    steps on, all of it is lowered by ``lr_second / lr``.
    """
    share = _decaying(step, steps, settings.warmup, settings.schedule == "cosine")
    if settings.lr_second is not None and step >= steps / 2:
        share *= settings.lr_second / settings.peak_lr
    return share


def decays(step: int, steps: int, settings: Training) -> bool:
    """Whether weight decay still acts in this step."""
    return step < round(steps * settings.decay_until)


def _decaying(step: int, steps: int, warmup: float, cosine: bool) -> float:
    rising = max(1, round(steps * warmup))
    if step < rising:
        return (step + 1) / (rising + 1)
    left = max(0.0, (steps - step) / max(1, steps - rising))
    return 0.5 * (1 - math.cos(math.pi * left)) if cosine else left
