"""Bytes that training holds, counted from shapes and settings: what a plan is made of.

Pure arithmetic; tests compare it with the tensors of a student, its gradients and its optimizer
after a step, to the byte. Per value:

| what | weights | gradients | states |
| --- | --- | --- | --- |
| ternary weight, `--train all` | 4 | 4 | 8 |
| the same, `--latent bfloat16` | 2 | 2 | 4 |
| ternary weight, `scales` and `low-rank` | 1 | 0 | 0 |
| scale or shift | 4 | 4 | 8 |
| group of the base, `low-rank` | 8 | 0 | 0 |
| adapter, `low-rank` | 4 | 4 | 8 |
| norm or bias, `all` / else | 4 | 4 / 0 | 8 / 0 |
| embedding, head, skipped layer | 4 | 0 | 0 |

With `--optimizer adamw-8bit` the states are 2 + 8 / 256 bytes a value, and 2048 a tensor, for
tensors of at least 4096 values that 256 divides. Each tensor has a step count of 4 bytes.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from torch import nn

from ternq.modeling_ternq import features, is_linear
from ternq.recipe import Scheme, Training
from ternq.ternary import n_groups

_SMALLEST = 4096  # values of a tensor that torchao quantizes the states of, or offloads
_BLOCK = 256  # values that share a scale in an 8-bit state
_MAP = 256 * 4  # bytes of its table


@dataclass(frozen=True)
class Shapes:
    """What a model has: ternary layers ``(out, in)``, tensors that learn with them, and the rest.

    ``learned`` has the values of each norm and bias, ``frozen`` those of embeddings, output head
    and skipped layers together, ``buffers`` bytes; ``blocks`` is the number of decoder blocks.
    """

    layers: tuple[tuple[int, int], ...]
    learned: tuple[int, ...]
    frozen: int
    buffers: int
    blocks: int

    @property
    def parameters(self) -> int:
        """Values of the dense model."""
        return sum(a * b for a, b in self.layers) + sum(self.learned) + self.frozen


@dataclass(frozen=True)
class Held:
    """Bytes of a student in training.

    ``weights``, ``gradients`` and ``states`` are there between backward pass and optimizer step;
    ``host`` is beside them in the host's memory (``--offload``). ``rounding`` is what the graph
    keeps of float weights and codes; ``watch`` two copies of all codes, at the few steps that are
    diagnosed.
    """

    weights: int
    gradients: int
    states: int
    host: int
    rounding: int
    watch: int


def shapes(model: nn.Module, layers: Mapping[str, nn.Module], blocks: int) -> Shapes:
    """The shapes of a model (it may lie on the meta device) whose ``layers``, by name, are ternary.

    They may still be dense, or be `TernaryLinear`, but not yet frozen.
    """
    seen: set[int] = set()
    learned, frozen = [], 0
    for where, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            inside = where in layers and name != "bias"
            if inside or id(parameter) in seen:
                continue
            seen.add(id(parameter))
            if isinstance(module, nn.Embedding) or (is_linear(module) and name == "weight"):
                frozen += parameter.numel()
            else:
                learned.append(parameter.numel())
    sizes = tuple((b, a) for a, b in (features(m) for m in layers.values()))
    return Shapes(sizes, tuple(learned), frozen, sum(b.nbytes for b in model.buffers()), blocks)


def held(shapes: Shapes, settings: Training, scheme: Scheme, *, autocast: bool = False) -> Held:
    """The bytes that a student of these shapes holds in training; its teacher is not among them.

    ``autocast``: matrix products in bfloat16 (`ternq.train.has_bf16`).
    """
    learning = list(_learning(shapes, settings, scheme))
    latents = sum(a * b for a, b in shapes.layers)
    frozen = 4 * shapes.frozen + shapes.buffers
    if settings.train != "all":
        frozen += latents + 4 * sum(shapes.learned)
    if settings.train == "low-rank":
        frozen += 8 * sum(out * n_groups(in_, scheme.group_size) for out, in_ in shapes.layers)
    values = sum(count * size for count, size in learning)
    states = [_states(count, size, settings) for count, size in learning]
    moved = [count >= _SMALLEST and settings.offload for count, _ in learning]
    return Held(
        weights=frozen + values,
        gradients=values,
        states=sum(s for s, m in zip(states, moved, strict=True) if not m),
        host=sum(
            s + 2 * count * size
            for s, m, (count, size) in zip(states, moved, learning, strict=True)
            if m
        ),
        rounding=_rounding(shapes, settings, autocast),
        watch=0 if settings.train == "scales" else 2 * latents,
    )


def _learning(shapes: Shapes, settings: Training, scheme: Scheme) -> Iterator[tuple[int, int]]:
    """Values and bytes a value of every tensor that learns."""
    for out, in_ in shapes.layers:
        if settings.train == "all":
            yield out * in_, 2 if settings.latent == "bfloat16" else 4
        if settings.train == "low-rank":
            yield settings.rank * in_, 4
            yield settings.rank * out, 4
        for _ in range(2 if scheme.shift else 1):
            yield out * n_groups(in_, scheme.group_size), 4
    if settings.train == "all":
        yield from ((count, 4) for count in shapes.learned)


def _states(count: int, size: int, settings: Training) -> int:
    """Bytes of AdamW's two moments and its step count for one tensor."""
    if settings.optimizer == "adamw-8bit" and count >= _SMALLEST and count % _BLOCK == 0:
        return 4 + 2 * (count + 4 * count // _BLOCK + _MAP)
    return 4 + 2 * count * size


def _rounding(shapes: Shapes, settings: Training, autocast: bool) -> int:
    """Of all layers (int8 codes, the weight in use), or of what is recomputed at once.

    Frozen layers are recomputed one by one. 24 bytes a weight are for their temporaries: the
    adapter's product, base, latent and used weight, and two gradients, each in float32.
    """
    if settings.train != "all":
        return 24 * max(a * b for a, b in shapes.layers)
    kept = (1 + (2 if autocast else 4)) * sum(a * b for a, b in shapes.layers)
    return kept // shapes.blocks if settings.gradient_checkpointing else kept
