"""What the machine can do: a strategy that fits its memory, and a token budget from a short probe.

Strategies are tried in a fixed order before anything is loaded, each with the memory that
`ternq.footprint` counts for it, and the first that fits is taken.
"""

import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch

from ternq.errors import ResourceError
from ternq.footprint import Footprint, footprint
from ternq.optimize import take_step
from ternq.perplexity import free_memory
from ternq.recipe import Scheme, Training

HOURS = 2.0  # a default budget ends within this
MOST_TOKENS = 10_000_000
EVALUATION_SHARE = 0.2  # of the time goes to perplexities, packing and the report
PROBE_STEPS, PROBE_SECONDS = 3, 20.0  # at most, after a first step that sets things up
MARGIN = 1.05  # times the count: what allocators lose to gaps


@dataclass(frozen=True)
class Memory:
    """Bytes that training needs at its peak, of which kind, and bytes that are free."""

    counted: Footprint
    free: int

    @property
    def needed(self) -> int:
        """All of it, with a margin."""
        return round(MARGIN * self.counted.total)

    @property
    def fits(self) -> bool:
        """Whether it is there."""
        return self.needed <= self.free

    def to_json(self) -> dict[str, int]:
        """Its numbers."""
        parts = {k: getattr(self.counted, k) for k in ("weights", "optimizer", "step")}
        return {"needed": self.needed, "free": self.free} | parts


def resident() -> int:
    """Bytes that this process holds, its libraries among them."""
    import psutil

    return int(psutil.Process().memory_info().rss)


def choose(
    build: Callable[[], Any],
    scheme: Scheme,
    settings: Training,
    device: str,
    free: int | None = None,
) -> tuple[Training, Memory, str]:
    """The first strategy that fits ``free`` bytes (None: what the device has): settings and why.

    ``build`` makes the dense model of the configuration, see `ternq.hf.blueprint`.

    Raises:
        ResourceError: none fits; the sentence says how much is missing.
    """
    if free is None:
        free = free_memory(torch.device(device))
    least = None
    for candidate, how in strategies(settings):
        memory = Memory(footprint(build, scheme, candidate, device), free)
        if memory.fits:
            said = f"{how}: needs about {_gb(memory.needed)} of the {_gb(free)} that are free"
            if memory.counted.rough:
                said += f" (estimated from shapes: {memory.counted.rough})"
            return candidate, memory, said
        least = memory if least is None or memory.needed < least.needed else least
    assert least is not None
    raise ResourceError(
        f"Training needs about {_gb(least.needed)} of memory, {_gb(least.needed - free)} more "
        "than is free.",
        "Take a machine with more memory, or a shorter --sequence-length.",
    )


def strategies(settings: Training) -> Iterator[tuple[Training, str]]:
    """What is tried, in order: as asked; smaller micro batches; activations recomputed."""
    yield settings, _said(settings)
    size = settings.micro_batch_size or settings.batch_size
    while size > 1 and settings.micro_batch_size is None:
        size = next(s for s in range(size // 2, 0, -1) if settings.batch_size % s == 0)
        settings = replace(settings, micro_batch_size=size)
        yield settings, _said(settings)
        settings = replace(settings, micro_batch_size=None)
    if not settings.gradient_checkpointing:
        settings = replace(settings, micro_batch_size=size, gradient_checkpointing=True)
        yield settings, _said(settings)


def _said(settings: Training) -> str:
    how = f"end to end, micro batches of {settings.micro_batch_size or settings.batch_size}"
    return how + (", activations recomputed" if settings.gradient_checkpointing else "")


def _gb(size: int) -> str:
    return f"{size / 1e9:.1f} GB"


def probe(trainer: Any) -> float:
    """Tokens a second of an optimizer step, measured on random tokens; nothing is learned.

    The rate is 0 in it, and the optimizer forgets it afterwards.
    """
    settings, optimizer = trainer.settings, trainer.optimizer
    vocabulary = trainer.student.get_output_embeddings().weight.shape[0]
    shape = (settings.batch_size, settings.sequence_length)
    batch = torch.randint(vocabulary, shape, generator=torch.Generator().manual_seed(0))
    rates = [group["lr"] for group in optimizer.param_groups]
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    seconds: list[float] = []
    while len(seconds) < 1 + PROBE_STEPS and sum(seconds) < PROBE_SECONDS:
        began = time.monotonic()
        trainer.accumulate(batch)
        take_step(optimizer, settings, seed=0, step=0, norm=trainer.clip())
        optimizer.zero_grad()
        seconds.append(time.monotonic() - began)
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        group["lr"] = rate
    optimizer.state.clear()
    return batch.numel() / statistics.median(seconds[1:] or seconds)


def planned_steps(settings: Training, rate: float) -> int:
    """The steps asked for; or those that fit into the default time at ``rate`` tokens a second."""
    if settings.steps is not None:
        return settings.steps
    tokens = settings.tokens
    if tokens is None:
        fitting = int(rate * 3600 * HOURS * (1 - EVALUATION_SHARE))
        tokens = min(MOST_TOKENS, fitting)
    per_step = settings.batch_size * settings.sequence_length
    return max(1, round(tokens / per_step)) if tokens else 0
