"""The error-compensated start of a model: block by block, each on what the ones before it give.

Within a block, layers that read the same tensor are rounded together, in the order in which they
are called. As in GPTQ's published code (see `ternq.compensate`), each layer is rounded for the
inputs that the layers rounded before it produce; then the block may be trained as a whole
(`ternq.reconstruct`). Held at once: the activations between two blocks, the Hessians of layers that
read one tensor.
"""

from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, ExitStack, nullcontext, suppress
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ternq.blocks import Call, Passing, calls_of
from ternq.compensate import DAMPING, Compensated, compensate
from ternq.errors import InputError
from ternq.grid import Rounded
from ternq.linear import (
    RoundedLinear,
    TernaryLinear,
    decoder_blocks,
    rounded_layers,
    ternary_layers,
)
from ternq.progress import Event, Progress, ignore
from ternq.recipe import Training
from ternq.reconstruct import reconstruct

Layer = TernaryLinear | RoundedLinear
Found = Compensated | Rounded
Rounding = Callable[[Layer, Tensor], Found]
"""How a layer is rounded for inputs of second moments ``[in, in]``, in place."""


@dataclass
class Started:
    """What became of the layers: their number, their mean relative error, and what was unusual."""

    how: str = "Start: {} layers rounded with their errors compensated"
    errors: list[float] = field(default_factory=list)
    dead: int = 0
    damped: dict[str, float] = field(default_factory=dict)
    shared: list[str] = field(default_factory=list)
    distances: list[tuple[float, float]] = field(default_factory=list)  # of reconstructed blocks
    widest: int = 0  # inputs of a layer

    def add(self, name: str, found: Found) -> None:
        """Count a layer."""
        self.errors.append(found.error or 0.0)
        self.dead += found.dead
        if found.damping > DAMPING:
            self.damped[name] = found.damping

    def add_all(self, other: "Started") -> None:
        """Count the layers of another block."""
        self.errors += other.errors
        self.dead += other.dead
        self.damped |= other.damped
        self.distances += other.distances
        self.widest = max(self.widest, other.widest)

    def said(self, ids: Tensor) -> list[str]:
        """In sentences, for ids ``[blocks, length]``."""
        count = len(self.errors)
        mean = sum(self.errors) / max(1, count)
        said = [
            f"{self.how.format(count)}, on {len(ids)} blocks of {ids.shape[1]} tokens; a layer's "
            f"output loses {mean:.1%} of its energy on average."
        ]
        nearer = [pair for pair in self.distances if pair[1] < pair[0]]
        if nearer:
            before, after = (sum(side) / len(nearer) for side in zip(*nearer, strict=True))
            said.append(
                f"Start: {len(nearer)} blocks reconstructed; their mean distance to the dense ones "
                f"went from {before:.4f} to {after:.4f}."
            )
        if kept := len(self.distances) - len(nearer):
            said.append(
                f"Start: {kept} of {len(self.distances)} blocks came no nearer to the dense ones, "
                "and stay as they were rounded; a lower --reconstruction-lr may help."
            )
        if (missing := self.widest - ids.numel()) > 0:
            said.append(
                f"The {ids.numel():,} tokens of calibration are {missing:,} fewer than the widest "
                f"layer has inputs ({self.widest:,}): its Hessian is singular but for the damping. "
                f"--calibration {-(-self.widest // ids.shape[1])} would be enough."
            )
        if self.dead:
            said.append(f"{self.dead} input channels of layers were 0 in all of the calibration.")
        for name, damping in self.damped.items():
            said.append(f"The Hessian of {name} was singular: damped by {damping:g}.")
        if self.shared:
            said.append(f"{', '.join(self.shared)}: weights of several modules, only rounded.")
        return said


class Kept(Protocol):
    """Blocks that an earlier command has finished; given again to the bit, and added to."""

    def load(self, index: int, block: nn.Module) -> Started | None:
        """Make a block what it became, and what was counted in it; None: it is not there."""

    def save(self, index: int, block: nn.Module, found: Started) -> None:
        """Keep a block that is finished."""


