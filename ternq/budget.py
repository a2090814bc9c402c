"""What the machine can do: memory before the start, and a token budget from a short probe.

The estimate of memory counts what end-to-end training holds: teacher and student in float32, a
gradient and two moments for everything trained, and the activations of one micro batch.
"""

import time
from dataclasses import dataclass, replace
from typing import Any

import torch

from ternq.errors import ResourceError
from ternq.linear import decoder_blocks, ternary_layers
from ternq.perplexity import free_memory
from ternq.recipe import Training

HOURS = 2.0  # a default budget ends within this
MOST_TOKENS = 10_000_000
EVALUATION_SHARE = 0.2  # of the time goes to perplexities, packing and the report
PROBE_STEPS = 2


@dataclass(frozen=True)
class Memory:
    """Bytes that training needs at its peak, by kind, and bytes that are free."""

    weights: int
    training: int
    activations: int
    free: int

    @property
    def needed(self) -> int:
        """All of it."""
        return self.weights + self.training + self.activations

    @property
    def fits(self) -> bool:
        """Whether it is there."""
        return self.needed <= self.free


def estimate(student: Any, settings: Training, device: str) -> Memory:
    """Peak memory of end-to-end training with these settings; both models are loaded already."""
    everything = sum(p.numel() for p in student.parameters())
    trained = sum(sum(p.numel() for p in m.parameters()) for m in ternary_layers(student).values())
    config = student.config
    hidden, layers = config.hidden_size, len(decoder_blocks(student)[1])
    vocabulary = student.get_output_embeddings().weight.shape[0]
    mlp = getattr(config, "intermediate_size", None) or 4 * hidden
    tokens = (settings.micro_batch_size or settings.batch_size) * settings.sequence_length
    # a block keeps about 12 vectors of the hidden size and 4 of the MLP's; recomputed ones keep 1
    block = hidden if settings.gradient_checkpointing else 12 * hidden + 4 * mlp
    activations = 4 * tokens * (block * layers + 12 * hidden + 4 * mlp + 3 * vocabulary)
    return Memory(
        weights=2 * 4 * everything,
        training=(3 * 4 + 4 + 1) * trained,
        activations=activations,
        free=free_memory(torch.device(device)) + 2 * 4 * everything,  # both copies are held already
    )


def refuse_without_room(model: Any, device: str) -> None:
    """`ResourceError` if a second float32 copy of a loaded model does not fit."""
    needed = 4 * sum(p.numel() for p in model.parameters())
    free = free_memory(torch.device(device))
    if needed > free:
        raise ResourceError(
            f"A student of this size needs {needed / 1e9:.1f} GB beside its teacher, and "
            f"{free / 1e9:.1f} GB are free.",
            "Take a machine with more memory.",
        )


def choose(student: Any, settings: Training, device: str) -> tuple[Training, str]:
    """The first strategy that fits: end to end; smaller micro batches; recomputed activations.

    Returns the settings and a sentence that says which and why.

    Raises:
        ResourceError: none fits; the sentence says how much is missing.
    """
    tried = [settings]
    size = settings.micro_batch_size or settings.batch_size
    while size > 1 and settings.micro_batch_size is None:
        size = next(s for s in range(size // 2, 0, -1) if settings.batch_size % s == 0)
        tried.append(replace(settings, micro_batch_size=size))
    tried.append(replace(tried[-1], gradient_checkpointing=True))
    for candidate in tried:
        memory = estimate(student, candidate, device)
        if memory.fits:
            how = f"micro batches of {candidate.micro_batch_size or candidate.batch_size}"
            how += ", activations recomputed" if candidate.gradient_checkpointing else ""
            return candidate, (
                f"end to end, {how}: needs about {memory.needed / 1e9:.1f} GB of the "
                f"{memory.free / 1e9:.1f} GB that are free"
            )
    missing = (memory.needed - memory.free) / 1e9
    raise ResourceError(
        f"Training end to end needs about {memory.needed / 1e9:.1f} GB of memory, "
        f"{missing:.1f} GB more than is free.",
        "Take a machine with more memory, or a shorter --sequence-length.",
    )


def probe(trainer: Any) -> float:
    """Tokens a second of one training step, measured on random tokens; nothing is learned."""
    settings = trainer.settings
    vocabulary = trainer.student.get_output_embeddings().weight.shape[0]
    shape = (settings.batch_size, settings.sequence_length)
    batch = torch.randint(vocabulary, shape, generator=torch.Generator().manual_seed(0))
    seconds = []
    for _ in range(PROBE_STEPS):
        began = time.monotonic()
        trainer.accumulate(batch)
        trainer.optimizer.zero_grad()
        seconds.append(time.monotonic() - began)
    return batch.numel() / min(seconds)


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
