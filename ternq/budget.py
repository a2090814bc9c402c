"""What the machine can do: a strategy that fits its memory, and a token budget from a short probe.

Strategies are tried in a fixed order before anything is loaded, each with the memory that
`ternq.footprint` counts for it, and the first that fits is taken.
"""

import math
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch

from ternq import processes
from ternq.errors import ResourceError
from ternq.footprint import Footprint, footprint, roughly
from ternq.linear import decoder_blocks
from ternq.memory import free_memory, resident
from ternq.optimize import on_trial, take_step
from ternq.processes import Crew
from ternq.recipe import Scheme, Train, Training
from ternq.walk import bytes_needed

HOURS = 2.0  # a default budget ends within this
MOST_TOKENS = 10_000_000
EVALUATION_SHARE = 0.2  # of the time goes to perplexities, packing and the report
PROBE_STEPS, PROBE_SECONDS = 3, 20.0  # at most, after a first step that sets things up
BY_BLOCKS = "block by block from disk, without training end to end"
STRATEGY = (
    "train",
    "dtype",
    "teacher_dtype",
    "micro_batch_size",
    "gradient_checkpointing",
    "block_by_block",
)  # settings that the machine may choose
PLENTY = 1.5  # times a rough estimate, which is mostly too high
LIBRARIES = 200_000_000  # bytes of those that reading text and writing reports need, on Linux
MARGIN = 1.05  # times the count: what allocators lose to gaps


@dataclass(frozen=True)
class Memory:
    """Bytes that training needs at its peak, of which kind, and bytes that are free.

    ``host`` is what is free there, where the device has a memory of its own and it is known.
    """

    counted: Footprint
    free: int
    host: int | None = None

    @property
    def needed(self) -> int:
        """All of it, with a margin."""
        return round(MARGIN * self.counted.total)

    @property
    def fits(self) -> bool:
        """Whether it is there."""
        return self.needed <= self.free and (self.host is None or self.counted.host <= self.host)

    def to_json(self) -> dict[str, int]:
        """Its numbers."""
        parts = {k: getattr(self.counted, k) for k in ("weights", "optimizer", "step", "host")}
        return {"needed": self.needed, "free": self.free} | parts


def own_bytes() -> int:
    """Bytes that the program itself holds: now, and the libraries that it imports on the way."""
    return resident() + LIBRARIES


def age() -> float:
    """Seconds since this process began: what its libraries took to be imported."""
    import psutil

    return float(time.time() - psutil.Process().create_time())


def choose(
    build: Callable[[], Any],
    scheme: Scheme,
    settings: Training,
    device: str,
    free: int | None = None,
    *,
    by_blocks: bool = False,
    exact: bool = True,
    crew: Crew | None = None,
) -> tuple[Training, Memory, str]:
    """The first strategy that fits ``free`` bytes (None: what the device has): settings and why.

    ``build`` makes the dense model of the configuration, see `ternq.outlines.blueprint`;
    ``by_blocks``: going block by block from disk is one strategy. Of a ``crew`` (by default that of
    this training) each process has such a device. Counting takes seconds: unless ``exact``, the
    first is taken uncounted where there is more than enough.

    Raises:
        ResourceError: none fits; the sentence says how much is missing.
    """
    host = None if free is not None or device.startswith("cpu") else _free("cpu")
    free = _free(device) if free is None else free
    crew = crew or processes.crew()
    if not exact and not settings.block_by_block:
        plenty = Memory(roughly(build, settings, "there is plenty"), round(free / PLENTY))
        if plenty.fits:
            how = f"{_said(settings)}: {_gb(free)} are free, which is more than enough"
            return settings, plenty, how
    counted: dict[Training, Memory] = {}

    def needs(candidate: Training) -> Memory:
        if candidate not in counted:
            found = _counted(build, scheme, candidate, device, crew)
            counted[candidate] = Memory(found, free, host)
        return counted[candidate]

    weights, last = _block_weights(build), settings
    for family in families(scheme, settings, by_blocks, crew):
        (first, _), (last, _) = family[0], family[-1]
        if free < _floor(last, crew) * weights:
            continue  # counting takes a while for a large model
        if host is None and not (needs(first).fits or needs(last).fits):
            continue  # nor does what lies between; the host has more or less to load in between
        for found, how in family:
            if needs(found).fits:
                return found, needs(found), _why(how, needs(found), crew)
    needs(last)
    least = min(counted.values(), key=lambda memory: memory.needed)
    what, wanted, there = "memory", least.needed, free
    if wanted <= free and host is not None:
        what, wanted, there = "the host's memory", least.counted.host, host
    hint = "a shorter --sequence-length" + (
        "" if by_blocks else ", or ternq ternarize with a folder of safetensors"
    )
    raise ResourceError(
        f"This needs about {_gb(wanted)} of {what}, {_gb(wanted - there)} more than is free.",
        f"Take a machine with more memory, or {hint}.",
    )


def rounding(
    build: Callable[[], Any], settings: Training, device: str, free: int | None = None
) -> tuple[Memory, str]:
    """Memory of a method that only rounds, estimated from shapes, and what is done in words.

    Raises:
        ResourceError: it does not fit.
    """
    free = _free(device) if free is None else free
    with torch.device("meta"):
        skeleton = build()
    everything = sum(p.numel() for p in skeleton.parameters())
    work = bytes_needed(skeleton, replace(settings, reconstruction_epochs=0))
    memory = Memory(Footprint(8 * everything, 0, work, rough="no step"), free)
    if not memory.fits:
        raise ResourceError(
            f"This needs about {_gb(memory.needed)} of memory, {_gb(memory.needed - free)} more "
            "than is free.",
            "Take a machine with more memory, or --method dlt, which goes block by block.",
        )
    return memory, f"rounded without training: needs about {_gb(memory.needed)}"