@torch.no_grad()
def compensated_start(
    model: nn.Module,
    ids: Tensor,
    rounding: Rounding | None = None,
    *,
    how: str = Started.how,
    rows: int = 4,
    device: str | None = None,
    autocast: AbstractContextManager[Any] | None = None,
    reconstruction: Training | None = None,
    seed: int = 0,
    progress: Progress = ignore,
    check: Callable[..., None] = lambda where="": None,
    kept: Kept | None = None,
) -> list[str]:
    """Give every `TernaryLinear` of a model at its closed-form start the error-compensated one.

    ``rounding`` is another way to round a layer, also a `RoundedLinear`; ``how`` says what it is.
    ``ids`` ``[blocks, length]`` are the text, ``rows`` blocks at a time. Latent weights, scales and
    shifts change in place. With ``reconstruction`` every block is then trained by these settings.
    Blocks are moved to ``device`` one by one and back, so that it holds no more than one of them.
    Returns what was done, in sentences. ``check`` is called often and may stop the work by raising;
    before every block it is told what to say then. Blocks that are ``kept`` are not made again.

    Raises:
        InputError: the blocks are not called one after another, or numbers are not finite.
    """
    autocast = autocast or nullcontext()
    home = next(model.parameters()).device
    place = home if device is None else torch.device(device)
    was_training = model.training
    model.eval()
    done, layers = Started(how), _own_weights(model)
    done.shared = sorted(_layers(model).keys() - layers.keys())
    try:
        prefix, blocks = decoder_blocks(model)
        with autocast:
            passing = Passing(blocks, blocks[0].forward)
            calls = calls_of(model, blocks, passing, torch.split(ids, rows))
        hidden = dense = [call.hidden.to(place) for call in calls[0]]
        for index, block in enumerate(blocks):
            check(f"Stopped before block {index + 1} of {len(blocks)} of the start")
            block.to(place)
            calls[index] = [call.to(place) for call in calls[index]]
            now = on(calls[index], hidden)
            within = f"{prefix}.{index}."
            own = {n: m for n, m in layers.items() if n.startswith(within)}
            if reconstruction is not None:
                use_latent(own)
                dense = run(block, on(calls[index], dense), autocast)
            found = kept.load(index, block) if kept else None
            if found is None:
                found = Started()
                hidden = start_block(
                    block,
                    own,
                    now,
                    found,
                    autocast,
                    dense,
                    rounding=rounding,
                    settings=reconstruction,
                    seed=seed + index,
                    check=check,
                )
                if kept:
                    kept.save(index, block, found)
            else:
                for layer in own.values():
                    use(layer, layer.value())
                hidden = run(block, now, autocast)
            done.add_all(found)
            calls[index] = []
            for layer in own.values():
                use(layer, None)
            block.to(home)
            shown = {"error": sum(done.errors) / max(1, len(done.errors))}
            progress(Event("calibrate", done=index + 1, total=len(blocks), values=shown))
    finally:
        for layer in layers.values():
            use(layer, None)
        model.train(was_training)
    return done.said(ids)


@torch.no_grad()
def start_block(
    block: nn.Module,
    layers: Mapping[str, Any],
    calls: list[Call],
    done: Started,
    autocast: AbstractContextManager[Any],
    targets: list[Tensor],
    *,
    rounding: Rounding | None = None,
    settings: Training | None,
    seed: int,
    check: Callable[[], None] = lambda: None,
) -> list[Tensor]:
    """Round the layers of one block, whose latent weights are still the dense ones.

    With ``settings`` the block is then trained towards ``targets``. The layers are left to use what
    they became as it is (`use`); what happened goes into ``done``. Returns what the finished block
    puts out.
    """
    use_latent(layers)
    done.widest = max((layer.in_features for layer in layers.values()), default=0)
    for stage in stages(block, layers, calls[0], autocast):
        hessian = _hessian(block, stage, calls, autocast)
        for name, layer in stage.layers:
            try:
                done.add(name, (rounding or _start)(layer, hessian))
            except ValueError as error:
                what = "compensated start" if rounding is None else "rounding"
                raise InputError(f"The {what} of {name} failed: {error}.") from error
            use(layer, layer.value())
            check()
    if settings is None or not settings.passes:
        return run(block, calls, autocast)
    for layer in layers.values():
        use(layer, None)
    before, after, outputs = reconstruct(
        block, calls, targets, settings, seed=seed, autocast=autocast, check=check
    )
    done.distances.append((before, after))
    for layer in layers.values():
        use(layer, layer.value())
    return outputs


def on(calls: list[Call], hidden: list[Tensor]) -> list[Call]:
    """Each call with its own activations."""
    return [call.on(h) for call, h in zip(calls, hidden, strict=True)]


