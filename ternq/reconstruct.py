"""Block-wise reconstruction: a rounded decoder block is trained to put out what the dense one does.

One block at a time needs the memory of one block. Its latent weights, scales, shifts, norms and
biases learn by AdamW, on the activations that the ternary blocks before it give, towards the
outputs of the dense model. So does BRECQ's idea as EfficientQAT (Block-AP, arXiv 2407.11062) and
CAT-Q (arXiv 2606.26650) use it; loss, targets and settings here are our own (docs/method.md).
"""

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ternq.blocks import Call
from ternq.linear import rounded_once, rounded_softly
from ternq.losses import off
from ternq.optimize import optimizer, set_rate
from ternq.recipe import Training
from ternq.softened import hardness


def distance(output: Tensor, target: Tensor) -> Tensor:
    """``1 - cos`` a token, mean, plus the squared error relative to the target's energy.

    Activations ``[..., hidden]``, computed in float32. Direction alone would leave the length of
    the residual stream free; the squared error alone is ruled by a few channels and tokens.
    """
    output, target = output.float(), target.float()
    lost = (output - target).square().sum() / target.square().sum().clamp(min=1e-30)
    return off(output, target) + lost


@torch.no_grad()
def reconstruct(
    block: nn.Module,
    calls: list[Call],
    targets: list[Tensor],
    settings: Training,
    *,
    seed: int,
    autocast: AbstractContextManager[Any],
    check: Callable[[], None] = lambda: None,
) -> tuple[float, float, list[Tensor]]:
    """Train a block on ``calls`` towards ``targets``, a step a call.

    ``settings`` has epochs and rate; ``check`` is called before every step and may stop the work
    by raising. A block that did not come nearer is put back to where it began. Returns the mean
    distances before and after, and what the block puts out in the end.
    """
    before = mean_distance(block, calls, targets, autocast)
    # all of a block learns, by plain AdamW at one rate, whatever is asked of what comes afterwards
    settings = replace(
        settings,
        lr=settings.reconstruction_lr,
        lr_second=None,
        scale_lr=None,
        train="all",
        optimizer="adamw",
        latent="float32",
        offload=False,
    )
    learned = optimizer(block, settings)
    parameters = [p for group in learned.param_groups for p in group["params"]]
    generator = torch.Generator().manual_seed(seed)
    began = [p.detach().clone() for p in parameters]
    order: list[int] = []
    steps = settings.passes * len(calls)
    with torch.enable_grad():
        for step in range(steps):
            check()
            if step % len(calls) == 0:
                order = torch.randperm(len(calls), generator=generator).tolist()
            at = order[step % len(calls)]
            with rounded_softly(block, hardness(step, steps, settings)), autocast:
                output = calls[at].run(block)
            loss: Any = distance(output, targets[at])
            loss.backward()
            if settings.clip:
                torch.nn.utils.clip_grad_norm_(parameters, settings.clip)
            set_rate(learned, step, steps, settings)
            learned.step()
            learned.zero_grad()
    outputs = _outputs(block, calls, autocast)
    after = _mean(outputs, targets)
    if not after < before:
        for parameter, value in zip(parameters, began, strict=True):
            parameter.copy_(value)
        outputs = _outputs(block, calls, autocast)
    return before, after, outputs


@torch.no_grad()
def mean_distance(
    block: nn.Module,
    calls: list[Call],
    targets: list[Tensor],
    autocast: AbstractContextManager[Any],
) -> float:
    """`distance` of what a block puts out, mean over calls."""
    with rounded_once(block), autocast:
        return _mean((call.run(block) for call in calls), targets)


def _mean(outputs: Iterable[Tensor], targets: list[Tensor]) -> float:
    pairs = zip(outputs, targets, strict=True)
    return float(torch.stack([distance(output, target) for output, target in pairs]).mean())


def _outputs(
    block: nn.Module, calls: list[Call], autocast: AbstractContextManager[Any]
) -> list[Tensor]:
    with rounded_once(block), autocast:
        return [call.run(block) for call in calls]


def work(settings: Training) -> tuple[int, int]:
    """Steps in which a block is trained, and the tokens that they read."""
    blocks = settings.passes * settings.calibration
    steps = settings.passes * -(-settings.calibration // rows_at_once(settings))
    return steps, blocks * settings.sequence_length


def rows_at_once(settings: Training) -> int:
    """Blocks of text that pass through a block at once: one where they are steps of training."""
    return 1 if settings.passes else settings.micro_batch_size or settings.batch_size