def _free(device: str) -> int:
    try:
        return free_memory(torch.device(device))
    except (RuntimeError, AssertionError) as error:
        reason = str(error).partition("\n")[0]
        raise ResourceError(f"No device '{device}' here: {reason}") from None


def families(
    scheme: Scheme, settings: Training, by_blocks: bool, crew: Crew
) -> Iterator[list[tuple[Training, str]]]:
    """What is tried, in order, each family from the fastest to the smallest.

    End to end; where nothing else is asked for, an adapter (not in shards) and then scales alone;
    block by block.
    """
    if settings.block_by_block:
        yield [(settings, BY_BLOCKS)]
        return
    changeable = _changeable(scheme, settings)
    trains: tuple[Train, ...] = ("all", "low-rank", "scales")
    trains = tuple(t for t in trains if t != "low-rank" or not crew.sharded)
    for train in trains if changeable else (settings.train,):
        yield list(_variants(replace(settings, train=train)))
    if by_blocks and changeable:
        yield [(replace(settings, block_by_block=True), BY_BLOCKS)]


def _block_weights(build: Callable[[], Any]) -> int:
    with torch.device("meta"):
        return sum(p.numel() for p in decoder_blocks(build())[1].parameters())


def _floor(settings: Training, crew: Crew) -> float:
    """Bytes for each weight of the blocks that one process holds at the very least."""
    if settings.block_by_block:
        return 0
    teacher = 0 if settings.objective == "ce" or settings.cache_teacher else 1  # in 8 bits
    if settings.train != "all":
        once = settings.train == "low-rank" and not settings.calibrated
        return teacher + (0 if once else 1)  # a code, which is not shared
    plain = (settings.latent, settings.optimizer, settings.offload) == ("float32", "adamw", False)
    own = 16 if plain else 0  # a weight, its gradient, two moments
    return teacher + own / (crew.count if crew.sharded else 1)


def _changeable(scheme: Scheme, settings: Training) -> bool:
    """Whether what learns may be chosen: these settings go with every choice."""
    chosen = (settings.train, settings.latent, settings.offload, settings.objective, scheme.method)
    return chosen == ("all", "float32", False, "distill", "dlt") and not settings.from_scratch


def _variants(settings: Training) -> Iterator[tuple[Training, str]]:
    """As asked; smaller micro batches; activations recomputed; the teacher in 8 bits too."""
    yield settings, _said(settings)
    size = settings.micro_batch_size or settings.batch_size
    divisors = _divisors(settings.batch_size)
    while size > 1 and settings.micro_batch_size is None:
        size = max(d for d in divisors if d <= size // 2)
        smaller = replace(settings, micro_batch_size=size)
        yield smaller, _said(smaller)
    if not settings.gradient_checkpointing:
        again = replace(settings, micro_batch_size=size, gradient_checkpointing=True)
        yield again, _said(again)
        settings = again
    if settings.teacher_dtype == "float32" and settings.objective == "distill":
        eight = replace(settings, micro_batch_size=size, teacher_dtype="int8")
        yield eight, _said(eight)


def _divisors(number: int) -> set[int]:
    small = [d for d in range(1, math.isqrt(number) + 1) if number % d == 0]
    return {*small, *(number // d for d in small)}


def _counted(
    build: Callable[[], Any], scheme: Scheme, settings: Training, device: str, crew: Crew
) -> Footprint:
    if not settings.block_by_block:
        return footprint(build, scheme, settings, device, crew)
    with torch.device("meta"):
        skeleton = build()
    return Footprint(0, 0, bytes_needed(skeleton, settings))


def _said(settings: Training) -> str:
    how = {"all": "end to end", "scales": "scales and shifts alone", "low-rank": "an adapter"}
    said = f"{how[settings.train]}, micro batches of "
    said += str(settings.micro_batch_size or settings.batch_size)
    said += ", activations recomputed" if settings.gradient_checkpointing else ""
    return said + (", the teacher in 8 bits" if settings.teacher_dtype == "int8" else "")


def _why(how: str, memory: Memory, crew: Crew) -> str:
    said = f"{how}: needs about {_gb(memory.needed)} of the {_gb(memory.free)} that are free"
    if crew.count > 1 and how != BY_BLOCKS:
        shared = ", which share the parameters" if crew.sharded else ""
        said += f" on each of {crew.count} devices{shared}"
    if memory.counted.host:
        said += f", and {_gb(memory.counted.host)} of the host's memory"
    if memory.counted.rough:
        said += f" (estimated from shapes: {memory.counted.rough})"
    return said


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
    seconds: list[float] = []
    with on_trial(optimizer):
        while len(seconds) < 1 + PROBE_STEPS and sum(seconds) < PROBE_SECONDS:
            began = time.monotonic()
            trainer.accumulate(batch)
            take_step(optimizer, settings, seed=0, step=0, norm=trainer.clip())
            optimizer.zero_grad()
            seconds.append(time.monotonic() - began)
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