@torch.no_grad()
def run(block: nn.Module, calls: list[Call], autocast: AbstractContextManager[Any]) -> list[Tensor]:
    """What a block puts out for every call."""
    with autocast:
        return [call.run(block) for call in calls]


def _layers(model: nn.Module) -> dict[str, Layer]:
    """Name -> layer that is rounded."""
    return {**ternary_layers(model), **rounded_layers(model)}


def _own_weights(model: nn.Module) -> dict[str, Layer]:
    """The layers whose weight no other module shares."""
    owners = Counter(
        id(p) for m in model.modules() for p in m._parameters.values() if p is not None
    )
    return {n: m for n, m in _layers(model).items() if owners[id(m.weight)] == 1}


def use_latent(layers: Mapping[str, Layer]) -> None:
    """Have layers use latent weights as they are: at the closed-form start, the dense ones."""
    for layer in layers.values():
        use(layer, layer.weight)


def use(layer: Layer, weight: Tensor | None) -> None:
    """Have the layer use ``weight`` as it is, not rounded anew in every call; None: as always."""
    vars(layer).pop("forward", None)
    if weight is not None:
        # not the layer itself: it would hold itself, and with it a block that is done
        fixed, bias = weight.to(layer.weight.device), layer.bias
        vars(layer)["forward"] = lambda x: F.linear(x, fixed.to(x.dtype), bias)


@dataclass
class Stage:
    """Layers that read the same tensor, and how often a block calls the first of them."""

    layers: list[tuple[str, Layer]]
    calls: int = 0

    @property
    def reader(self) -> Layer:
        """The first layer, whose inputs are those of all."""
        return self.layers[0][1]


class _Seen(Exception):
    """Ends a block's forward pass, of which no more is wanted."""


def stages(
    block: nn.Module,
    layers: Mapping[str, Layer],
    call: Call,
    autocast: AbstractContextManager[Any],
) -> list[Stage]:
    """The stages of a block, in the order of their calls; last each layer that is never called."""
    seen: list[tuple[str, Tensor]] = []  # tensors are held, so that none takes another's place
    with ExitStack() as hooks:
        for name, layer in layers.items():

            def see(module: Any, args: Any, name: str = name) -> None:
                seen.append((name, args[0]))

            hooks.callback(layer.register_forward_pre_hook(see).remove)
        with autocast:
            call.run(block)
    stages: list[Stage] = []
    left, last = dict(layers), None
    times = Counter(name for name, _ in seen)
    for name, tensor in seen:
        if name in left:
            if tensor is not last:
                stages.append(Stage([], times[name]))
            stages[-1].layers.append((name, left.pop(name)))
            last = tensor
    return stages + [Stage([pair]) for pair in left.items()]


def _hessian(
    block: nn.Module, stage: Stage, calls: list[Call], autocast: AbstractContextManager[Any]
) -> Tensor:
    """``2 / n * X'X`` of the inputs of a stage, float32 ``[in, in]``; 0 if it is not called.

    Of the block no more is run than what comes before the stage.
    """
    layer = stage.reader
    found = torch.zeros(layer.in_features, layer.in_features, device=layer.weight.device)
    count = left = 0

    def take(module: Any, args: Any) -> None:
        nonlocal count, left
        x = args[0].flatten(0, -2).float()
        count += len(x)
        with torch.autocast(x.device.type, enabled=False):
            found.addmm_(x.t(), x)
        left -= 1
        if not left:
            raise _Seen

    handle = layer.register_forward_pre_hook(take)
    try:
        with autocast:
            for call in calls:
                left = stage.calls
                with suppress(_Seen):
                    call.run(block)
    finally:
        handle.remove()
    return found.mul_(2 / max(1, count))


def _start(layer: Layer, hessian: Tensor) -> Compensated:
    """Round one layer, and put what it became in its place."""
    assert isinstance(layer, TernaryLinear), "others have a rounding of their own"
    found = compensate(layer.weight, hessian, layer.group_size, layer.weight_shift is not None)
    put(layer, found)
    return found


@torch.no_grad()
def put(layer: TernaryLinear, found: Compensated) -> None:
    """Have a layer be what it was rounded to."""
    layer.weight.copy_(found.latent)
    layer.weight_scale.copy_(found.scale)
    if layer.weight_shift is not None and found.shift is not None:
        layer.weight_shift.copy_(found.shift)
